#!/usr/bin/env python
"""Judge samples against statistics of the data, on one process or many.

    python train/evaluate.py stats img_align_celeba.zip celeba64.npz --transform celeba64 \\
        --extractor inception-v3-2015-12-05.pt
    torchrun --nproc-per-node 8 train/evaluate.py fid samples celeba64.npz \\
        --extractor inception-v3-2015-12-05.pt

The same as `fastdiff stats` and `fastdiff fid`: `python train/evaluate.py fid --help`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Hand the arguments to the command."""
    if sys.argv[1:2] not in (["stats"], ["fid"]):
        sys.exit(__doc__)
    from fastdiff import cli

    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
