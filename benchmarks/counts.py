"""Count what an episode asks of a GPU, without one: launches, bytes, and copies from the host.

    python benchmarks/counts.py

PyTorch's meta device takes the GPU's way through the code and computes nothing. Each operation that
reads or writes memory counts as one launch, and its operands as its bytes; a Triton kernel counts
as one launch that touches its arguments once. With Triton, a launch is a node of the CUDA graph;
without, cuDNN and cuBLAS need more. So the numbers compare versions, and predict no times.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import scan_split
from engine.backend import adam, dataset, select_backend
from engine.distributed import SINGLE_PROCESS
from engine.flags import Parser, resolve
from engine.parallel import make_train_step
from engine.process import run_main
from episode import trainable_parameters
from fast import gpu
from fast.images import FastEpisodeDataset
from main import build
from tools.recipes import recipes
from tools.words import markdown_table
from utils import UserError

META = torch.device("meta")
NO_LAUNCH = {"detach", "_unsafe_view", "lift_fresh"}
NO_LAUNCH |= {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
EPISODE, AUGMENTATION = "training episode without augmentation and Adam", "augmentation"
SECOND_ORDER = "the same with second order"


class Counter(TorchDispatchMode):
    """Counts launches, bytes and copies from the host; stands in for Triton kernels, too."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        channels_last = torch.channels_last
        if name == "convolution" and args[0].is_contiguous(memory_format=channels_last):
            out = out.contiguous(memory_format=channels_last)  # as cuDNN's
        if func.is_view or name in NO_LAUNCH:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        outputs = [t for t in outputs if not any(t is i for i in inputs)]
        if len({t.device for t in (*inputs, *outputs) if t.dim() or t.device == META}) > 1:
            self.copies += 1
            return out
        # a list of tensors takes one launch if all have one type, else one for each
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        mixed = name.startswith("_foreach") and len({t.dtype for a in lists for t in a}) > 1
        self.launches += len(lists[0]) if mixed else 1
        written = [
            argument
            for argument, declared in zip(args, func._schema.arguments, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
        ]
        self.bytes += sum(map(_size, (*inputs, *outputs, *tree_leaves(written))))
        return out

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """As ``kernel[grid]`` of a Triton kernel."""

        def launch(*args: object, **constants: object) -> None:
            self.launches += 1
            tensors = {id(t): t for t in args if isinstance(t, Tensor)}
            self.bytes += sum(map(_size, tensors.values()))

        return launch


def _size(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # expanded: once


@contextlib.contextmanager
def _in_place_of_triton(counter: Counter) -> Iterator[None]:
    """Take the way through all Triton kernels of fast/gpu/, but count them instead.

    Raises:
        UserError: Triton is missing.
    """
    if gpu.triton is None:
        raise UserError("Triton is missing; install PyTorch's CUDA build, which runs without a GPU")
    with contextlib.ExitStack() as stack:
        for found in pkgutil.iter_modules(gpu.__path__):
            module = importlib.import_module(f"{gpu.__name__}.{found.name}")
            for name, value in list(vars(module).items()):
                if isinstance(value, gpu.triton.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, counter))
        stack.enter_context(mock.patch.object(gpu, "works", return_value=True))
        yield


def count(function: Callable[[], object], triton: bool = False) -> Counter:
    """Count what a call after the first one asks of the meta device; the first checks kernels."""
    for _ in range(2):
        counter = Counter()
        with _in_place_of_triton(counter) if triton else contextlib.nullcontext(), counter:
            function()
    return counter


def parts(n_shot: int, folder: Path) -> dict[str, Callable[[], object]]:
    """The parts of a training episode of the port's recipe, on the meta device.

    Args:
        folder: an empty one, for images.
    """
    args = resolve({**recipes()["port", n_shot], "cpu": True, "data_root": str(folder)})
    for c, k in itertools.product(range(args.n_class), range(args.n_shot + args.n_eval)):
        path = folder / "train" / f"{c}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (84, 84)).save(path)
    on_cpu = select_backend(args)
    model = build(args, on_cpu)
    metalearner, (w_grad, wo_grad) = model.metalearner.to(META), model.learners
    w_grad.to(META), wo_grad.to(META)
    backend = on_cpu._replace(
        device=META,
        dataset=partial(FastEpisodeDataset, device=META, cache_dir=folder),
        adam=torch.optim.Adam,
        step=lambda *_: None,
    )
    train_set = dataset(args, backend, scan_split(folder, "train"), 1)
    optimizer = adam(args, backend, trainable_parameters(model.metalearner))
    train_step = make_train_step(args, backend, model, optimizer, SINGLE_PROCESS)
    drawn = train_set[0]
    episode = train_set.assemble(drawn, META)
    x, y = episode.support[: args.batch_size], episode.support_y[: args.batch_size]
    loss, grad = torch.empty((), device=META), torch.empty(w_grad.size(), 1, device=META)

    def second_order() -> None:
        metalearner.second_order = True
        train_step(1, [episode])
        metalearner.second_order = False

    @torch.no_grad()
    def classify() -> None:
        wo_grad.eval()(episode.query)

    def meta_update() -> None:
        state = metalearner(loss, grad, metalearner.initial_state())
        torch.autograd.grad(sum(t.sum() for t in state), trainable_parameters(metalearner))

    return {
        AUGMENTATION: lambda: train_set.assemble(drawn, META),
        "loss and gradient of one inner update": lambda: w_grad.train().loss_and_grad(x, y),
        "update of the meta-learner, forward and backward": meta_update,
        "classifying the query set": classify,
        EPISODE: lambda: train_step(1, [episode]),
        SECOND_ORDER: second_order,
    }


def main(argv: list[str]) -> int:
    Parser(description=__doc__.partition("\n")[0]).parse_args(argv)
    rows = []
    for n_shot in (5, 1):
        counted = []
        for with_triton in (False, True):  # models of their own: they remember which kernels work
            with tempfile.TemporaryDirectory() as folder:
                functions = parts(n_shot, Path(folder))
                counted.append({name: count(f, with_triton) for name, f in functions.items()})
        for name, eager in counted[0].items():
            triton = counted[1][name]
            cells = [eager.launches, triton.launches]
            cells += [f"{c.bytes / 1e6:.1f}" for c in (eager, triton)]
            rows.append([f"{n_shot}-shot: {name}", *cells, triton.copies])
    header = ["part", "launches", "with Triton", "MB", "with Triton", "copies from the host"]
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
