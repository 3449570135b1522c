"""The choice between the plain root and ``fast/``: the one place that makes it; and what PyTorch
does with a seed.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dataloader import EpisodeDataset, Split
from episode import step_if_finite
from learner import Conv4, FlatModule
from metalearner import MetaLearner
from utils import UserError


class Way(NamedTuple):
    """The classes and functions that a program runs with. Signatures are the root's."""

    device: torch.device
    description: str  # for the first line of the output
    learner: Callable[..., FlatModule]
    metalearner: type[MetaLearner]
    dataset: Callable[..., EpisodeDataset]
    adam: Callable[..., torch.optim.Adam]
    step: Callable[[torch.optim.Optimizer, Tensor], None]
    recorded: Callable[
        ..., Callable
    ]  # (function of an episode, its modules, its optimizer) -> a function that does the same
    lanes: int  # how many episodes run at once
    map: Callable[[Callable, Iterable], Iterator]


def make_reproducible(seed: int) -> None:
    """Same seed, same bits: seed the initialisation and restrict cuDNN to deterministic algorithms,
    without TF32.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    for backend in (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
    ):
        backend.fp32_precision = "ieee"


def choose(args: argparse.Namespace, local: tuple[int, int] = (0, 1)) -> Way:
    """Pick the device, and ``fast/`` unless ``--plain`` is given or the folder is missing.

    Args:
        local: this process's number and that of all processes on this machine: each has a GPU of
            its own.

    Raises:
        UserError: ``--gpu`` names a GPU that does not exist, there are too few, or a flag needs
            ``fast/``.
    """
    rank, size = local
    n_gpu = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.gpu is not None and size > 1:
        raise UserError(
            f"--gpu {args.gpu}: each of the {size} processes here takes the GPU of its own number; leave it out"
        )
    if args.gpu is not None and args.gpu >= n_gpu:
        raise UserError(
            f"--gpu {args.gpu}: PyTorch sees {n_gpu} GPUs here; leave the flag out to use the CPU"
        )
    if not args.cpu and 0 < n_gpu < size:
        raise UserError(
            f"{size} processes here, but {n_gpu} GPUs; give torchrun --nproc-per-node {n_gpu}, or main.py --cpu"
        )
    if args.cpu or n_gpu == 0:
        device = torch.device("cpu")
        name = f"CPU{'' if args.cpu else ' (no GPU found)'}, {torch.get_num_threads()} threads"
    else:
        device = torch.device("cuda", args.gpu or rank)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    if not args.plain and importlib.util.find_spec("fast") is not None:
        return _fast(args, device, name)
    why = "--plain" if args.plain else "there is no folder fast/"
    if args.precision != "fp32":
        leaves = "which --plain leaves out" if args.plain else f"but {why}"
        raise UserError(
            f"--precision {args.precision}: needs fast/, {leaves}; give --precision fp32"
        )
    description = f"device: {name}; plain PyTorch ({why})"
    return Way(
        device,
        description,
        Conv4,
        MetaLearner,
        EpisodeDataset,
        torch.optim.Adam,
        step_if_finite,
        _as_it_is,
        1,
        map,
    )


def _as_it_is(
    function: Callable, modules: Iterable, optimizer: torch.optim.Optimizer | None = None
) -> Callable:
    return function


def _fast(args: argparse.Namespace, device: torch.device, name: str) -> Way:
    from fast.graphs import CUDAGraphFunction, step_without_sync
    from fast.images import FastEpisodeDataset
    from fast.learner import FastConv4
    from fast.library import library
    from fast.metalearner import FastMetaLearner
    from fast.threads import keep_freed_memory, parallel_map

    on_cpu = device.type == "cpu"
    keep_freed_memory()
    lanes = torch.get_num_threads() if on_cpu else 1
    description = f"device: {name}, {library().state}" if on_cpu else f"device: {name}"
    if on_cpu and args.precision == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        description += "\nnote: --precision bf16 is many times slower than fp32 on this processor, which has no AVX-512"
    return Way(
        device,
        description,
        partial(FastConv4, conv_dtype={"fp32": None, "bf16": torch.bfloat16}[args.precision]),
        FastMetaLearner,
        partial(
            FastEpisodeDataset,
            device=device,
            cache_dir=Path(args.cache_dir) if args.cache_dir else None,
        ),
        partial(torch.optim.Adam, fused=True),
        step_without_sync,
        _as_it_is if on_cpu else CUDAGraphFunction,
        lanes,
        partial(parallel_map, n_threads=lanes) if on_cpu else map,
    )


def adam(args: argparse.Namespace, way: Way, parameters: list[Tensor]) -> torch.optim.Adam:
    """Adam with rate ``--lr``; if ``--lr-decay`` changes it, that is a tensor on the device, which
    a recorded update reads.
    """
    if not args.lr_decay:
        return way.adam(parameters, lr=args.lr)
    precise = (
        torch.float64 if way.device.type == "cpu" else torch.float32
    )  # on a CPU, equal to a float of Python to the bit
    return way.adam(parameters, lr=torch.tensor(args.lr, dtype=precise, device=way.device))


def dataset(
    args: argparse.Namespace, way: Way, split: Split, length: int, in_order: bool = False
) -> EpisodeDataset:
    """A split's episodes as the flags ask for them; ``in_order`` as for ``EpisodeDataset``.

    Raises:
        UserError: the split cannot serve such episodes, or a file cannot be used.
    """
    shape = {
        k: getattr(args, k)
        for k in ("n_class", "n_shot", "n_eval", "image_size", "augment", "pixels", "shuffle")
    }
    return way.dataset(
        split, args.seed, n_pass=args.epoch, length=length, in_order=in_order, **shape
    )
