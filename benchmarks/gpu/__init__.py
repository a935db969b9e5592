"""The parts of `make bench-gpu`: timetable, steps, the processes that run them, results.

The parent process (`benchmarks.run_gpu`) imports neither torch nor the library before its children
are started, and never touches the GPU.
"""
