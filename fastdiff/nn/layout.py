"""Memory format of convolution weights.

cuDNN convolves channels_last maps with channels_last weights. It copies others into that format in
every pass, and PyTorch copies their gradients back: about 16 bytes a weight and step under
autocast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that the two formats tell apart: of 3x3 and larger kernels, not depth-wise.

    A depth-wise kernel goes to a fused op, which reads its nine taps. DTensors and the empty
    parameters of ZeRO 3 are left out.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
            continue
        weight = layer.weight
        if type(weight) is nn.Parameter and weight.dim() == 4:
            yield weight


def channels_last_(module: nn.Module) -> nn.Module:
    """Lay convolution weights out as channels_last, in place; values and parameters stay the same.

    Models are made contiguous, because FSDP2 (`fully_shard`) refuses other parameters and DeepSpeed
    makes them contiguous again. Call this behind `.to(device)` and before the optimiser is made and
    DistributedDataParallel wraps the model. `load_state_dict` keeps the format, with `assign=True`
    it takes the file's; `copy.deepcopy`, `.to`, an average and the optimiser's moments keep it;
    `save_pretrained` writes contiguous weights.

    Args:
        module: A backbone, or anything that holds convolutions.

    Returns:
        The module.
    """
    for weight in _weights(module):
        if not weight.is_contiguous(memory_format=torch.channels_last):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return module


def contiguous_(module: nn.Module) -> nn.Module:
    """Undo `channels_last_`, in place: before `fully_shard`, `parameters_to_vector` and the like.

    Args:
        module: A backbone, or anything that holds convolutions.

    Returns:
        The module.
    """
    for weight in _weights(module):
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()
    return module
