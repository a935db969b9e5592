"""A CUDA driver that launches nothing: Triton's own launch path, measurable without a GPU.

A few lines of C stand in for libcuda.so.1. Triton compiles for a chip that is named, "loads" the
binary and calls its launcher as on a GPU; the driver's functions return success at once. The
kernels' tensors are CPU tensors, which nothing reads or writes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdiff_kernels import _launch

_SOURCE = r"""
#include <stdint.h>
#include <string.h>
#define OK(name, ...) int name(__VA_ARGS__) { return 0; }
OK(cuInit, unsigned flags)
OK(cuCtxSetCurrent, void *context)
OK(cuFuncSetAttribute, void *function, int attribute, int value)
OK(cuFuncSetCacheConfig, void *function, int config)
OK(cuCtxSetLimit, int limit, uint64_t value)
OK(cuModuleUnload, void *module)
OK(cuOccupancyMaxActiveClusters, int *n, void *function, void *config)
OK(cuTensorMapEncodeTiled, void *map)
OK(cuTensorMapEncodeIm2col, void *map)
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetLimit(uint64_t *value, int limit) { *value = 0; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  /* 75, 76: compute capability; 97: shared memory a block may ask for; 1: threads of a block */
  *value = attribute == 75 ? CAPABILITY / 10 : attribute == 76 ? CAPABILITY % 10
         : attribute == 97 ? 232448 : attribute == 8 ? 49152 : 1024;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;
  return 0;
}
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  memcpy(data, &pointer, 8);
  return 0;
}
uint64_t fastdiff_stub_launches = 0;
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  ++fastdiff_stub_launches;
  return 0;
}
"""


def _build(folder: Path, capability: int) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("stub_driver: no C compiler; Triton itself needs one")
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    flags = ["-O2", "-shared", "-fPIC", f"-DCAPABILITY={capability}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)


@contextlib.contextmanager
def stub_driver(family: str = "sm_90") -> Iterator[Any]:
    """Let Triton believe in a GPU of this family.

    For a process of its own, before any kernel was launched: libcuda stays loaded, and kernels that
    were compiled stay so. `_launch.chip` gives the family's chip, and ops take the triton back end
    with CPU tensors where it is asked for.

    Args:
        family: "sm_80", "sm_90" or "sm_100".

    Yields:
        A function that returns how many kernels the driver was asked to launch so far.
    """
    import ctypes

    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    capability = int(family[3:])
    with tempfile.TemporaryDirectory(prefix="fastdiff-stub-") as folder:
        _build(Path(folder), capability)
        # By its path, so that what is linked to libcuda.so.1 later finds it loaded.
        library = ctypes.CDLL(str(Path(folder) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        before = os.environ.get("TRITON_LIBCUDA_PATH")
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        nvidia.libcuda_dirs.cache_clear()
        before_active = None
        try:

            class Driver(nvidia.CudaDriver):
                def __init__(self) -> None:
                    super().__init__()
                    self.get_current_device = lambda: 0
                    self.set_current_device = lambda device: None
                    self.get_current_stream = lambda device: 0
                    self.get_device_capability = lambda device=0: divmod(capability, 10)

            before_active, driver._active = driver._active, Driver()
            launches = ctypes.c_uint64.in_dll(library, "fastdiff_stub_launches")
            with _launch.pretend(_launch.CHIPS[family]), _launch.stubbed():
                yield lambda: launches.value
        finally:
            driver._active = before_active
            os.environ.pop("TRITON_LIBCUDA_PATH")
            if before is not None:
                os.environ["TRITON_LIBCUDA_PATH"] = before
