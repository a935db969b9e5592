"""Exponential moving average of weights, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average of parameters: shadow = d shadow + (1 - d) parameter, after each step.

    d = decay, or with warmup min(decay, (1 + n) / (10 + n)) at update n = 0, 1, .. The warm-up
    lets a short run's average forget the initial weights; the paper's runs are long and use the
    flat 0.9999. d is a function of n alone, so a resumed run averages exactly as an unbroken one.

    Shadows are float32 also of bf16 parameters: at 0.9999 a bf16 average never moves, because each
    update is smaller than its last digit. Only parameters are averaged: the models here keep no
    running statistics, and buffers stay the module's own.

    Args:
        params: (name, tensor) pairs such as `module.named_parameters()`, or bare tensors, which are
            then named "0", "1", .. (float32 partitions of a sharded optimiser, for instance).
        decay: per optimiser step, in [0, 1).
        warmup: see above.

    Raises:
        ValueError: decay out of range, no parameters, a name twice, or an empty tensor (what ZeRO
            stage 3 leaves of a parameter).
        TypeError: a tensor that is not floating point.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor] | Tensor],
        decay: float = 0.9999,
        *,
        warmup: bool = False,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.warmup = warmup
        self._swapped = False
        self._params: dict[str, Tensor] = {}
        for index, item in enumerate(params):
            name, tensor = (str(index), item) if isinstance(item, Tensor) else item
            if name in self._params:
                raise ValueError(f"EMA: the name {name!r} came twice")
            if not tensor.is_floating_point():
                raise TypeError(f"EMA: {name} must be floating point, got {tensor.dtype}")
            if tensor.numel() == 0:
                raise ValueError(
                    f"EMA: {name} is empty, shape {tuple(tensor.shape)}; "
                    "under ZeRO stage 3 give the float32 partitions instead"
                )
            self._params[name] = tensor
        if not self._params:
            raise ValueError("EMA: no parameters given")
        # A copy also where the parameter is float32 already.
        self.shadows = {
            name: tensor.detach().to(torch.float32, copy=True)
            for name, tensor in self._params.items()
        }

    def decay_at(self, n: int) -> float:
        """The decay d of update n, counted from 0."""
        if n < 0:
            raise ValueError(f"EMA: the update's number must be at least 0, got {n}")
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, n: int, tensors: Sequence[Tensor] | None = None) -> None:
        """Move every shadow towards its parameter, in place.

        Args:
            n: optimiser steps made before the one just made; 0 at the first update.
            tensors: values to average instead of the parameters given at construction, in their
                order and shapes (float32 master weights, say).

        Raises:
            ValueError: n is negative, or the tensors' number or shapes differ.
            RuntimeError: called inside `applied`, where the module holds the average itself.
        """
        self._refuse_while_applied("update")
        shadows = list(self.shadows.values())
        values = [v.detach() for v in (self._params.values() if tensors is None else tensors)]
        if [v.shape for v in values] != [s.shape for s in shadows]:
            raise ValueError(
                f"EMA: update needs {len(shadows)} tensors of the shadows' shapes, "
                f"got {[tuple(v.shape) for v in values]}"
            )
        weight = 1.0 - self.decay_at(n)
        pairs = list(zip(shadows, values, strict=True))
        same = [(s, v) for s, v in pairs if v.dtype == torch.float32]
        if same:
            torch._foreach_lerp_([s for s, _ in same], [v for _, v in same], weight)
        # One float32 copy of a bf16 parameter at a time, not of all of them.
        for shadow, value in pairs:
            if value.dtype != torch.float32:
                shadow.lerp_(value.float(), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows by name, float32, not copied. The step is the trainer's to save."""
        self._refuse_while_applied("state_dict")
        return dict(self.shadows)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy saved shadows in; names, shapes and float32 must agree.

        Raises:
            ValueError: missing or unexpected names, or another shape.
            TypeError: a tensor that is not float32.
        """
        self._refuse_while_applied("load_state_dict")
        self._check_names(state.keys(), "the saved state")
        for name, shadow in self.shadows.items():
            value = state[name]
            if value.shape != shadow.shape:
                raise ValueError(
                    f"EMA: {name} must be {tuple(shadow.shape)}, got {tuple(value.shape)}"
                )
            if value.dtype != torch.float32:
                raise TypeError(f"EMA: {name} must be float32, got {value.dtype}")
        for name, shadow in self.shadows.items():
            shadow.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged weights into a module, rounded to its parameters' dtype.

        Raises:
            ValueError: the module's parameters have other names or shapes. Parameters that are
                frozen (requires_grad False) may be absent from the average.
        """
        self._refuse_while_applied("copy_to")
        for param, shadow in self._pairs(module):
            param.copy_(shadow)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """Run a block with the averaged weights in the module, then restore it, errors or not.

        float32 parameters trade places with their shadows, one tensor at a time, so no second copy
        of the weights is held; of other dtypes a copy in that dtype is. While inside, `update`,
        `state_dict`, `load_state_dict` and `copy_to` raise RuntimeError.

        Raises:
            ValueError: as `copy_to`.
            RuntimeError: already applied.
        """
        self._refuse_while_applied("applied")
        pairs = self._pairs(module)
        saved: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._swapped = True
        try:
            with torch.no_grad():
                for param, shadow in pairs:
                    if param.dtype == torch.float32:
                        _swap(param, shadow)
                        saved.append((param, shadow, None))
                    else:
                        saved.append((param, shadow, param.detach().clone()))
                        param.copy_(shadow)
            yield module
        finally:
            with torch.no_grad():
                for param, shadow, original in saved:
                    if original is None:
                        _swap(param, shadow)
                    else:
                        param.copy_(original)
            self._swapped = False

    def _pairs(self, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        params = dict(module.named_parameters())
        wanted = [n for n, p in params.items() if p.requires_grad or n in self.shadows]
        self._check_names(wanted, "the module")
        for name, shadow in self.shadows.items():
            if params[name].shape != shadow.shape:
                raise ValueError(
                    f"EMA: {name} must be {tuple(shadow.shape)}, got {tuple(params[name].shape)}"
                )
        return [(params[name], shadow) for name, shadow in self.shadows.items()]

    def _check_names(self, names: Iterable[str], where: str) -> None:
        given = set(names)
        missing, extra = sorted(self.shadows.keys() - given), sorted(given - self.shadows.keys())
        if missing or extra:
            raise ValueError(
                f"EMA: {where} does not fit the average: {len(missing)} missing "
                f"{missing[:5]}, {len(extra)} unexpected {extra[:5]}"
            )

    def _refuse_while_applied(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"EMA: {what} inside `applied`: the module holds the average")


def _swap(a: Tensor, b: Tensor) -> None:
    old = a.detach().clone()
    a.copy_(b)
    b.copy_(old)
