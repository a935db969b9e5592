from fastdiff_kernels.philox_normal.op import philox_bits, philox_normal

__all__ = ["philox_bits", "philox_normal"]
