"""Whole blocks under torch.compile(fullgraph=True): one graph, forward and backward, any batch."""

from __future__ import annotations

import pytest
import torch
from builders import make_ascend, make_iuvit, randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff import ops

BATCHES = (3, 5)


class Level(nn.Module):
    """One level of ASCEND: its blocks in the encoder, and in the decoder those that take its skips.

    Level 0 has ResBlocks; level 1 has Swin blocks, and attention over all pixels in the decoder.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        model = make_ascend(depth=1, context_dim=12)
        blocks = model.config.depth + 1  # of the decoder in a level, the lowest first
        first = (len(model.config.multipliers) - 1 - level) * blocks
        self.encoder = model.encoder.levels[level]
        self.decoder = model.decoder.blocks[first : first + blocks]

    def forward(
        self, x: Tensor, h: Tensor, emb: Tensor, context: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x from the level above, h from the one below; what goes up, and what goes down."""
        skips = [x]
        for block in self.encoder:
            skips.append(block(skips[-1], emb, (context, mask)))
        for block, skip in zip(self.decoder, skips[len(self.decoder) - 1 :: -1], strict=True):
            h = block(h, emb, (context, mask), skip)
        return h, skips[-1]


def ascend_level(level: int):
    side = 16 >> level

    def make(B: int) -> list[Tensor]:
        maps = [torch.randn(B, C, side, side) for C in (32, 64)]
        maps = [t.to(memory_format=torch.channels_last) for t in maps]
        return [*maps, torch.randn(B, 128), *text(B)]

    return Level(level), make


def text(B: int) -> list[Tensor]:
    mask = torch.ones(B, 7, dtype=torch.bool)
    mask[0, 4:] = False
    return [torch.randn(B, 7, 12), mask]


def iuvit_block():
    """An out-block: long skip, self-attention, cross-attention, FFN."""
    block = make_iuvit(context_dim=12).out_blocks[0]

    class WithGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, skip: Tensor, context: Tensor, mask: Tensor) -> Tensor:
            return self.block(x, (4, 4), 1, (context, mask), skip)

    def make(B: int) -> list[Tensor]:
        return [torch.randn(B, 17, 64), torch.randn(B, 17, 64), *text(B)]

    return WithGrid(), make


CASES = {
    "IU-ViT block": iuvit_block,
    "ASCEND level of ResBlocks": lambda: ascend_level(0),
    "ASCEND level of Swin blocks": lambda: ascend_level(1),
}


def step(module, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradient of every parameter and floating input."""
    outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((o * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() for o in outputs)
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # ResBlocks read no text
    return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_any_batch(case):
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, make = CASES[case]()
    randomize(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with ops.backend("reference"):
        for B in BATCHES:
            inputs = [t.requires_grad_() if t.is_floating_point() else t for t in make(B)]
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
            for mine, plain in zip(step(compiled, inputs), step(module, inputs), strict=True):
                scale = max(1.0, plain.abs().max().item())
                torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4 * scale)
            assert counter.frame_count == 1
    torch._dynamo.reset()
