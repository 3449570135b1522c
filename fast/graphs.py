"""Whole episodes as CUDA graphs: recorded once, then replayed by a single launch instead of thousands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from episode import Episode

WARM_UP = 3  # ordinary episodes before the recording: libraries make their workspaces, Adam its moments


def step_on_device(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """``episode.step_if_finite`` without waiting for the device: a fused Adam reads the flag there."""
    optimizer.found_inf = (~finite).float()
    optimizer.step()


class Captured:
    """A function of an episode, recorded as a CUDA graph after ``WARM_UP`` calls and replayed from then on.

    The same code runs either way, and the warm-up counts: training learns from its first episodes, too. Whatever the function
    reads and changes besides the episode (parameters, moments, running statistics) must keep its place in memory.

    Args:
        function: (Episode) -> tuple of tensors; it must not wait for the GPU.
        optimizer: the one whose step ``function`` takes, if any.
    """

    def __init__(self, function: Callable[[Episode], tuple[Tensor, ...]], optimizer: torch.optim.Optimizer | None = None):
        self.function, self.optimizer = function, optimizer
        self.stream = torch.cuda.Stream()  # for warm-up and recording: workspaces made by the first serve the second
        self.calls, self.failed = 0, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, episode: Episode) -> tuple[Tensor, ...]:
        """The function's results, on the current stream.

        Raises:
            ValueError: this episode's shapes differ from the recorded one's.
        """
        if self.graph is None and self.calls >= WARM_UP and not self.failed:
            self._record(episode)
        self.calls += 1
        if self.graph is None:
            return self._ordinarily(episode)
        for place, tensor in zip(self.inputs, episode, strict=True):
            if place.shape != tensor.shape:
                raise ValueError(f"an episode with {list(tensor.shape)}, but the graph was recorded with {list(place.shape)}")
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)

    def _ordinarily(self, episode: Episode) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.function(episode)
        current.wait_stream(self.stream)
        return tuple(t.clone() for t in results)

    def _record(self, episode: Episode) -> None:
        self.inputs = Episode(*(t.clone() for t in episode))
        graph = torch.cuda.CUDAGraph()
        try:
            # The thread that pins memory for the data pipeline keeps running, so only this thread's calls are watched.
            how = {"stream": self.stream, "capture_error_mode": "thread_local"}
            with _capturable(self.optimizer), torch.cuda.graph(graph, **how):
                self.outputs = self.function(self.inputs)
        except RuntimeError as e:
            self.failed = True
            tqdm.write(f"no CUDA graph, so episodes run in the ordinary, slower way: {str(e).splitlines()[0]}")
        else:
            self.graph = graph


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer | None):
    """Adam requires this flag while it is recorded, and warns about it at any other time."""
    groups = [] if optimizer is None else optimizer.param_groups
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
