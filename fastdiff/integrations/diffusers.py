"""Our backbones as diffusers knows models, and a pipeline around them.

    from diffusers import DDIMPipeline, DDIMScheduler
    from fastdiff.integrations.diffusers import FastDiffModel

    unet = FastDiffModel.from_backbone(fastdiff.create_model("ascend_cifar10"))
    pipe = DDIMPipeline(unet, DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(folder)

Another process imports this module before `DDIMPipeline.from_pretrained(folder)`: diffusers imports
no module because a file names one. It writes this module's name into `model_index.json`, so it
stays where it is.

Letters: B batch, C channels, H W pixels, S text positions.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.diffusion import classifier_free
from fastdiff.models import MODELS, Backbone


class FastDiffModel(ModelMixin, ConfigMixin):
    """A backbone behind diffusers' call `unet(sample, timestep, ...).sample`.

    It holds the backbone's own layers, under the same state-dict keys. What takes a
    `UNet2DModel` or a `UNet2DConditionModel` by diffusers' conventions takes it: pipelines, save
    and load, training scripts.

    Args:
        model: Name of the backbone's class, a key of `fastdiff.models.MODELS`.
        fields: Fields of its configuration; None = all default.
        sample_size: Side of the image, or (H, W); of `fields`, written down for pipelines.
        in_channels: Channels of the image, likewise.
        out_channels: Channels of the output, likewise.

    Attributes:
        backbone: The plain model `model(x, t, context, ...)` on the same layers.

    Raises:
        ValueError: An unknown model or field, or a size that `fields` contradicts.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "CrossBlock", "FusedBlock", "ResBlock", "SwinBlock"]  # noqa: RUF012
    _repeated_blocks = _no_split_modules

    @register_to_config
    def __init__(
        self,
        model: str = "IUViT",
        fields: Mapping[str, Any] | None = None,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f"FastDiffModel: model={model!r}, expected one of {sorted(MODELS)}")
        self._adopt(MODELS[model].from_config(fields or {}))
        given = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
        }
        for name, value in self._sizes().items():
            other = given[name]
            if other is not None and other != value and list(_pair(other)) != list(_pair(value)):
                raise ValueError(f"FastDiffModel: {name}={other}, but fields gives {value}")
        self.register_to_config(**self._sizes())

    @classmethod
    def from_backbone(cls, backbone: Backbone) -> FastDiffModel:
        """Wrap a model; the weights are shared, not copied."""
        fields = dataclasses.asdict(backbone.config)
        with torch.device("meta"):
            self = cls(model=type(backbone).__name__, fields=fields)
        self._adopt(backbone)
        return self

    def _adopt(self, backbone: Backbone) -> None:
        # Two faces of one tree of layers: what is moved, cast, loaded or replaced in one is so in
        # the other. As a child of its own the backbone would put a prefix before every key.
        self.__dict__["backbone"] = backbone
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(backbone, name)
        self.training = backbone.training

    def _sizes(self) -> dict[str, Any]:
        config = self.backbone.config
        height, width = config.sides
        return {
            "sample_size": height if height == width else [height, width],
            "in_channels": config.in_channels,
            "out_channels": config.predicted_channels,
        }

    def train(self, mode: bool = True) -> FastDiffModel:
        """Training or evaluation mode, of both faces."""
        self.backbone.train(mode)
        super().train(mode)
        return self

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Compute each block's activations again in the backward pass."""
        if gradient_checkpointing_func is not None:
            raise ValueError(
                "FastDiffModel: gradient_checkpointing_func is given; its blocks checkpoint "
                "themselves, with torch's"
            )
        self.backbone.set_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations."""
        self.backbone.set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block computes its activations again."""
        return any(getattr(module, "checkpointing", False) for module in self.modules())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the process's target from a noised image.

        Args:
            sample: (B, C, H, W), image in [-1, 1] plus noise.
            timestep: Time in steps 0..999; int, float, or tensor of shape (), (1,) or (B,).
            encoder_hidden_states: (B, S, context_dim) text features.
            class_labels: (B,) int64.
            encoder_attention_mask: (B, S), bool or 0 and 1; a row of zeros = null condition.
            pooled: (B, context_dim), None = mean of the valid positions.
            cross_attention_kwargs, added_cond_kwargs: None or empty; pipelines pass them.
            return_dict: False for a tuple.

        Returns:
            `UNet2DOutput` with `sample` (B, out_channels, H, W), or a tuple of it.

        Raises:
            ValueError: A shape does not fit, or one of the two mappings holds something.
        """
        for name, extra in (
            ("cross_attention_kwargs", cross_attention_kwargs),
            ("added_cond_kwargs", added_cond_kwargs),
        ):
            if extra:
                raise ValueError(f"FastDiffModel: {name} has {sorted(extra)}, it takes none")
        mask = encoder_attention_mask
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"FastDiffModel: encoder_attention_mask has shape {tuple(mask.shape)}, expected "
                "(B, S): 1 for a valid position, no bias to be added"
            )
        out = self.backbone(
            sample,
            timestep,
            encoder_hidden_states,
            context_mask=None if mask is None else mask.bool(),
            pooled=pooled,
            y=class_labels,
        )
        return UNet2DOutput(sample=out) if return_dict else (out,)


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


class FastDiffPipeline(DiffusionPipeline):
    """Pictures from noise, labels or text with any of diffusers' variance-preserving schedulers.

    Unlike diffusers' own unconditional pipelines it scales the network's input as schedulers in
    sigma (Euler, Heun, ...) ask, and hands the text's mask on. Its null condition is the model's,
    the one of training.

    Args:
        unet: The model.
        scheduler: Any scheduler of diffusers whose process the model was trained for, its
            `prediction_type` being the model's.
        tokenizer: With `text_encoder`, what `prompt` needs.
        text_encoder: A T5 encoder of transformers.

    Raises:
        ValueError: A scheduler of flow matching or of EDM: they drive another process.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["tokenizer", "text_encoder"]  # noqa: RUF012

    def __init__(
        self, unet: Any, scheduler: Any, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        super().__init__()
        name, config = type(scheduler).__name__, scheduler.config
        foreign = "FlowMatch" in name or config.get("use_flow_sigmas", False)
        if foreign or "sigma_data" in config or name == "ScoreSdeVeScheduler":
            raise ValueError(
                f"FastDiffPipeline: {name} drives another process than x_t = sqrt(alpha_bar) x_0 + "
                "sqrt(1 - alpha_bar) eps in steps, which the model was trained for; for EDM's "
                "samplers see fastdiff.integrations.denoisers"
            )
        self.register_modules(
            unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder
        )

    def encode(self, prompt: str | Sequence[str], max_length: int = 256) -> tuple[Tensor, Tensor]:
        """Text to features (B, S, width) and mask (B, S) bool, S the longest prompt's length.

        Raises:
            ValueError: The pipeline was made without tokenizer or text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "FastDiffPipeline: prompt needs a tokenizer and a text_encoder; make the pipeline "
                "with them, or give prompt_embeds and prompt_mask"
            )
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(self._execution_device)
        with torch.no_grad():
            features = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return features, tokens.attention_mask.bool()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for each prompt, label or place in the batch.

        Args:
            prompt: Text, or one text a picture.
            prompt_embeds: (B, S, width) instead of `prompt`.
            prompt_mask: (B, S) bool, True = valid; None = all valid.
            class_labels: (B,) labels.
            batch_size: B, where no condition says it; default 1.
            height: Pixels; default the model's.
            width: Pixels; default the model's.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: s of out_u + s (out_c - out_u), the paper's Eq. 6; 1 = no guidance.
                It guides text, or labels where there is no text.
            eta: DDIM's.
            generator: Where noise comes from.
            latents: (B, C, H, W) standard normal noise to start from.
            output_type: "pil" | "np" (B, H, W, C) in [0, 1] | "pt" (B, C, H, W) in [0, 1].
            return_dict: False for a tuple.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: Conditions that contradict each other or that the model does not take.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"FastDiffPipeline: output_type={output_type!r}: pil, np or pt")
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("FastDiffPipeline: prompt and prompt_embeds are given, expected one")
        device, dtype = self._execution_device, self.unet.dtype
        if prompt is not None:
            prompt_embeds, prompt_mask = self.encode(prompt)
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=device)
        conditions = (prompt_embeds, class_labels, latents)
        sizes = {len(c) for c in conditions if c is not None} or {batch_size or 1}
        if batch_size is not None:
            sizes.add(batch_size)
        if len(sizes) > 1:
            raise ValueError(f"FastDiffPipeline: conditions of batches {sorted(sizes)}")
        config = self.unet.config
        default = _pair(config.sample_size)
        shape = (sizes.pop(), config.in_channels, height or default[0], width or default[1])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"FastDiffPipeline: latents have shape {tuple(latents.shape)}, expected {shape}"
            )
        x = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        model = self._guided(guidance_scale, prompt_embeds, prompt_mask, class_labels)
        takes = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        options = {name: value for name, value in options.items() if name in takes}
        variance = "learned" in str(self.scheduler.config.get("variance_type"))
        for t in self.progress_bar(self.scheduler.timesteps):
            out = model(self.scheduler.scale_model_input(x, t).to(dtype), t)
            if not variance:
                out = out[:, : shape[1]]
            x = self.scheduler.step(out, t, x, **options).prev_sample
        image: Any = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    def _guided(
        self, scale: float, embeds: Tensor | None, mask: Tensor | None, y: Tensor | None
    ) -> Any:
        """The network as a callable (x, t) with its condition, guided where scale is not 1."""

        def call(x: Tensor, t: Tensor, context: Tensor | None = None, **conditions: Any) -> Tensor:
            names = {"y": "class_labels", "context_mask": "encoder_attention_mask"}
            given = {names.get(k, k): v for k, v in conditions.items() if v is not None}
            if context is not None:
                given["encoder_hidden_states"] = context
            return self.unet(x, t, **given, return_dict=False)[0]

        if embeds is not None:
            embeds = embeds.to(self._execution_device, self.unet.dtype)
            mask = None if mask is None else mask.to(embeds.device).bool()
            return classifier_free(call, scale, context=embeds, context_mask=mask, y=y)
        if y is None or scale == 1.0:
            if scale != 1.0:
                raise ValueError(
                    f"FastDiffPipeline: guidance_scale={scale} without a prompt or labels"
                )
            return lambda x, t: call(x, t, y=y)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            conditional = call(x, t, y=y).float()
            null = call(x, t).float()
            return null + scale * (conditional - null)

        return guided


__all__ = ["FastDiffModel", "FastDiffPipeline"]
