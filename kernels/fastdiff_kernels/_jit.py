"""Device functions that the Triton kernels share."""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastdiff_kernels import _interpreter

# Triton reads the same variable when a kernel is decorated.
INTERPRETS = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
if INTERPRETS.value:
    _interpreter.patch_once_a_launch()


@triton.jit
def dot(a, b, acc=None):  # type: ignore[no-untyped-def]
    """a @ b in float32, plus acc if there is one: the only way our kernels multiply matrices.

    float32 operands are multiplied as such (no TF32). In the interpreter bfloat16 is widened first:
    it would multiply the raw bits (triton issue 11584).
    """
    if INTERPRETS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee", out_dtype=tl.float32)


@tl.core.builtin
def on_amd(_semantic: Any = None) -> Any:
    """A constant: the code is made for a chip of AMD, whatever this machine has."""
    return tl.constexpr(_semantic.builder.options.backend_name == "hip")


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)) of float32, without overflow."""
    if INTERPRETS:
        return 1.0 / (1.0 + tl.exp(tl.where(x < -88.0, 88.0, -x)))  # NumPy warns of an overflow
    if on_amd():
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))
    # As accurate as Triton's own, and without its branches for denormal numbers, which are a third
    # of all instructions of a kernel that moves data through silu: exp2(-x * log2(e)), and 1 / y.
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e;"
        " add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    """x * sigmoid(x) of float32."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):  # type: ignore[no-untyped-def]
    """Derivative of silu at x, float32."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """x * Phi(x), by erf, of float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):  # type: ignore[no-untyped-def]
    """Derivative of gelu at x: Phi(x) + x * phi(x), float32."""
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def round_to(x, dtype):  # type: ignore[no-untyped-def]
    """float32 x in dtype, to nearest: how our kernels narrow.

    The interpreter would cut the bits that bfloat16 lacks (and its "rtne" loses carries), so there
    they are rounded first.
    """
    if INTERPRETS and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
