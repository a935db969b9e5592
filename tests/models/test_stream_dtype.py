"""The dtype of the stream between blocks, in both families (docs/training.md says why)."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models import ASCEND, ASCENDConfig, IUViT, IUViTConfig
from fastdiff.nn import Checkpointed

LEVELS = {"channels": 16, "depth": 1, "multipliers": (1, 2), "attention_resolutions": (8,)}
MODELS = {
    "iuvit": lambda: IUViT(IUViTConfig(image_size=16, patch_size=4, dim=32, layers=3, head_dim=16)),
    "ascend": lambda: ASCEND(
        ASCENDConfig(image_size=16, head_dim=16, groups=8, window=4, **LEVELS)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("weights", "autocast", "stream"),
    [
        (torch.float32, False, torch.float32),
        (torch.float32, True, torch.bfloat16),
        (torch.bfloat16, False, torch.bfloat16),
    ],
)
def test_blocks_pass_on_the_dtype_of_the_computation(name, weights, autocast, stream):
    model = MODELS[name]().to(weights)
    found = []
    for part in model.modules():
        if isinstance(part, Checkpointed):
            part.register_forward_hook(lambda module, args, out: found.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(torch.randn(1, 3, 16, 16), 5)
    assert set(found) == {stream}
    assert y.dtype is torch.float32
