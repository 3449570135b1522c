"""Launches and host copies of a training episode on a GPU, counted on PyTorch's meta device."""

import importlib
import pkgutil
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataloader import scan_split
from engine.backend import adam, dataset, select_backend
from engine.distributed import SINGLE_PROCESS
from engine.flags import resolve
from engine.model import Model
from engine.parallel import make_train_step
from episode import learned
from fast import gpu
from fast.images import FastEpisodeDataset
from main import build
from tools.recipes import recipes

pytest.importorskip("triton")

META = torch.device("meta")
NO_LAUNCH = {"detach", "_unsafe_view", "lift_fresh"}
NO_LAUNCH |= {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
# Nodes of the CUDA graph, by shots; where a change makes them fewer, lower the number here. 547 and
# 775 until the root no longer copied cI into the learner a first time, before the inner loop.
LAUNCHES = {5: 546, 1: 774}


class Counter(TorchDispatchMode):
    """Counts operations that read or write memory; stands in for Triton kernels to count them."""

    launches = copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        channels_last = torch.channels_last
        if name == "convolution" and args[0].is_contiguous(memory_format=channels_last):
            out = out.contiguous(memory_format=channels_last)  # as cuDNN's
        if func.is_view or name in NO_LAUNCH:
            return out
        found = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if len({t.device for t in found if t.dim() or t.device == META}) > 1:
            self.copies += 1
            return out
        # a list of tensors takes one launch if all have one type, else one for each
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        mixed = name.startswith("_foreach") and len({t.dtype for a in lists for t in a}) > 1
        self.launches += len(lists[0]) if mixed else 1
        return out

    def __getitem__(self, grid):
        """As ``kernel[grid]`` of a Triton kernel."""

        def launch(*args, **constants):
            self.launches += 1

        return launch


def count(monkeypatch, function):
    """Launches and host copies of a call that takes the way through all Triton kernels."""
    counter = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "works", lambda *_, **__: True)
        for found in pkgutil.iter_modules(gpu.__path__):
            module = importlib.import_module(f"{gpu.__name__}.{found.name}")
            for name, value in list(vars(module).items()):
                if isinstance(value, gpu.triton.JITFunction):
                    patch.setattr(module, name, counter)
        with counter:
            function()
    return counter.launches, counter.copies


@pytest.mark.parametrize("n_shot", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_launches_and_host_copies_of_a_training_episode(n_shot, master, tmp_path, monkeypatch):
    args = resolve({**recipes()["port", n_shot], "cpu": True, "data_root": master, "n_eval": 3})
    on_cpu = select_backend(args)
    model = Model(*(m if m is None else m.to(META) for m in build(args, on_cpu)))
    backend = on_cpu._replace(
        device=META,
        dataset=partial(FastEpisodeDataset, device=META, cache_dir=tmp_path),
        adam=torch.optim.Adam,
        step=lambda *_: None,
    )
    train_set = dataset(args, backend, scan_split(master, "train"), 1)
    optimizer = adam(args, backend, learned(model.metalearner))
    train_step = make_train_step(args, backend, model, optimizer, SINGLE_PROCESS)
    episode = train_set.assemble(train_set[0], META)
    found = count(monkeypatch, lambda: train_step(1, [episode]))
    assert found == (LAUNCHES[n_shot], 0)
    assert count(monkeypatch, lambda: train_set.assemble(train_set[0], META))[1] == 1


def test_what_counts(monkeypatch):
    x = torch.zeros(3, device="meta")
    assert count(monkeypatch, lambda: (x + 1, x.view(3, 1))) == (1, 0)
    assert count(monkeypatch, lambda: torch.ones(3).to("meta"))[1] == 1
    assert count(monkeypatch, lambda: x.copy_(torch.ones(3)))[1] == 1
