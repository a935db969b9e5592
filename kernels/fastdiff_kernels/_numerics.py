"""The numerics rule: what a back end's results are held to, in tests and before any benchmark.

`eager` is the op's reference in the dtype of the call, `exact` the same in float64 on the same
rounded inputs. For each result and each gradient: RMS error <= 1.5 times eager's + u * RMS(exact),
and maximum error <= 2 times eager's + u * maximum, u = 2^-24, 2^-12, 2^-9 for float32, float16,
bfloat16. A number that is not finite, ours or of one of the two others, breaks the rule: nothing
is proven by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


def check(
    got: Sequence[Tensor | None], eager: Sequence[Tensor | None], exact: Sequence[Tensor | None]
) -> float:
    """Hold results and gradients to the rule of the module.

    Args:
        got: of the call under test, in the call's dtype; None for a gradient that there is not.
        eager: of the reference, in the same dtype.
        exact: of the reference, in float64.

    Returns:
        The largest error over what is allowed, at most 1.

    Raises:
        AssertionError: the rule does not hold; names the tensor by its index.
    """
    worst = 0.0
    for index, (mine, plain, true) in enumerate(zip(got, eager, exact, strict=True)):
        what = f"tensor {index} of {len(got)}"
        if (mine is None) != (plain is None) or (mine is None) != (true is None):
            raise AssertionError(f"{what}: a gradient is missing")
        if mine is None or plain is None or true is None:
            continue
        if mine.dtype is not plain.dtype or mine.shape != plain.shape:
            raise AssertionError(
                f"{what} is {mine.dtype} {tuple(mine.shape)}; "
                f"expected {plain.dtype} {tuple(plain.shape)}"
            )
        if mine.numel() == 0:
            continue
        for whose, tensor in (("", mine), (" of eager", plain), (" in float64", true)):
            if not tensor.isfinite().all():
                raise AssertionError(f"{what}{whose} is not finite")
        error, usual = (mine.double() - true).abs(), (plain.double() - true).abs()
        for name, size, factor in (("RMS", rms, 1.5), ("maximum", torch.max, 2.0)):
            mistake = float(size(error))
            allowed = factor * float(size(usual)) + UNIT[mine.dtype] * float(size(true.abs()))
            # Where eager is exact and the truth is zero, nothing is allowed.
            ratio = mistake / allowed if allowed > 0 else (math.inf if mistake > 0 else 0.0)
            if not ratio <= 1:
                raise AssertionError(
                    f"{what}: {name} error {mistake:.3g} is {ratio:.2f} times the {allowed:.3g} "
                    f"allowed (eager: {float(size(usual)):.3g})"
                )
            worst = max(worst, ratio)
    return worst


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square."""
    return tensor.square().mean().sqrt()
