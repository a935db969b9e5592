"""The fused ops, and the choice of what runs them.

Ops: `window_attention`, `dwconv_gelu`, `dwconv_ffn`, `group_norm_silu`, `layer_norm_modulate`.
Each is a plain function of tensors with a backward, works under `torch.compile` and autocast, and
says in its docstring what it computes. `philox_normal` and `philox_bits` make random numbers from
seeds, and have no backward.

`backend(name)`, as a `with` or as a call, chooses "reference", "native" (CPU), "triton" (GPU) or
"auto", the default; the environment variable FASTDIFF_BACKEND does so for a whole run.
`explain(op, *args, **kwargs)` tells which back end a call takes and why each other one does not:

    >>> from fastdiff import ops
    >>> print(ops.explain(ops.group_norm_silu, x, weight, bias, num_groups=32))
"""

from fastdiff_kernels import (
    Explanation,
    backend,
    dwconv_ffn,
    dwconv_gelu,
    explain,
    group_norm_silu,
    layer_norm_modulate,
    philox_bits,
    philox_normal,
    window_attention,
)

__all__ = [
    "Explanation",
    "backend",
    "dwconv_ffn",
    "dwconv_gelu",
    "explain",
    "group_norm_silu",
    "layer_norm_modulate",
    "philox_bits",
    "philox_normal",
    "window_attention",
]
