"""Whole episodes as CUDA graphs: recorded once, then replayed by a single launch instead of
thousands.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from episode import Episode

WARM_UP = (
    3  # ordinary episodes before the recording: libraries make their workspaces, Adam its moments
)
CHECKED = 2  # replays that are compared with the ordinary way: a number that was baked in shows in the second


def step_without_sync(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """``episode.step_if_finite`` without waiting for the device: a fused Adam reads the flag there."""
    optimizer.found_inf = (~finite).float()
    optimizer.step()


class CUDAGraphFunction:
    """A function of an episode, recorded as a CUDA graph after ``WARM_UP`` calls and replayed from
    then on.

    The same code runs either way, and the warm-up counts: training learns from its first episodes,
    too. All calls read the episode from the same memory, so that libraries choose the same
    algorithms before, during and after the recording.

    The graph checks itself. Its first ``CHECKED`` replays start from the same state as the ordinary
    way and must reach the same bits, results and state; later ones only run while everything in
    ``modules`` and ``optimizer`` lies where it lay at the recording. Otherwise the graph is
    dropped, a line says why, and episodes run in the ordinary way.

    Args:
        function: (Episode) -> tuple of tensors; it must not wait for the GPU.
        modules: all those that ``function`` reads or changes.
        optimizer: the one whose step ``function`` takes, if any.
    """

    def __init__(
        self,
        function: Callable[[Episode], tuple[Tensor, ...]],
        modules: Iterable[nn.Module] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.function, self.modules, self.optimizer = function, tuple(modules), optimizer
        self.stream = (
            torch.cuda.Stream()
        )  # for warm-up and recording: workspaces made by the first serve the second
        self.calls = 0
        self.inputs: Episode | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, episode: Episode) -> tuple[Tensor, ...]:
        """The function's results, on the current stream.

        Raises:
            ValueError: this episode's shapes differ from the first one's.
        """
        self._load(episode)
        self.calls += 1
        if self.calls == WARM_UP:
            with _waits_reported():
                return self._ordinarily()
        if self.calls == WARM_UP + 1:
            self._record()
        if self.graph is not None and self._addresses() != self.addresses:
            self._give_up("parameters or moments have moved in memory since it was recorded")
        if self.graph is None:
            return self._ordinarily()
        if self.calls <= WARM_UP + CHECKED:
            return self._checked()
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)

    def _load(self, episode: Episode) -> None:
        if self.inputs is None:
            self.inputs = Episode(*(t.clone() for t in episode))
            return
        for place, tensor in zip(self.inputs, episode, strict=True):
            if place.shape != tensor.shape:
                raise ValueError(
                    f"an episode with {list(tensor.shape)}, but the first one had {list(place.shape)}"
                )
            place.copy_(tensor, non_blocking=True)

    def _ordinarily(self) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.function(self.inputs)
        current.wait_stream(self.stream)
        return tuple(t.clone() for t in results)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # The thread that pins memory for the data pipeline keeps running, so only this thread's
        # calls are watched.
        how = {"stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            # A capture whose end fails leaves its stream the current one; the outer context does
            # not.
            with (
                _uncollected(),
                _capturable(self.optimizer),
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, **how),
            ):
                self.outputs = self.function(self.inputs)
        except RuntimeError as e:
            cause: BaseException = e
            while (
                cause.__context__ is not None
            ):  # what went wrong first, not what it led to at the end of the capture
                cause = cause.__context__
            self._give_up(next(iter(str(cause).splitlines()), type(cause).__name__))
        else:
            self.graph, self.addresses = graph, self._addresses()

    def _checked(self) -> tuple[Tensor, ...]:
        """The ordinary way's results and state, with which a replay from the same state and inputs
        is compared.
        """
        before = self._copies()
        results = self._ordinarily()
        after = self._copies()
        _put(before, self._state())
        self.graph.replay()
        if not all(map(_same_bits, (*self.outputs, *self._state()), (*results, *after))):
            _put(after, self._state())
            self._give_up("a replayed episode differs from the same episode in the ordinary way")
        return results

    @torch.no_grad()  # or autograd would remember parameters on the stream of the copies
    def _copies(self) -> list[Tensor]:
        return [t.clone() for t in self._state()]

    def _state(self) -> list[Tensor]:
        """What lasts from one call to the next: parameters, buffers, moments."""
        kept = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return kept + [
            t
            for of_one in (self.optimizer.state.values() if self.optimizer else ())
            for t in of_one.values()
        ]

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in self._state()]

    def _give_up(self, why: str) -> None:
        self.graph = self.outputs = None
        tqdm.write(f"no CUDA graph, so episodes run in the ordinary, slower way: {why}")


@torch.no_grad()
def _put(values: list[Tensor], places: list[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike ``torch.equal``, this tells -0 from 0, and NaN is itself."""
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collect garbage now, and none until the end: an old graph that is destroyed during a capture
    invalidates the new one.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Adam requires this flag while it is recorded, and warns about it at any other time."""
    groups = [] if optimizer is None else optimizer.param_groups
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


@contextlib.contextmanager
def _waits_reported() -> Iterator[None]:
    """Write a line if something in here makes the host wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    if waits:
        where = f"{waits[0].filename}:{waits[0].lineno}"
        tqdm.write(
            f"an episode waits for the GPU {len(waits)} times, which costs speed; first at {where}"
        )
