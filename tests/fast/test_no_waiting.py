"""Nothing in a fast episode or its assembly waits for a GPU. The meta device takes a GPU's way: it
has no numbers to read, and copies to it are counted.
"""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from conftest import DATASETS, Model, new_episode
from torch.utils._python_dispatch import TorchDispatchMode

from data.layout import scan_split
from episode import Episode

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies from one device to another; none may wait."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if source is not None and args[source].device != out.device:
            assert source == 0, "a copy into a tensor"
            assert kwargs.get("non_blocking"), "a copy that waits"
            self.n += 1
        return out


@pytest.mark.parametrize("conv_dtype", [None, torch.bfloat16])
def test_episodes_do_not_synchronise(monkeypatch, conv_dtype):
    """Inner loop, backward pass, clipping, Adam, accuracy; the second episode has Adam's state."""
    check = "_device_dtype_check_for_fused"  # which does not know this device
    monkeypatch.setattr(sys.modules["torch.optim.adam"], check, lambda *args, **kwargs: None)
    model = Model("fast", 16, device=META, conv_dtype=conv_dtype, batch_size=10)
    episode = Episode(*(t.to(META) for t in new_episode(5, 5, 3)))
    with Copies() as copies:
        for _ in range(2):
            model.train(episode)
            model.test(episode)
    assert copies.n == 0


def dataset(master, split):
    return DATASETS["fast"](scan_split(master, split), 719, 5, 5, 3, 2, 32, "port", 2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_assembling_an_episode_does_not_wait(master, split):
    """One copy, without a wait."""
    data = dataset(master, split)
    drawn = [data.draw(index) for index in range(2)]
    data.assemble(drawn[0], META)  # makes constants
    with Copies() as copies:
        episode = data.assemble(drawn[1], META)
    assert copies.n == 1
    assert episode.query.device == META
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
