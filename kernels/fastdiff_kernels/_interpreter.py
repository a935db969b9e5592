"""Triton's interpreter without the third of its time that it spends on preparing itself.

For every call of a device function it goes through `triton.language` and puts its own functions in
the place of those that compile. A kernel's launch has done so already, for all that the kernel
calls: once a launch is enough.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def patch_once_a_launch() -> None:
    """Speed the interpreter up, in this process; results are the same.

    Where a version of Triton has no such functions, it stays as slow as it is.
    """
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "GridExecutor"):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[str] = set()
    seen: dict[int, frozenset[str]] = {}  # the modules that a function's own module names

    def patch_what_is_not(fn: FunctionType) -> Any:
        names = fn.__globals__
        if id(names) not in seen:
            found = (v.__name__ for v in names.values() if v is tl or v is tl.core)
            seen[id(names)] = frozenset(found)
        if seen[id(names)] and seen[id(names)] <= done:
            return None
        done.update(seen[id(names)])
        return patch(fn)

    @functools.wraps(launch)
    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        done.clear()
        try:
            launch(self, *args, **options)
        finally:
            done.clear()

    interpreter._patch_lang = patch_what_is_not
    interpreter.GridExecutor.__call__ = launch_anew
