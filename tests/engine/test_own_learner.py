"""``--learner FILE:NAME``: a user's own network has all that a training has."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_runs, refused, run_cli, run_test, succeeded
from conftest import train as train_conv4

from engine.backend import make_learner, select_backend
from engine.flags import parse, resolve
from utils import UserError

NET = """
from torch import nn
def Net(n_classes, image_size):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * ((image_size - 1) // 2) ** 2, n_classes))
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The file with a network; it lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def train(data, save, *flags, **length):
    return train_conv4(data, save, "--learner", "net.py:Net", *flags, **length)


def made(learner="net.py:Net", *flags):
    """The learner that the flags ask for."""
    args = resolve(parse(["--learner", learner, "--image-size", "16", "--cpu", *flags]))
    return make_learner(args, select_backend(args))


@pytest.mark.slow
def test_it_is_trained_resumed_tested_and_drawn(master, net):
    succeeded(train(master, "logs", "--plots", "true", episode=4))
    assert (Path("logs-719") / "trace.npz").is_file()
    succeeded(train(master, "parts", episode=2))
    succeeded(train_conv4(master, "parts", "--resume", "auto"))  # the checkpoint knows it
    assert_same_runs("logs", "parts")
    assert "Net@" in succeeded(run_test(None, "logs", "--episode-test", 2))
    for k in range(3):
        shutil.copytree(master / "test" / f"test class {k}", Path("three", str(k)))
    known = ["--support", "three", "--query", "three/0/0.jpg"]
    succeeded(run_cli("--mode", "predict", "--save", "logs", "--cpu", *known))


def test_a_test_needs_the_file_as_it_was(master, net):
    succeeded(train(master, "logs", episode=1))
    test = ["--mode", "test", "--data-root", master, "--save", "logs", "--cpu", "--n-workers", 0]
    test += ["--episode-test", 1]
    net.write_text(NET + "# later\n")
    refused(run_cli(*test), "net.py", "has changed", "--learner net.py:Net")
    refused(train(master, "logs", "--resume", "auto", episode=2), "--learner net.py:Net")
    succeeded(run_cli(*test, "--learner", "net.py:Net"))
    net.unlink()
    refused(run_cli(*test), "net.py", "No such file", "checkpoint", ".py:Net")
    Path("nets").mkdir()  # it may move, if it stays what it is
    Path("nets/net.py").write_text(NET)
    moved = ("--resume", "auto", "--learner", "nets/net.py:Net")
    succeeded(train_conv4(master, "logs", *moved, episode=2, val_freq=1))
    assert "note: tested with" not in succeeded(run_cli(*test, *moved[2:]))
    result = json.loads(Path("logs-719/results.json").read_text())["tests"][-1]
    assert not result["contradicts_training"]
    succeeded(run_cli("--mode", "export", "--save", "logs", "--to", "new"))
    (name,) = os.listdir("new")
    assert "Net-" in name
    assert "net.py" not in name


def test_only_the_arguments_that_it_has(net):
    net.write_text(NET + "Other = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 5))\n")
    assert made("net.py:Other").size() == 3 * 256 * 5 + 5
    net.write_text(NET + "def Open(**kw):\n    return Net(kw['n_classes'], kw['image_size'])\n")
    made("net.py:Open")


def test_a_flat_module_stays_what_it_is(net):
    net.write_text("from learner import Conv4\n")
    learner = made("net.py:Conv4", "--filters", "8")
    assert type(learner).__name__ == "Conv4"
    assert len(learner.conv4.bias) == 8


MODULES = {  # the network -> what the line says
    "nn.Flatten()": "no parameters",
    "setattr(net := Linear(), 'again', net.inner.weight) or net": "share a parameter",
    "setattr((net := Linear()).inner, 'again', net.inner.weight) or net": "share a parameter",
    "nn.Sequential(nn.Flatten(), nn.LazyLinear(3))": "lazy",
    "nn.Sequential(nn.Flatten(), nn.Linear(768, 4))": "[3, 4]",
    "nn.Conv2d(3, 3, 3)": "[3, 3, 14, 14]",
    "Linear().double()": "float64",
    "Linear().requires_grad_(False)": "frozen",
    "Does(lambda net, x: net.inner(x).to(torch.bfloat16 if net.training else x.dtype))": "bfloat16",
    "Does(lambda net, x: net.inner(x).to(x.dtype if net.training else torch.bfloat16))": "bfloat16",
    "nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(768, 3))": "dropout",
    "nn.Linear(9, 3)": "RuntimeError",
    "Does(lambda net, x: x @ net.kept[0].t())": "copies",
    "normed(nn.BatchNorm2d(3, track_running_stats=False))": "track_running_stats",
    "Does(lambda net, x: net.inner(x.cumsum(0)))": "mixes images",
    "normed(nn.BatchNorm1d(768))": "Expected more than 1 value",
    "Does(lambda net, x: (net.mean.add_(1), net.inner(x))[1])": "network.mean",
    "Does(lambda net, x: (net.inner(x), x))": "tuple",
    "3": "int",
    "1 / 0": "ZeroDivisionError",
    "sys.exit(0)": "SystemExit",
}
FILES = {  # the whole file
    "def Net(": "SyntaxError",
    "import nowhere_to_be_found": "nowhere_to_be_found",
    "raise SystemExit": "SystemExit",
    "x = 3": "Net",
    "Net = 3": "TypeError",
}
FAULTY = """
import sys, torch
from torch import nn
def normed(norm):
    flat = [nn.Flatten(), norm] if isinstance(norm, nn.BatchNorm1d) else [norm, nn.Flatten()]
    return nn.Sequential(*flat, nn.Linear(768, 3))
class Does(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.inner = function, nn.Linear(768, 3)
        self.kept = [self.inner.weight]
        self.register_buffer("mean", torch.zeros(768))
    def forward(self, x):
        return self.function(self, x.flatten(1))
def Linear():
    return Does(lambda net, x: net.inner(x))
def Net():
    return """


@pytest.mark.parametrize("network", [*MODULES, *FILES])
def test_modules_that_cannot_be_learners(master, net, network):
    net.write_text(FAULTY + network + "\n" if network in MODULES else network)
    batch = 1 if "BatchNorm1d(768))" in network else 25
    done = train(master, "logs", "--batch-size", batch)
    refused(done, "net.py:Net", (MODULES | FILES)[network])
    assert not Path("logs-719").exists()


FLAGS = ["net.py", "net.py:", ":Net", "net.py:3", "nowhere.py:Net", "net.txt:Net", "conv5", ""]
CONV4_ONLY = ["--mode pretrain", "--method linear-head", "--precision bf16"]


@pytest.mark.parametrize(
    ("value", "words"), [*((f, "") for f in FLAGS), *(("net.py:Net", w) for w in CONV4_ONLY)]
)
def test_flags_that_cannot_be(net, value, words):
    with pytest.raises(UserError, match=words or "--learner"):
        resolve(parse(["--learner", value, *words.split()]))


@pytest.mark.parametrize("size", ["16", "84"])
def test_the_example(monkeypatch, size):
    monkeypatch.chdir(ROOT)
    made("examples/own_network.py:Net", "--image-size", size)


def test_a_module_beside_it_can_be_imported_but_hides_none_of_ours(master, net):
    Path("utils.py").write_text("raise ImportError('hidden')\n")
    Path("blocks_of_mine.py").write_text(NET)
    net.write_text("from blocks_of_mine import Net\nimport utils\nutils.UserError\n")
    succeeded(train(master, "logs", episode=1))


def test_steps_that_leave_it_at_chance_are_explained(net, capsys):
    for flags in ((), ("--bi-init", "0", "0")):
        made("net.py:Net", *flags)
        assert ("--bi-init" in capsys.readouterr().out) == (not flags)


def test_parameters_and_features_are_its_own(net):
    assert torch.equal(made().get_flat_params(), made().get_flat_params())  # the seed's
    assert not hasattr(made(), "features")
    own = "class Own(nn.Sequential):\n    def features(self, x):\n        return self[:-1](x)\n"
    net.write_text(NET.replace("nn.Sequential(", "Own(") + own)
    learner, x = made(), torch.randn(2, 3, 16, 16)
    assert torch.equal(learner.features(x), learner.network.features(x))
