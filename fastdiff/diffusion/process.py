"""Diffusion processes: noising, training targets and conversions between predictions.

Legend: B batch; x_0 data; x_t noised data; eps noise; t the time that the network is given; a =
sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t), so that x_t = a x_0 + s eps and v = a eps - s x_0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule

Prediction = Literal["eps", "x0", "v"]


class Process(ABC):
    """x_t = a x_0 + s eps, and what the network is trained to predict of it.

    Args:
        prediction: what the network's output means. "eps": the noise (Eq. 4, all the paper's
            runs); "x0": the data; "v": a eps - s x_0 (Salimans and Ho 2022, section 4).

    Shapes: x_0, x_t, noise and out are (B, ...) alike and on one device; t is 0-d, (1,) or (B,), on
        that device.

    Raises:
        TypeError: t has a dtype without meaning here.
        ValueError: t, or a tensor beside it, has the wrong shape, or t is out of range. The range
            is checked on the CPU only: on a GPU it would cost a synchronisation.

    Numerics: computed and returned in float32 whatever the inputs' dtype and under autocast too
        (in float64 if an input is float64), from a and s computed in float64 and rounded once.
    """

    def __init__(self, prediction: Prediction = "eps") -> None:
        if prediction not in get_args(Prediction):
            names = get_args(Prediction)
            raise ValueError(
                f"{type(self).__name__}: prediction must be one of {names}, got {prediction!r}"
            )
        self.prediction: Prediction = prediction

    @abstractmethod
    def _noise_levels(self, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """a and s, (n, 2), for the n values of t."""

    def _coefficients(self, t: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """a and s for each sample, shaped to broadcast, then the tensors in computing dtype."""
        first, name = tensors[0], type(self).__name__
        for other in tensors[1:]:
            if other.shape != first.shape:
                raise ValueError(
                    f"{name}: tensors must have one shape, got "
                    f"{tuple(first.shape)} and {tuple(other.shape)}"
                )
        batch = first.shape[0]
        if t.ndim > 1 or t.numel() not in (1, batch):
            raise ValueError(f"{name}: t must be 0-d, (1,) or ({batch},), got {tuple(t.shape)}")
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        row = self._noise_levels(t.reshape(-1), first.device, dtype)
        a, s = row.view(-1, *[1] * (first.ndim - 1), 2).unbind(-1)
        return a, s, *(tensor.to(dtype) for tensor in tensors)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise data to step t: x_t = a x_0 + s eps (Eq. 2 in closed form).

        Args:
            x0: data, (B, ...).
            t: times.
            noise: standard normal, shaped as x0.

        Returns:
            x_t, shaped as x0, float32.

        Source: DDPM, Eq. 4; the argument of the network in the paper's Eq. 4, corrected.
        """
        a, s, x0, noise = self._coefficients(t, x0, noise)
        return a * x0 + s * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should put out for x_t = q_sample(x0, t, noise), float32."""
        a, s, x0, noise = self._coefficients(t, x0, noise)
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        return a * noise - s * x0

    def loss(self, out: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the network's output, per sample (Eq. 4).

        L = mean over channels and pixels of (target - out)^2. A mean where Eq. 4 has a sum, as
        every published code has it, so that the rate does not depend on the resolution.

        Args:
            out: the network's output at x_t = q_sample(x0, t, noise), (B, ...).
            x0, t, noise: as in q_sample.

        Returns:
            (B,) float32, differentiable in out.
        """
        target = self.target(x0, t, noise)
        if out.shape != target.shape:
            raise ValueError(
                f"{type(self).__name__}: out must have x0's shape {tuple(target.shape)}, "
                f"got {tuple(out.shape)}"
            )
        return (out.to(target.dtype) - target).square().flatten(1).mean(dim=1)

    def min_snr_weight(self, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Weights of `loss` that end its emphasis on nearly clean pictures (Hang et al. 2023).

        min(SNR, gamma) for a loss of x0, with SNR = a^2 / s^2; of the same error in eps or v, that
        over SNR or over SNR + 1.

        Args:
            t: (B,), as in q_sample.
            gamma: 5 in the paper.

        Returns:
            (B,) float32.
        """
        one = torch.ones(t.shape, device=t.device)
        a, s, one = self._coefficients(t, one)
        clean, noise = a.square(), s.square()
        if self.prediction == "eps":
            return (gamma * noise / clean).clamp(max=1.0)
        if self.prediction == "x0":
            return (clean / noise).clamp(max=gamma)
        return torch.minimum(clean, gamma * noise)  # a^2 + s^2 = 1

    def to_eps(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that an output of the network at x_t stands for.

        eps = out | (x_t - a out) / s | s x_t + a out, for prediction eps | x0 | v.

        Returns:
            eps, shaped as x_t, float32.
        """
        a, s, out, x_t = self._coefficients(t, out, x_t)
        if self.prediction == "eps":
            return out
        if self.prediction == "x0":
            return (x_t - a * out) / s
        return s * x_t + a * out

    def to_x0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data that an output of the network at x_t stands for.

        x_0 = (x_t - s out) / a | out | a x_t - s out, for prediction eps | x0 | v. From eps this
        amplifies the network's error by s / a: 157 at t = 999 of linear, 20,000 of cosine.

        Returns:
            x_0, shaped as x_t, float32.
        """
        a, s, out, x_t = self._coefficients(t, out, x_t)
        if self.prediction == "eps":
            return (x_t - s * out) / a
        if self.prediction == "x0":
            return out
        return a * x_t - s * out

    def to_v(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity v = a eps - s x_0 that an output of the network at x_t stands for.

        v = (out - s x_t) / a | (a x_t - out) / s | out, for prediction eps | x0 | v.

        Returns:
            v, shaped as x_t, float32.
        """
        a, s, out, x_t = self._coefficients(t, out, x_t)
        if self.prediction == "eps":
            return (out - s * x_t) / a
        if self.prediction == "x0":
            return (a * x_t - out) / s
        return out

    def eps_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise between x_0 and x_t: eps = (x_t - a x_0) / s, float32."""
        a, s, x0, x_t = self._coefficients(t, x0, x_t)
        return (x_t - a * x0) / s

    def shift_eps(self, out: Tensor, change: Tensor, t: Tensor) -> Tensor:
        """The output that stands for a noise which is `change` more than that of `out`.

        out + change | out - s change / a | out + change / a, for prediction eps | x0 | v.

        Returns:
            An output of the network, shaped as out, float32.
        """
        a, s, out, change = self._coefficients(t, out, change)
        if self.prediction == "eps":
            return out + change
        if self.prediction == "x0":
            return out - change * (s / a)
        return out + change / a

    def noise_std(self, x_t: Tensor, t: Tensor) -> Tensor:
        """s = sqrt(1 - alpha_bar_t), (B or 1, 1, ...) to broadcast over x_t, float32."""
        return self._coefficients(t, x_t)[1]


class DiffusionProcess(Process):
    """q(x_t | x_0) of a noise schedule in T steps, and what the network predicts of it.

    Two equations of the paper are misprinted; DDPM's are used. Eq. 3 prints sqrt(1 - alpha_t)
    under beta_t where DDPM has sqrt(1 - alpha_bar_t). Eq. 4 gives the network x_0 + sqrt(1 -
    alpha_bar_t) eps where DDPM has sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

    Args:
        schedule: the noise schedule.
        prediction: as in `Process`.

    t is int32 or int64, in steps 0..T-1. The schedule is a table, so a fractional t has no meaning
    here and is refused; only the models and `VPSDE` accept one. On a GPU an index out of range
    (negative too) stops the kernel. The tables move to each device once and stay there.
    """

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction = "eps") -> None:
        super().__init__(prediction)
        self.schedule = schedule
        table = torch.stack([schedule.alpha_bar.sqrt(), (1.0 - schedule.alpha_bar).sqrt()], dim=1)
        cpu = torch.device("cpu")
        # (T, 2): the columns are a and s.
        self._tables = {(cpu, dtype): table.to(dtype) for dtype in (torch.float32, torch.float64)}

    def __repr__(self) -> str:
        schedule = self.schedule
        return f"DiffusionProcess({schedule.name}, T={schedule.steps}, {self.prediction})"

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return self.schedule.steps

    def _noise_levels(self, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"DiffusionProcess: t must be int32 or int64, got {t.dtype}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= self.steps:
                raise ValueError(
                    f"DiffusionProcess: t must lie in 0..{self.steps - 1}, got {low}..{high}"
                )
        return self._table(device, dtype).index_select(0, t)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key not in self._tables:
            # A table made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                self._tables[key] = self._tables[torch.device("cpu"), dtype].to(device)
        return self._tables[key]
