#!/usr/bin/env python
"""Train on pictures without captions, with or without labels.

    deepspeed train/unconditional.py --config iuvit_celeba64 --data.path img_align_celeba.zip
    python train/unconditional.py --config iuvit_cifar10 --data.path cifar-10-binary.tar.gz
    python train/unconditional.py --data.path pictures --data.transform None --model.num-classes 10

The data are a folder of pictures at any depth, a zip, tar shards or an npz; with
`--model.num-classes`, a folder of pictures for each label. `--config NAME --help` lists every field
of a recipe; any can be overridden. The same command again continues an interrupted run.
"""

from __future__ import annotations

import sys

from fastdiff.training.cli import log_to_stderr, parse_recipe


def main() -> None:
    """Parse and train."""
    assert __doc__ is not None
    name, recipe = parse_recipe(sys.argv[1:], default="iuvit_cifar10", description=__doc__)
    log_to_stderr()
    if recipe.model.context_dim is not None:
        sys.exit(f"train/unconditional.py: recipe {name} takes captions; use train/t2i.py")
    if recipe.data.path is None:
        sys.exit(
            f"train/unconditional.py: recipe {name} needs data: --data.path FOLDER (pictures at "
            "any depth; or a zip, tar shards, an npz, cifar-10-binary.tar.gz)"
        )
    from fastdiff.data.faults import BadSampleError
    from fastdiff.training.loop import make_trainer

    try:
        trainer = make_trainer(recipe)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"train/unconditional.py: {error}")
    try:
        trainer.run()
    except (BadSampleError, FloatingPointError, OSError) as error:
        sys.exit(f"train/unconditional.py: {error}")


if __name__ == "__main__":
    main()
