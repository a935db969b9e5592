"""CUDA graphs of a model's forward: one for each shape of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.nn import ProjectedText

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]


class CudaCapture:
    """Records a call as a CUDA graph; all graphs share one memory pool.

    They may, because each one's result is copied out before another one runs.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Callable[[], None]) -> Replay:
        """Run `call` until its kernels are compiled, then record it; returns what replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call()
        self._pool = self._pool or graph.pool()
        return graph.replay


@dataclass
class _Graph:
    replay: Replay
    inputs: list[Tensor]
    results: list[Tensor]
    text: ProjectedText | None = None


class GraphedModel:
    """A backbone whose forward is recorded once for each shape and replayed from then on.

    Args:
        model: `model(x, t, text, y=y)` without host synchronisation or state.
        capture: Takes a call and returns what repeats it; default CUDA graphs.

    Numerics: Those of the model; the result is a copy of its own.
    """

    def __init__(self, model: Callable[..., Tensor], capture: Capture | None = None) -> None:
        self._model, self._capture = model, capture or CudaCapture()
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def __call__(
        self, x: Tensor, t: Tensor, text: ProjectedText | None = None, *, y: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), t (B,), text of the model's `project_text`, y (B,) labels."""
        given = [x, t, *([] if y is None else [y])]
        texts = [] if text is None else text.tensors()
        key = (
            y is None,
            None if text is None else (text.rows, *text.kv),
            *((i.shape, i.dtype, i.device, i.stride()) for i in [*given, *texts]),
        )
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._record(given, text)
        # The text is the same for all steps of a sample.
        if graph.text is not text:
            given, graph.text = [*given, *texts], text
        for static, new in zip(graph.inputs, given, strict=False):
            static.copy_(new)
        graph.replay()
        return graph.results[0].clone()

    def _record(self, given: list[Tensor], text: ProjectedText | None) -> _Graph:
        inputs = [tensor.clone() for tensor in given]
        own = None
        if text is not None:
            own = replace(
                text,
                kv={layer: kv.clone() for layer, kv in text.kv.items()},
                null={layer: out.clone() for layer, out in text.null.items()},
                mask=text.mask.clone(),
                pooled=text.pooled.clone(),
            )
        y = inputs[2] if len(inputs) > 2 else None
        results: list[Tensor] = []

        def call() -> None:
            results[:] = [self._model(inputs[0], inputs[1], own, y=y)]

        replay = self._capture(call)
        return _Graph(replay, [*inputs, *([] if own is None else own.tensors())], results, text)
