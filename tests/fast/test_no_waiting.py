"""Nothing in a fast episode or its assembly waits for a GPU: a dispatcher on the CPU sees it."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DATASETS, Model, drawn
from torch.utils._python_dispatch import TorchDispatchMode

from dataloader import scan_split
from episode import Episode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SYNCHRONISING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose"}
SYNCHRONISING |= {"masked_select", "bincount", "unique", "_unique", "_unique2", "unique_dim"}
SYNCHRONISING |= {"unique_consecutive", "unique_dim_consecutive"}


def tensors(values):
    return [t for t in values if isinstance(t, torch.Tensor)]


class NoSynchronisation(TorchDispatchMode):
    """Fails on numbers read, shapes that depend on data, copies from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        devices = [t.device for t in tensors(args)]
        guilty = name in SYNCHRONISING
        if name.startswith(("index", "_index")):  # by a mask
            indices = [t for a in args if isinstance(a, list | tuple) for t in tensors(a)]
            guilty |= any(t.dtype in (torch.bool, torch.uint8) for t in indices)
        if name == "repeat_interleave":
            guilty |= func._overloadname == "Tensor"
        if name == "_to_copy":
            guilty |= torch.device(kwargs.get("device") or devices[0]).type != devices[0].type
        if name in ("copy_", "_copy_from"):
            guilty |= devices[0] != devices[1]
        assert not guilty, f"{name} synchronises"
        return func(*args, **kwargs)


def _guilty(name):
    def method(self, *args, **kwargs):
        raise AssertionError(f"{name} synchronises")

    return method


@contextlib.contextmanager
def no_synchronisation():
    """The same, and what reads a CPU's tensor without the dispatcher."""
    methods = {name: _guilty(name) for name in ("tolist", "numpy", "cpu", "__array__")}
    with mock.patch.multiple(torch.Tensor, **methods), NoSynchronisation():
        yield


class GuiltyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, read):
        ctx.read = read
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.read(grad.sum())
        return grad, None


def guilty_backward(x, read):
    GuiltyBackward.apply(x.clone().requires_grad_(), read).sum().backward()


GUILTY = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "unique rows": lambda x: x.unique(dim=0),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat": lambda x: torch.arange(3, device=x.device).repeat_interleave((x[0] > 0).long()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: np.asarray(x),
    "to": lambda x: x.to("meta"),
    "copy_": lambda x: torch.empty(3, 3, device="meta").copy_(x),
    "tolist in a backward pass": lambda x: guilty_backward(x, lambda t: t.tolist()),
}


@pytest.mark.parametrize("guilty", GUILTY.values(), ids=GUILTY)
@pytest.mark.parametrize("device", DEVICES)
def test_the_detector_detects(guilty, device):
    x = torch.randn(3, 3, device=device)
    with pytest.raises(AssertionError, match="synchronises"), no_synchronisation():
        guilty(x)


@pytest.mark.parametrize(("conv_dtype", "batch_size"), [(None, 10), (torch.bfloat16, 25)])
@pytest.mark.parametrize("device", DEVICES)
def test_episodes_do_not_synchronise(master, batch_size, conv_dtype, device):
    """Inner loop, backward pass, clipping, Adam, accuracy; the second episode has Adam's state."""
    options = {"conv_dtype": conv_dtype, "device": device, "batch_size": batch_size}
    model, first = (Model("fast", 16, **options) for _ in range(2))
    before = model.meta.metalstm.cI.detach().clone()
    batch = list(drawn(master, 16, 2, device=torch.device(device)))
    first.train(batch[0])  # checks a GPU's kernels
    first.test(batch[0])
    with no_synchronisation():
        for episode in batch:
            model.train(episode)
            model.test(episode)
    assert not torch.equal(before, model.meta.metalstm.cI)


class Copies(NoSynchronisation):
    """Allows and counts copies to another device that do not wait."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = (kwargs or {}).get("device")
        if func._schema.name == "aten::_to_copy" and target not in (None, args[0].device):
            assert kwargs.get("non_blocking"), "a copy that waits"
            self.n += 1
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


def dataset(master, split, n_shot=2):
    return DATASETS["fast"](scan_split(master, split), 719, 5, 5, 3, n_shot, 32, "port", 2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_assembling_an_episode_does_not_wait(master, split):
    """On the meta device, which takes the GPU's path: one copy, without a wait."""
    data = dataset(master, split)
    episodes = [data.draw(index) for index in range(2)]
    data.assemble(episodes[0], torch.device("meta"))  # makes constants
    with Copies() as copies:
        episode = data.assemble(episodes[1], torch.device("meta"))
    assert copies.n == 1
    assert episode.query.device.type == "meta"
    assert episode.query.shape == (15, 3, 32, 32)


def test_gpu_augments_on_its_own_stream(master):
    """The training stream waits for the images, and their memory for the training stream."""
    data, log = dataset(master, "train"), []
    current, own = mock.Mock(wait_stream=lambda stream: log.append(("wait", stream))), mock.Mock()
    record = mock.Mock(record_stream=lambda stream: log.append(("record", stream)))
    episode = Episode(*[record] * len(Episode._fields))

    @contextlib.contextmanager
    def use_stream(stream):
        log.append(("on", stream))
        yield
        log.append(("off", stream))

    cuda = {"Stream": lambda: own, "current_stream": lambda: current, "stream": use_stream}
    assembled = lambda *_: log.append("assemble") or episode  # noqa: E731
    assemble = mock.patch.object(data, "assemble", side_effect=assembled)
    with mock.patch.multiple(torch.cuda, **cuda), assemble:
        assert data.deliver(data.draw(0), torch.device("cuda")) is episode
    streams = [("on", own), "assemble", ("off", own), ("wait", own)]
    assert log == streams + [("record", current)] * len(episode)
