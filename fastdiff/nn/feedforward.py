"""Feed-forward networks of the transformer blocks.

Letters: B batch, P prefix tokens, h w grid of patches, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdiff import ops


class MLP(nn.Module):
    """Linear D -> 4D, GELU (exact), Linear 4D -> D.

    Args:
        dim: D.
        ratio: Hidden width over D.
    """

    def __init__(self, dim: int, *, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
        """(B, P + h w, D) to the same; `grid` and `prefix` are not needed."""
        return self.fc2(self.act(self.fc1(x)))


class DWConvFFN(nn.Module):
    """The paper's DWConv-FFN: Linear, depth-wise 3x3 over the grid of patches, GELU, Linear.

    Tokens that are not patches have no place on the grid: they bypass the convolution. The GELU
    stands after the convolution. Both are readings; the paper leaves them open.

    Args:
        dim: D.
        ratio: Hidden width over D.

    Source: section 3.2; the convolution acts on the 4D hidden, which the published counts pin.
    """

    def __init__(self, dim: int, *, ratio: int = 4) -> None:
        super().__init__()
        hidden = ratio * dim
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
        """(B, P + h w, D) to the same; grid = (h, w), prefix = P."""
        return ops.dwconv_ffn(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.conv.weight,
            self.conv.bias,  # type: ignore[arg-type]
            self.fc2.weight,
            self.fc2.bias,
            grid=grid,
            prefix=prefix,
        )


FFN = {"dwconv": DWConvFFN, "mlp": MLP}
