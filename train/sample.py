#!/usr/bin/env python
"""Draw pictures with a trained model, on one process or many.

    python train/sample.py runs/demo samples --prompt "a red disc on a grey background"
    python train/sample.py runs/demo samples.npz --prompts-file DrawBench.csv --count 4 --guidance 3
    torchrun --nproc-per-node 8 train/sample.py runs/mine samples --count 50000 --batch-size 256

The same as `fastdiff sample`: `python train/sample.py --help`. An interrupted drawing is continued
by the same command.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Hand the arguments to the command."""
    from fastdiff import cli

    cli.main(["sample", *sys.argv[1:]])


if __name__ == "__main__":
    main()
