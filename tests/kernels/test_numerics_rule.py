"""The numerics rule refuses what proves nothing; tests and benchmarks use the same one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdiff_kernels import _numerics


def ordinary() -> tuple[Tensor, Tensor, Tensor]:
    """(ours, eager's, float64's) with errors of the size of a rounding."""
    exact = torch.randn(64, dtype=torch.float64)
    return exact.bfloat16(), exact.bfloat16(), exact


def test_the_rule_passes_equal_errors() -> None:
    mine, eager, exact = ordinary()
    assert 0 < _numerics.check([mine, None], [eager, None], [exact, None]) <= 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("whose", "message"),
    [(0, "0 of 1 is not"), (1, "0 of 1 of eager is not"), (2, "0 of 1 in float64 is not")],
)
def test_a_number_that_is_not_finite_is_refused(whose: int, message: str, value: float) -> None:
    tensors = list(ordinary())
    tensors[whose] = tensors[whose].clone()
    tensors[whose][3] = value
    with pytest.raises(AssertionError, match=message):
        _numerics.check(*([tensor] for tensor in tensors))


def test_nan_in_all_three_is_refused() -> None:
    tensors = [tensor.index_fill(0, torch.tensor(3), torch.nan) for tensor in ordinary()]
    with pytest.raises(AssertionError, match="not finite"):
        _numerics.check(*([tensor] for tensor in tensors))


def test_where_eager_is_exact_and_the_truth_is_zero_any_error_is_refused() -> None:
    zero = torch.zeros(8)
    assert _numerics.check([zero], [zero], [zero.double()]) == 0
    with pytest.raises(AssertionError, match="inf times the 0 allowed"):
        _numerics.check([zero + 1e-3], [zero], [zero.double()])


def test_a_gradient_may_not_be_missing_and_dtype_and_shape_are_eagers() -> None:
    mine, eager, exact = ordinary()
    for wrong, message in (
        (None, "a gradient is missing"),
        (mine.float(), "is torch.float32"),
        (mine[:32], r"\(32,\); expected torch.bfloat16 \(64,\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            _numerics.check([wrong], [eager], [exact])


def test_a_larger_error_is_refused() -> None:
    mine, eager, exact = ordinary()
    with pytest.raises(AssertionError, match="RMS error"):
        _numerics.check([mine * 1.02], [eager], [exact])
    spoilt = mine.clone()
    spoilt[5] += 0.05
    with pytest.raises(AssertionError, match=r"maximum error|RMS error"):
        _numerics.check([spoilt], [eager], [exact])
