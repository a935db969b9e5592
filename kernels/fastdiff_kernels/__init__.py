"""Fused ops for diffusion backbones; see the op table in kernels/README.md."""

from fastdiff_kernels._register import Explanation, backend, explain
from fastdiff_kernels.dwconv_ffn import dwconv_ffn, dwconv_gelu
from fastdiff_kernels.group_norm_silu import group_norm_silu
from fastdiff_kernels.layer_norm_modulate import layer_norm_modulate
from fastdiff_kernels.philox_normal import philox_bits, philox_normal
from fastdiff_kernels.window_attention import window_attention

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "__version__",
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
