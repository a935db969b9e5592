#!/usr/bin/env python
"""The paper's experiments again, small and at equal budgets, on the embedded scenes.

    python train/experiments.py                 # Tables 3 and 4: 9 rows, 25 minutes on one core
    python train/experiments.py --all           # and Figures 1, 6 and 10: 50 rows, hours
    python train/experiments.py --all --full    # a GPU: three seeds, the presets' own sizes
    python train/experiments.py --report docs/experiments.md

The same command again goes on where it was stopped or killed. `--list` shows the rows.
"""

from __future__ import annotations

from fastdiff.experiments.runner import main

if __name__ == "__main__":
    main()
