#!/usr/bin/env python
"""The paper's experiments again, small and at equal budgets, on the embedded scenes.

    python train/experiments.py --only 'table*'        # Tables 3 and 4: 9 rows, CPU
    python train/experiments.py                        # and Figures 1, 6 and 10
    python train/experiments.py --full                 # a GPU: three seeds, the presets' own sizes
    python train/experiments.py --report docs/experiments.md

The same command again goes on where it was stopped or killed. `--list` shows the rows.
"""

from __future__ import annotations

from fastdiff.experiments.runner import main

if __name__ == "__main__":
    main()
