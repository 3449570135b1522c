"""Nothing in a fast episode, nor in its assembly, makes the host wait for a GPU. Checked on a CPU,
too.
"""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DATASETS, LEARNERS, Model, drawn
from torch.utils._python_dispatch import TorchDispatchMode

from dataloader import scan_split
from episode import Episode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _device(value):
    return value.device if isinstance(value, torch.Tensor) else None


class NoSynchronisation(TorchDispatchMode):
    """Fails on whatever would make the host wait for a GPU, on a CPU too: numbers read, shapes that
    depend on data, copies from one device to another.
    """

    NAMES = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "equal",
        "allclose",
        "masked_select",
        "bincount",
    )
    NAMES += (
        "unique",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "unique_dim_consecutive",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        masked = name.startswith(("index", "_index")) and any(
            isinstance(v, list | tuple)
            and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in v)
            for v in args
        )
        counted = func._schema.name == "aten::repeat_interleave" and func._overloadname == "Tensor"
        across = (
            name == "_to_copy"
            and torch.device(kwargs.get("device") or _device(args[0])).type != _device(args[0]).type
        )
        across |= name in ("copy_", "_copy_from") and _device(args[0]) != _device(args[1])
        if name in self.NAMES or masked or counted or across:
            raise AssertionError(f"{name} synchronises")
        return func(*args, **kwargs)


def _guilty(name):
    def method(self, *args, **kwargs):
        raise AssertionError(f"{name} synchronises")

    return method


@contextlib.contextmanager
def no_synchronisation():
    """The same, and what reads a CPU's tensor past the dispatcher."""
    past = {name: _guilty(name) for name in ("tolist", "numpy", "cpu", "__array__")}
    with mock.patch.multiple(torch.Tensor, **past), NoSynchronisation():
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
    "float": lambda x: float(x[0, 0]),
    "range": lambda x: range(x.argmax()),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unique(dim=0),
    "equal": lambda x: x.equal(x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat": lambda x: torch.arange(3, device=x.device).repeat_interleave((x[0] > 0).long()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: np.asarray(x),
    "to": lambda x: x.to("meta"),
    "copy_": lambda x: torch.empty(3, 3, device="meta").copy_(x),
    "item in a backward pass": lambda x: guilty_backward(x, lambda t: t.item()),
    "tolist in a backward pass": lambda x: guilty_backward(x, lambda t: t.tolist()),
}


@pytest.mark.parametrize("guilty", GUILTY.values(), ids=GUILTY.keys())
@pytest.mark.parametrize("device", DEVICES)
def test_the_detector_detects(guilty, device):
    x = torch.randn(3, 3, device=device)
    with pytest.raises(AssertionError, match="synchronises"), no_synchronisation():
        guilty(x)


@pytest.mark.parametrize("conv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("batch_size", "adapt"), [(25, "all"), (10, "all"), (10, "classifier")])
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_in_an_episode_synchronises(master, batch_size, adapt, conv_dtype, device):
    """Inner loop, backward pass, clipping, Adam, accuracy; the second episode finds Adam's state
    there already.
    """
    how = {"conv_dtype": conv_dtype, "device": device, "batch_size": batch_size, "adapt": adapt}
    fast, first = (Model("fast", 16, **how) for _ in range(2))
    before = fast.meta.metalstm.cI.detach().clone()
    batches = list(drawn(master, 16, 2, device=torch.device(device)))
    first.train(batches[0])  # a GPU's kernels are checked at their first use
    first.test(batches[0])
    with no_synchronisation():
        for episode in batches:
            fast.train(episode)
            fast.test(episode)
    assert not torch.equal(before, fast.meta.metalstm.cI)


class Copies(NoSynchronisation):
    """Copies from one device to another are allowed, but none that waits."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func._schema.name == "aten::_to_copy"
            and kwargs.get("device", args[0].device) != args[0].device
        ):
            assert kwargs.get("non_blocking"), "a copy that waits"
            self.n += 1
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_episode_is_assembled_without_waiting_for_the_gpu(master, split):
    """On PyTorch's meta device, which takes a GPU's way; the host then runs ahead and the GPU never
    idles.
    """
    dataset = DATASETS["fast"](scan_split(master, split), 719, 5, 5, 3, 2, 32, "port", 2)
    images = [dataset.draw(index) for index in range(2)]
    dataset.assemble(images[0], torch.device("meta"))  # constants stay on the device
    with Copies() as copies:
        episode = dataset.assemble(images[1], torch.device("meta"))
    assert copies.n == 1
    assert episode.query.device.type == "meta"
    assert episode.query.shape == (15, 3, 32, 32)


class Operations(TorchDispatchMode):
    """Lists the operations and the types of the tensors in their lists."""

    def __init__(self):
        super().__init__()
        self.names, self.types = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        self.types.append(
            {
                t.dtype
                for a in args
                if isinstance(a, list | tuple)
                for t in a
                if isinstance(t, torch.Tensor)
            }
        )
        return func(*args, **(kwargs or {}))


def test_running_statistics_and_idle_gradients_take_few_launches():
    """A list of one type is one launch on a GPU, one of two types is a launch for each tensor."""
    one, other = (LEARNERS["fast"](16, 1e-3, 0.95, 5).to("meta").train() for _ in range(2))
    with Operations() as copying:
        one.copy_buffers(other)
    assert copying.names == ["_foreach_copy_"]
    assert copying.types == [{torch.float32}]
    with Operations() as resetting:
        one.reset_batch_stats()
    assert resetting.names == ["_foreach_zero_", "_foreach_add_"]
    with Operations() as update:
        one.loss_and_grad(torch.empty(5, 3, 16, 16, device="meta"), torch.arange(5).to("meta"))
    assert update.names.count("zeros") + update.names.count("zeros_like") <= 1


def test_a_gpu_augments_on_a_stream_of_its_own(master):
    """So that it can work on two episodes at once; the training waits for the images, and their
    memory for the training.
    """
    dataset = DATASETS["fast"](scan_split(master, "train"), 719, 5, 5, 3, 2, 32, "port", 1)
    done, current, own = [], mock.Mock(), mock.Mock()
    current.wait_stream = lambda stream: done.append(("wait", stream))
    episode = Episode(
        *(
            mock.Mock(record_stream=lambda stream: done.append(("record", stream)))
            for _ in Episode._fields
        )
    )

    @contextlib.contextmanager
    def on(stream):
        done.append(("on", stream))
        yield
        done.append(("off", stream))

    with (
        mock.patch.multiple(
            torch.cuda, Stream=lambda: own, current_stream=lambda: current, stream=on
        ),
        mock.patch.object(
            dataset, "assemble", side_effect=lambda *_: done.append("assemble") or episode
        ),
    ):
        assert dataset.deliver(dataset.draw(0), torch.device("cuda")) is episode
    assert done == [
        ("on", own),
        "assemble",
        ("off", own),
        ("wait", own),
        *[("record", current)] * 5,
    ]
