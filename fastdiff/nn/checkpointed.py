"""Gradient checkpointing, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A block that may forget its activations after the forward and compute them again backward.

    Attributes:
        checkpointing: Whether it does, where gradients are recorded. Blocks inside a block that
            does need not. `Backbone.set_checkpointing` sets it.

    Numerics: the second forward draws the dropout of the first; gradients are the same bits.

    Source: Training Deep Nets with Sublinear Memory Cost (Chen et al. 2016).
    """

    checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, checkpointed or not."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)
