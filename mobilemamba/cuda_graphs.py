"""Forward passes on a GPU as CUDA graphs: one launch for all of their kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = 8
"""Shapes of images for which a network keeps a graph."""


@dataclass
class _Captured:
    x: Tensor
    graph: torch.cuda.CUDAGraph
    result: Tensor


class CudaGraphs:
    """The graphs of one network, a graph for each shape of its images.

    The first call with a shape computes once, which compiles what is not yet compiled, and captures. Later ones copy
    the images into the graph's own, in their type and layout, replay it and return a copy of its result. The first
    :data:`SHAPES` shapes have graphs, which share their memory; other shapes run kernel by kernel, as do images that
    take gradients, calls under ``torch.compile`` and calls within a capture of the caller's.

    Any thread may call it, on any stream: calls wait for each other, on the CPU while they launch and on the GPU until
    the one before is done. Hooks run at a capture, not at a replay. Copies and files of a network hold no graphs and
    capture anew.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # behind the last replay

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[()]]:
        return CudaGraphs, ()

    def clear(self) -> None:
        """Forget every graph: parameters have moved, or layers have changed."""
        with self._lock:
            self._captured.clear()

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
        """``function(x)``; the graphs' images are of ``dtype``, channels-last."""
        if torch.compiler.is_compiling() or not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
            return function(x)
        shape = tuple(x.shape)
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad(), self._lock:
            known = shape in self._captured
            if not (known or len(self._captured) < SHAPES) or torch.cuda.is_current_stream_capturing():
                return function(x)
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            stream.wait_event(self._done)
            if not known:
                self._captured[shape] = self._capture(function, x, dtype)
            captured = self._captured[shape]
            captured.x.copy_(x)
            captured.graph.replay()
            result = captured.result.clone()
            self._done.record(stream)
            return result

    def _capture(self, function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> _Captured:
        images = torch.zeros_like(x, dtype=dtype, memory_format=torch.channels_last)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.autocast("cuda", enabled=False):
            with torch.cuda.stream(side):
                function(images)
            pool = next((c.graph.pool() for c in self._captured.values()), None)
            # What other threads do meanwhile on the GPU is none of the capture's business.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = function(images)
        torch.cuda.current_stream().wait_stream(side)
        return _Captured(images, graph, result)
