"""A backbone as the denoiser that k-diffusion's and EDM's samplers call.

Both add noise without shrinking the data, x = x_0 + sigma eps, and ask for the denoised x_0. The
network knows x_t = a x_0 + s eps in steps 0..999: with a = 1 / sqrt(1 + sigma^2) and s = sigma a it
is x_t = a x, at the step whose noise is sigma. Neither package is needed here.

Letters: B batch, C channels, H W pixels, T steps; a and s as above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from fastdiff.diffusion import NoiseSchedule, Prediction


class SigmaSchedule(Protocol):
    """Which sigma a time in steps has, and back."""

    sigma_min: float
    sigma_max: float

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Steps, float64, shaped as sigma."""

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma, float64, shaped as t."""


class DiscreteSigmas:
    """The sigmas of a noise schedule, between its steps linear in log sigma.

    sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)

    Args:
        schedule: What the model was trained with.
        quantize: Give the nearest step (in log sigma) instead of a fraction between two.

    Attributes:
        sigma_min, sigma_max: The ends.

    Numerics: a float64 table, moved to each device once; casting the model leaves it alone.
    """

    def __init__(self, schedule: NoiseSchedule, *, quantize: bool = False) -> None:
        self.quantize = quantize
        log_sigmas = -0.5 * schedule.snr.log()
        self._tables = {log_sigmas.device: log_sigmas}
        self.sigma_min, self.sigma_max = log_sigmas[[0, -1]].exp().tolist()

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Steps 0..T-1, float64; a sigma beyond the ends is taken as the end."""
        table = self._table(sigma.device)
        log_sigma = sigma.double().log()
        high = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, len(table) - 1)
        low = table[high - 1]
        t = (high - 1) + ((log_sigma - low) / (table[high] - low)).clamp(0, 1)
        return t.round() if self.quantize else t

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma of steps 0..T-1, fractions allowed."""
        table = self._table(t.device)
        t = t.double().clamp(0, len(table) - 1)
        low = t.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], t - low).exp()


class ContinuousSigmas:
    """The sigmas of the continuous VP-SDE, whose networks see 999 u for the time u in [0, 1].

    sigma(u) = sqrt(exp(beta_d u^2 / 2 + beta_min u) - 1), beta_d = beta_max - beta_min

    Args:
        beta_min: Rate at u = 0.
        beta_max: Rate at u = 1.
        u_min: Smallest time that samplers visit; U-ViT's and the paper's samplers: 1e-3.

    Attributes:
        sigma_min, sigma_max: Of u_min and of 1.

    Source: Song et al. 2021; EDM (Karras et al. 2022), Table 1, column VP.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, u_min: float = 1e-3
    ) -> None:
        if not (0 < beta_min < beta_max and 0 < u_min < 1):
            raise ValueError(
                f"ContinuousSigmas: beta_min={beta_min}, beta_max={beta_max}, u_min={u_min}; "
                "expected 0 < beta_min < beta_max and 0 < u_min < 1"
            )
        self.beta_min, self.beta_d = beta_min, beta_max - beta_min
        ends = self.t_to_sigma(torch.tensor([999.0 * u_min, 999.0], dtype=torch.float64)).tolist()
        self.sigma_min, self.sigma_max = ends

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """999 u, float64."""
        grown = torch.log1p(sigma.double() ** 2)
        u = (self.beta_min**2 + 2 * self.beta_d * grown).sqrt() - self.beta_min
        return 999 * u / self.beta_d

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma of 999 u."""
        u = t.double() / 999
        return torch.expm1(0.5 * self.beta_d * u**2 + self.beta_min * u).sqrt()


def _schedule(schedule: NoiseSchedule | SigmaSchedule, quantize: bool) -> SigmaSchedule:
    if isinstance(schedule, NoiseSchedule):
        return DiscreteSigmas(schedule, quantize=quantize)
    if quantize and not getattr(schedule, "quantize", False):
        raise ValueError("denoiser: quantize=True needs a NoiseSchedule, whose steps are whole")
    return schedule


class KDenoiser(nn.Module):
    """k-diffusion's convention: `model(x, sigma, **extra)` gives the denoised x_0.

    Args:
        model: model(x, t, **extra) -> the prediction, t (B,) in steps; a backbone of ours, or any
            callable. Channels beyond x's are a learned variance, which is dropped.
        schedule: What it was trained with: a `NoiseSchedule`, or `ContinuousSigmas`.
        prediction: "eps" | "x0" | "v".
        quantize: Ask the network at whole steps alone.

    Attributes:
        sigma_min, sigma_max: Ends of the schedule.
        inner_model: `model`.

    Raises:
        ValueError: an unknown prediction; quantize without whole steps.

    Source: crowsonkb/k-diffusion's external denoisers for the convention.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: NoiseSchedule | SigmaSchedule,
        prediction: Prediction = "eps",
        *,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(
                f"{type(self).__name__}: prediction={prediction!r}, expected one of "
                f"{get_args(Prediction)}"
            )
        self.inner_model = model
        self.prediction: Prediction = prediction
        self.schedule = _schedule(schedule, quantize)

    @property
    def sigma_min(self) -> float:
        """Smallest sigma the network was trained for."""
        return self.schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        """Largest sigma the network was trained for."""
        return self.schedule.sigma_max

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Steps, float64."""
        return self.schedule.sigma_to_t(sigma)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma, float64."""
        return self.schedule.t_to_sigma(t)

    def get_sigmas(self, steps: int) -> Tensor:
        """(steps + 1,) float32 for k-diffusion's samplers: even in t, the largest first, then 0.

        Raises:
            ValueError: steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"{type(self).__name__}: steps must be at least 1, got {steps}")
        ends = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64)
        first, last = self.sigma_to_t(ends).tolist()
        t = torch.linspace(first, last, steps, dtype=torch.float64)
        sigmas = self.t_to_sigma(t)
        return torch.cat([sigmas, sigmas.new_zeros(1)]).float()

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """Denoise.

        Args:
            x: (B, C, H, W), x_0 + sigma eps.
            sigma: (B,), (1,) or 0-d, above 0.
            **extra: Handed to the model.

        Returns:
            x_0 as the network sees it, (B, C, H, W) in x's dtype.
        """
        sigma = sigma.reshape(-1).expand(x.shape[0])
        t = self.sigma_to_t(sigma).to(torch.float32)
        wide = torch.promote_types(x.dtype, torch.float32)
        sigma = sigma.to(wide).view(-1, *[1] * (x.ndim - 1))
        a = (1 + sigma**2).rsqrt()
        out = self.inner_model((a * x).to(x.dtype), t, **extra)[:, : x.shape[1]].to(wide)
        if self.prediction == "eps":
            out = x - sigma * out
        elif self.prediction == "v":
            out = a * (a * x - sigma * out)
        return out.to(x.dtype)


class EDMDenoiser(KDenoiser):
    """EDM's convention: `net(x, sigma, class_labels)` gives the denoised x_0, in float32.

    Args:
        model, schedule, prediction, quantize: as in `KDenoiser`.
        img_resolution: Pixels of a side; None: the model's.
        img_channels: Channels; None: the model's.
        label_dim: Number of labels; None: the model's, 0 = none.

    Attributes:
        sigma_min, sigma_max: Ends of the schedule.
        img_resolution, img_channels, label_dim: As above.

    Raises:
        ValueError: one of the three sizes is None and the model has no `config` that says it.

    Source: EDM (Karras et al. 2022), section 5 and its samplers for the convention.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: NoiseSchedule | SigmaSchedule,
        prediction: Prediction = "eps",
        *,
        quantize: bool = False,
        img_resolution: int | None = None,
        img_channels: int | None = None,
        label_dim: int | None = None,
    ) -> None:
        super().__init__(model, schedule, prediction, quantize=quantize)
        config = getattr(model, "config", None)
        if config is None and None in (img_resolution, img_channels):
            raise ValueError(
                "EDMDenoiser: the model has no config; give img_resolution and img_channels"
            )
        if img_resolution is None:
            img_resolution = max(config.sides)  # type: ignore[union-attr]
        if img_channels is None:
            img_channels = config.in_channels  # type: ignore[union-attr]
        if label_dim is None:
            label_dim = getattr(config, "num_classes", None) or 0
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim = label_dim

    def round_sigma(self, sigma: float | Tensor | list[float]) -> Tensor:
        """The nearest sigma at which the network can be asked: sigma itself unless quantized."""
        sigma = torch.as_tensor(sigma)
        if not getattr(self.schedule, "quantize", False):
            return sigma
        return self.t_to_sigma(self.sigma_to_t(sigma)).to(sigma)

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **extra: Any
    ) -> Tensor:
        """Denoise.

        Args:
            x: (B, C, H, W), any floating dtype; computed in float32.
            sigma: (B,), (1,), 0-d, or of the shape (B, 1, 1, 1).
            class_labels: (B, label_dim) one-hot, a row of zeros = no label; or (B,) int64.
            **extra: Handed to the model; `force_fp32`, EDM's own, is left out.

        Returns:
            (B, C, H, W) float32.

        Raises:
            ValueError: class_labels of another shape, or where label_dim is 0.
        """
        extra.pop("force_fp32", None)
        if class_labels is not None:
            extra["y"] = self._labels(class_labels)
        return super().forward(x.to(torch.float32), sigma, **extra)

    def _labels(self, labels: Tensor) -> Tensor:
        if self.label_dim == 0:
            raise ValueError("EDMDenoiser: class_labels given, but label_dim is 0")
        if labels.ndim == 2 and labels.shape[1] == self.label_dim:
            return torch.where(labels.any(1), labels.argmax(1), self.label_dim)
        if labels.ndim == 1 and not labels.is_floating_point():
            return labels
        raise ValueError(
            f"EDMDenoiser: class_labels has shape {tuple(labels.shape)}, expected "
            f"(B, {self.label_dim}) one-hot or (B,) int64"
        )


__all__ = ["ContinuousSigmas", "DiscreteSigmas", "EDMDenoiser", "KDenoiser", "SigmaSchedule"]
