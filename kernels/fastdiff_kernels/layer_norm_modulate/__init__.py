from fastdiff_kernels.layer_norm_modulate.op import layer_norm_modulate

__all__ = ["layer_norm_modulate"]
