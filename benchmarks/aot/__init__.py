"""The ahead-of-time gate: record every specialisation of the kernels, compile it, judge it.

`forms` describes a specialisation as text, `record` finds those that users run, `compile` makes
machine code of one with whichever Triton is imported, `store` runs many compilers and keeps their
verdicts, `judge` says what is wrong. `benchmarks.aot_report` is the command.
"""
