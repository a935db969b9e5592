"""`python -m fastdiff`: the command line."""

from __future__ import annotations

from fastdiff.cli import main

main()
