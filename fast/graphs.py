"""Whole episodes as CUDA graphs: captured once, then replayed with one launch each."""

from __future__ import annotations

import contextlib
import gc
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from episode import Episode
from utils import counted, first_line

WARM_UP = 3  # eager calls before the capture: libraries make workspaces, Adam its moments
CHECKED = 2  # replays that are compared with eager calls; the second shows a baked-in number


def step_without_sync(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take the step if ``finite`` [], bool; a fused Adam reads it on the device, without a wait."""
    optimizer.found_inf = (~finite).float()
    optimizer.step()


class CUDAGraphFunction:
    """A function of an episode that becomes a CUDA graph.

    The first ``WARM_UP`` calls run eagerly; then the function is captured, and later calls replay
    the graph. Warm-up calls are ordinary ones: training learns from them, too. All calls read the
    episode from the same memory, so that libraries choose the same algorithms before, during and
    after the capture.

    The first ``CHECKED`` replays start from the same state as an eager call and must reach the same
    bits, results and state. Every replay requires that all tensors of ``modules`` and ``optimizer``
    lie where they lay at the capture. Otherwise the graph is dropped, a line says why, and calls
    run eagerly from then on. The last warm-up call is watched for synchronisation with the GPU and
    for copies between host and device, and a line reports them.

    Args:
        function: (Episode) -> tuple of tensors; it must not wait for the GPU.
        modules: all modules whose tensors ``function`` reads or changes.
        optimizer: the one whose step ``function`` takes, if any.
    """

    def __init__(
        self,
        function: Callable[[Episode], tuple[Tensor, ...]],
        modules: Iterable[nn.Module] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.function, self.modules, self.optimizer = function, tuple(modules), optimizer
        # one stream for warm-up and capture: the capture reuses the warm-up's workspaces
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.inputs: Episode | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, episode: Episode) -> tuple[Tensor, ...]:
        """Call the function.

        Returns:
            Its results, copied, on the current stream.

        Raises:
            ValueError: the episode's shapes differ from the first one's.
        """
        self._load(episode)
        self.calls += 1
        if self.calls == WARM_UP:
            with _reports():
                return self._eager()
        if self.calls == WARM_UP + 1:
            self._capture()
        if self.graph is not None and self._addresses() != self.addresses:
            self._drop("parameters or moments have moved in memory since the capture")
        if self.graph is None:
            return self._eager()
        if self.calls <= WARM_UP + CHECKED:
            return self._checked_replay()
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)

    def _load(self, episode: Episode) -> None:
        if self.inputs is None:
            self.inputs = Episode(*(t.clone() for t in episode))
            return
        for static, new in zip(self.inputs, episode, strict=True):
            if static.shape != new.shape:
                shapes = f"{list(new.shape)}, but the first one had {list(static.shape)}"
                raise ValueError(f"an episode with {shapes}")
            static.copy_(new, non_blocking=True)

    def _eager(self) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.function(self.inputs)
        current.wait_stream(self.stream)
        return tuple(t.clone() for t in results)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins memory for the data pipeline keeps running. The outer
        # stream context restores the current stream, which a failing end of a capture does not.
        capture = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        groups = self.optimizer.param_groups if self.optimizer else []
        for group in groups:
            group["capturable"] = True  # Adam warns about this flag at any other time
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # destroying an old graph during a capture invalidates the new one
        try:
            with torch.cuda.stream(self.stream), capture:
                self.outputs = self.function(self.inputs)
        except Exception as e:  # Triton's, such as OutOfResources, are no RuntimeErrors
            cause: BaseException = e
            while cause.__context__ is not None:  # the first error, not what it led to
                cause = cause.__context__
            self._drop(first_line(cause))
        else:
            self.graph, self.addresses = graph, self._addresses()
        finally:
            if collecting:
                gc.enable()
            for group in groups:
                group["capturable"] = False

    def _checked_replay(self) -> tuple[Tensor, ...]:
        """Call eagerly, then replay from the same state, and compare results and state."""
        before = self._copy_state()
        results = self._eager()
        after = self._copy_state()
        _write(self._state(), before)
        self.graph.replay()
        if not all(map(_same_bits, (*self.outputs, *self._state()), (*results, *after))):
            _write(self._state(), after)
            self._drop("a replayed episode differs from the same episode run eagerly")
        return results

    @torch.no_grad()  # or autograd would remember parameters on the stream of the copies
    def _copy_state(self) -> list[Tensor]:
        return [t.clone() for t in self._state()]

    def _state(self) -> list[Tensor]:
        """What lasts from one call to the next: parameters, buffers, moments."""
        states = self.optimizer.state.values() if self.optimizer else ()
        tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return tensors + [t for state in states for t in state.values()]

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in self._state()]

    def _drop(self, reason: str) -> None:
        self.graph = self.outputs = None
        tqdm.write(f"no CUDA graph, so episodes run eagerly and slower: {reason}")


@torch.no_grad()
def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike ``torch.equal``, this tells -0 from 0, and NaN is itself."""
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


@contextlib.contextmanager
def _reports() -> Iterator[None]:
    """Write a line if the host waits for the GPU in this context, and one if tensors are copied
    between devices: a graph cannot contain such a copy, or would read the host's memory long after
    the tensor is gone.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught, _Copies() as copies:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    syncs = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    if syncs:
        what = f"waits for the GPU {counted(len(syncs), 'time')}, which costs speed"
        tqdm.write(f"an episode {what}; first at {syncs[0].filename}:{syncs[0].lineno}")
    if places := copies.places:
        what = f"copies {counted(len(places), 'tensor')} between host and device"
        tqdm.write(f"an episode {what}; first at {places[0]}")


class _Copies(TorchDispatchMode):
    """Collects the places of copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if source is not None and args[source].device.type != out.device.type:
            self.places.append(_caller())
        return out


def _caller() -> str:
    """The innermost frame outside PyTorch and this file, as "file:line"."""
    inner = __file__, str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(inner)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a backward pass"
