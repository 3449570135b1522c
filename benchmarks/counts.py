"""What a GPU would be asked to do in an episode of the 5-way 5-shot recipe, counted without one:
launches and bytes.

    python benchmarks/counts.py --before c569335

PyTorch's meta device takes a GPU's way through the code and computes nothing. Each operation that
reads or writes memory counts as one launch, and what it reads and writes as its bytes. cuDNN and
cuBLAS need more launches for some operations, and the LSTM cell fewer than here, so the table
compares and predicts no times. Triton kernels are counted by the tensors that they take, because
they run nowhere but on a GPU. An operation of PyTorch is counted as if it read a tensor once, which
batch normalisation does not; a block in Triton is counted as it is, twice forward and twice
backward. The table goes to benchmarks/results/cuda-counts.md.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
META = torch.device("meta")
FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
)


class Counter(TorchDispatchMode):
    """Counts launches, bytes, and copies from the host."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(
                memory_format=torch.channels_last
            )  # as cuDNN's, unlike that of the meta device
        if func.is_view or name in FREE:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [
            t for t in tree_leaves(out) if isinstance(t, Tensor) and not any(t is g for g in given)
        ]
        written = [t for t in given if func._schema.is_mutable]
        if name == "_to_copy" and given[0].device != made[0].device:
            self.copies += 1
        else:
            # a list of tensors takes one launch if all have one type, else one for each
            lists = [
                a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)
            ]
            mixed = name.startswith("_foreach") and len({t.dtype for of in lists for t in of}) > 1
            self.launches += len(lists[0]) if mixed else 1
            self.bytes += sum(
                min(_size(t), t.untyped_storage().nbytes()) for t in (*given, *made, *written)
            )  # expanded: once
        return out


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def count(function: Callable[[], object]) -> tuple[int, int, int]:
    """Launches, bytes and copies from the host of one call."""
    with Counter() as counter:
        function()
    return counter.launches, counter.bytes, counter.copies


def counts(data_root: Path) -> dict[str, tuple[int, int, int]]:
    """The parts of an episode in the tree that is first in sys.path."""
    from dataloader import scan_split
    from engine.flags import parse, settle
    from episode import train_episode
    from fast.images import FastEpisodeDataset
    from fast.learner import FastConv4
    from fast.metalearner import FastMetaLearner

    args = settle({}, parse([])[1])
    learners = [
        FastConv4(args.image_size, args.bn_eps, args.bn_momentum, args.n_class).to(META)
        for _ in range(2)
    ]
    n_params = learners[0].get_flat_params().numel()
    meta = FastMetaLearner(args.input_size, args.hidden_size, n_params).to(META)
    shape = (args.n_class, args.n_shot, args.n_eval, args.epoch, args.image_size, "port")
    with tempfile.TemporaryDirectory() as cache:
        split = scan_split(data_root, "train")
        dataset = FastEpisodeDataset(
            split, args.seed, *shape, 2, device=META, cache_dir=Path(cache)
        )
        drawn = dataset.draw(0)
        episode = dataset.assemble(drawn, META)
    optimizer = torch.optim.Adam(meta.parameters())
    learner, other = learners
    learner.train()

    def update() -> None:
        train_episode(
            episode, *learners, meta, optimizer, args.batch_size, args.grad_clip, lambda *_: None
        )

    found = {
        "augmentation of an episode": lambda: dataset.assemble(drawn, META),
        "resetting the running statistics": learner.reset_batch_stats,
        "copying the running statistics": lambda: other.copy_buffers(learner),
        "loss and gradient of one inner update": lambda: learner.loss_and_grad(
            episode.support, episode.support_y
        ),
        "a training episode without augmentation and Adam": update,
    }
    return {name: count(function) for name, function in found.items()}


def in_tree(root: Path, data_root: Path) -> dict[str, tuple[int, int, int]]:
    """``counts`` in a process of its own, of the code in ``root``."""
    code = (
        "import json, sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]; import counts; "
    )
    code += "print(json.dumps(counts.counts(Path(sys.argv[3]))))"
    command = [
        sys.executable,
        "-c",
        code,
        str(root),
        str(ROOT / "benchmarks"),
        str(data_root.resolve()),
    ]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=root).stdout)


def triton_rows() -> list[tuple[str, tuple[int, int, int], tuple[int, int, int]]]:
    """For each Triton kernel: what it is for, the code that it replaces, and the kernel with the
    operations around it.
    """
    from episode import Episode, train_episode
    from fast import augment, gpu
    from fast.learner import FastConv4
    from fast.metalearner import FastMetaLearner
    from metalearner import MetaLearner

    x, factors, order = (
        torch.empty(shape, device=META) for shape in ((100, 3, 84, 84), (100, 4), (100, 4))
    )
    plain = count(lambda: augment._colour_together(x, factors, order.long()))
    # besides the kernel, which reads the images twice: gathering the factors in their order
    rows = [("colours, in Triton", plain, (2, 3 * _size(x) + 8 * _size(factors), 0))]

    one, other = (FastConv4(84, 1e-3, 0.95, 5).to(META) for _ in range(2))
    n_params = one.get_flat_params().numel()
    meta = FastMetaLearner(4, 20, n_params).to(META)
    loss, grad, state = (
        torch.empty((), device=META),
        torch.empty(n_params, 1, device=META),
        MetaLearner.initial_state(meta),
    )
    optimizer = torch.optim.Adam(meta.parameters())
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.empty(100, dtype=torch.int64, device=META)
    episode = Episode(x[:25], labels[:25], x[25:], labels[25:], labels[:25].expand(8, 25))

    def update() -> None:
        sum(t.sum() for t in meta(loss, grad, state)).backward()

    def inner() -> None:
        one.train().loss_and_grad(episode.support, episode.support_y)

    @torch.no_grad()
    def classify() -> None:
        one.eval()(episode.query)

    def train() -> None:
        train_episode(episode, one, other, meta, optimizer, 25, 0.25, lambda *_: None)

    functions = {
        "an update of the meta-learner and its backward pass, in Triton": update,
        "loss and gradient of one inner update, in Triton": inner,
        "classifying the query set, in Triton": classify,
        "a training episode without augmentation and Adam, in Triton": train,
    }
    for name, function in functions.items():
        meta.zero_grad()
        before, kernels = count(function), Kernels()
        meta.zero_grad()
        names = ("_meta_forward", "_meta_backward", "_convolve", "_filters_backward")
        names += ("_moments", "_block_forward", "_block_sums", "_block_backward")
        in_their_place = mock.patch.multiple(gpu, **dict.fromkeys(names, kernels), create=True)
        with in_their_place, mock.patch.object(gpu, "works", return_value=True):
            launches, size, copies = count(function)
        rows.append((name, before, (launches + kernels.launches, size + kernels.bytes, copies)))
    return rows


class Kernels:
    """Stands in for Triton kernels: counts their launches and the bytes of the tensors that they
    are given.
    """

    launches = bytes = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **constants: int) -> None:
            self.launches += 1
            self.bytes += sum(_size(t) for t in args if isinstance(t, Tensor))

        return launch


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Launches and bytes of an episode on a GPU, before and after."
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        default=ROOT / "data" / "glyphs",
        help="images (default: data/glyphs)",
    )
    parser.add_argument("--before", required=True, help="the commit to compare with")
    args = parser.parse_args()
    after = in_tree(ROOT, args.data_root)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", args.before], stdout=subprocess.PIPE, check=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
            tree.extractall(folder, filter="data")
        before = in_tree(Path(folder), args.data_root)
    sys.path.insert(0, str(ROOT))
    rows = [*((name, before[name], after[name]) for name in after), *triton_rows()]
    command = f"python benchmarks/counts.py --before {args.before}"
    lines = [
        f"`{command}`; data: {args.data_root.name}; torch {torch.__version__}; counted, not run"
    ]
    lines += [
        "",
        "| part | launches before | after | MB before | after | host's copies before | after |",
        "|" + "-|" * 7,
    ]
    for name, *both in rows:
        cells = [
            f"{v}" if k != 1 else f"{v / 1e6:.1f}"
            for k in range(3)
            for v in (both[0][k], both[1][k])
        ]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    (ROOT / "benchmarks" / "results" / "cuda-counts.md").write_text(
        "\n".join(lines) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
