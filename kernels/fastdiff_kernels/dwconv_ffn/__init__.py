from fastdiff_kernels.dwconv_ffn.op import dwconv_ffn, dwconv_gelu

__all__ = ["dwconv_ffn", "dwconv_gelu"]
