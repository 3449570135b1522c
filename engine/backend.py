"""The backend: plain PyTorch as in the root, or ``fast/``. Only this module imports ``fast/``."""

from __future__ import annotations

import contextlib
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from data.layout import Split
from dataloader import EpisodeDataset
from engine.flags import ROOT
from engine.own_learner import conv4_arguments, own_learner
from episode import step_if_finite
from learner import Conv4, FlatModule
from metalearner import MetaLearner, UpdateRule
from utils import UserError, counted, first_line, load_package

Rule = TypeVar("Rule", bound=UpdateRule)
REPRODUCIBLE: list[tuple[Any, str, object]] = [
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "benchmark", False),
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    (torch.backends.cudnn.rnn, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
]


class Backend(NamedTuple):
    """Device, classes and functions that a program runs with; signatures are the root's."""

    device: torch.device
    description: str  # for the first line of the output
    learner: Callable[..., FlatModule] = Conv4
    metalearner: type[MetaLearner] = MetaLearner
    dataset: Callable[..., EpisodeDataset] = EpisodeDataset
    adam: Callable[..., torch.optim.Adam] = torch.optim.Adam
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite
    # (function of an episode, its modules, its optimizer) -> the same, as a CUDA graph
    capture: Callable[..., Callable] = lambda function, *_: function
    n_parallel: int = 1  # episodes that run side by side
    map: Callable[[Callable, Iterable], Iterator] = map


def make_reproducible(seed: int) -> None:
    """Seed PyTorch, and restrict cuDNN and cuBLAS to deterministic float32 algorithms."""
    torch.manual_seed(seed)
    for module, name, value in REPRODUCIBLE:
        setattr(module, name, value)


_reproducible = threading.RLock()  # the settings are the whole process's


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """``make_reproducible`` without a seed, and PyTorch's default modes, dtype and device; the
    caller's settings are restored on exit.
    """
    with _reproducible, contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for module, name, value in REPRODUCIBLE:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def select_backend(args: Namespace, local: tuple[int, int] = (0, 1)) -> Backend:
    """Choose the device, and ``fast/`` unless ``--plain`` is given or the folder is missing.

    Args:
        local: rank and number of the processes on this machine, each of which has its own GPU.

    Raises:
        UserError: ``--gpu`` names no GPU, there are too few, one cannot be used, or a flag needs
            a GPU or ``fast/``.
    """
    device, name = _device(args, *local)
    why = "--plain" if args.plain else "there is no folder fast/"
    plain = args.plain or not (ROOT / "fast" / "__init__.py").is_file()
    if args.precision == "bf16" and (plain or device.type == "cpu"):
        problem = why if plain else "this is a CPU, where fp32 is faster"
        raise UserError(f"--precision bf16: needs a GPU and fast/ ({problem}); give fp32")
    if not plain:
        return _fast(args, device, name)
    load_package("torchvision.transforms.functional")  # to fail here, not in a worker
    return Backend(device, f"device: {name}; plain PyTorch ({why})")


def _device(args: Namespace, rank: int, size: int) -> tuple[torch.device, str]:
    n_gpu = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.gpu is not None and size > 1:
        raise UserError(f"--gpu {args.gpu}: each of {size} processes takes the GPU of its number")
    if args.gpu is not None and args.gpu >= n_gpu:
        raise UserError(
            f"--gpu {args.gpu}: PyTorch sees {counted(n_gpu, 'GPU')} here; leave the flag out"
        )
    if not args.cpu and 0 < n_gpu < size:
        advice = f"give torchrun --nproc-per-node {n_gpu}, or main.py --cpu"
        raise UserError(f"{size} processes here, but {counted(n_gpu, 'GPU')}; {advice}")
    why = "" if args.cpu else " (no GPU found)"
    if not args.cpu and n_gpu:
        device = torch.device("cuda", args.gpu or rank)
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and not dist.is_nccl_available():
            raise UserError("several processes: PyTorch has no NCCL for GPUs here; give --cpu")
        try:
            torch.cuda.set_device(device)
            torch.ones(1, device=device).add_(1).item()
            return device, torch.cuda.get_device_name(device)
        except RuntimeError as e:
            if "no kernel image" not in str(e) or args.gpu is not None:
                problem = f"GPU {device.index} cannot be used ({first_line(e)})"
                raise UserError(f"{problem}; give --cpu, or --gpu with another number") from e
            why = f" (PyTorch {torch.__version__} has no code for GPU {device.index})"
    return torch.device("cpu"), f"CPU{why}, {counted(torch.get_num_threads(), 'thread')}"


def _fast(args: Namespace, device: torch.device, name: str) -> Backend:
    from fast.graphs import CUDAGraphFunction, step_without_sync
    from fast.images import FastEpisodeDataset
    from fast.learner import FastConv4
    from fast.library import library
    from fast.metalearner import FastMetaLearner
    from fast.threads import keep_freed_memory, parallel_map

    keep_freed_memory()
    cache_dir = Path(args.cache_dir) if args.cache_dir else None
    conv_dtype = {"fp32": None, "bf16": torch.bfloat16}[args.precision]
    backend = Backend(
        device,
        f"device: {name}",
        learner=partial(FastConv4, conv_dtype=conv_dtype),
        metalearner=FastMetaLearner,
        dataset=partial(FastEpisodeDataset, device=device, cache_dir=cache_dir),
        adam=partial(torch.optim.Adam, fused=True),
        step=step_without_sync,
    )
    if device.type == "cuda":
        return backend._replace(capture=CUDAGraphFunction)
    n, description = torch.get_num_threads(), f"{backend.description}, {library().state}"
    side_by_side = partial(parallel_map, n_threads=n)
    return backend._replace(description=description, n_parallel=n, map=side_by_side)


def make_learner(args: Namespace, backend: Backend) -> FlatModule:
    """Make the learner that the flags ask for, from their seed, on the device.

    Raises:
        UserError: ``--learner`` names a network that cannot be a learner.
    """
    make_reproducible(args.seed)
    own = args.learner != "conv4"
    learner = own_learner(args) if own else backend.learner(**conv4_arguments(args))
    return learner.to(backend.device)


def make_metalearner(args: Namespace, backend: Backend, learner: FlatModule) -> MetaLearner:
    """Make the meta-learner, whose cI starts as the learner's parameters, on the device."""
    ranges = (tuple(args.bi_init), tuple(args.bf_init))
    sizes = (args.input_size, args.hidden_size, learner.size())
    metalearner = backend.metalearner(*sizes, *ranges, args.lstm_init)
    return prepare_rule(metalearner, args, backend, learner)


def prepare_rule(rule: Rule, args: Namespace, backend: Backend, learner: FlatModule) -> Rule:
    """Set an update rule's attributes by the flags and its cI by the learner, on the device."""
    rule.grad_divisor, rule.second_order = args.grad_divisor, args.second_order
    rule.final_stats = args.final_stats
    rule.to(backend.device).init_cI(learner.get_flat_params())
    return rule


def adam(args: Namespace, backend: Backend, parameters: list[Tensor]) -> torch.optim.Adam:
    """Make Adam with rate ``--lr``: a tensor if ``--lr-decay`` changes it, for a CUDA graph."""
    if not args.lr_decay:
        return backend.adam(parameters, lr=args.lr)
    # on a CPU float64, to equal Python's float to the bit
    dtype = torch.float64 if backend.device.type == "cpu" else torch.float32
    return backend.adam(parameters, lr=torch.tensor(args.lr, dtype=dtype, device=backend.device))


def dataset(
    args: Namespace, backend: Backend, split: Split, length: int, in_order: bool = False
) -> EpisodeDataset:
    """Make a split's episodes as the flags ask for them; ``in_order`` as in ``EpisodeDataset``.

    Raises:
        UserError: the split cannot serve such episodes, or a file cannot be used.
    """
    names = ("n_class", "n_shot", "n_eval", "image_size", "augment", "pixels", "shuffle")
    shape = {k: getattr(args, k) for k in names}
    how = {"n_pass": args.epoch, "length": length, "in_order": in_order}
    return backend.dataset(split, args.seed, **how, **shape)
