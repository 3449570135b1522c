"""The moving average of the weights: what it is, and where it takes their place."""

import pytest
import torch
from conftest import assert_same, metrics, refused, run_cli, run_test, succeeded, tensors, train

from data.layout import scan_split
from engine.backend import dataset
from engine.ema import TRAINED
from engine.evaluation import Evaluator
from engine.flags import parse
from main import load_model

EMA = ("--ema", "0.3", "--lr", "0.05")


@pytest.fixture(scope="module")
def averaged(master, tmp_path_factory):
    """A run with a checkpoint after each of its four episodes."""
    save = tmp_path_factory.mktemp("averaged") / "logs"
    succeeded(train(master, save, *EMA, val_freq=1))
    return save


def nth(save, n):
    return tensors(save, f"meta-learner-{n}.pth.tar")


def assert_averaged(before, content, decay):
    """A checkpoint holds the average of its trained weights and the average before."""
    for name, found in content["metalearner"].items():
        expected = decay * before[name].double() + (1 - decay) * content[TRAINED][name].double()
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7), name


def test_it_is_the_average_of_the_weights_of_a_run_without(master, averaged, tmp_path):
    """Recomputed in float64, with a decay that rises from 2/11 to --ema."""
    succeeded(train(master, tmp_path / "logs", *EMA[2:], val_freq=1))
    for n, decay in ((2, 3 / 12), (3, 0.3), (4, 0.3)):
        content, plain = nth(averaged, n), nth(tmp_path / "logs", n)
        assert_averaged(nth(averaged, n - 1)["metalearner"], content, decay)
        assert_same(plain["metalearner"], content[TRAINED])
        assert_same(plain["optim"], content["optim"])


def test_it_is_what_is_validated(master, averaged):
    """A checkpoint, loaded as a test loads it, has the logged accuracies."""
    path = f"{averaged}-719/ckpts/meta-learner-4.pth.tar"
    flags = parse(["--data-root", str(master), "--resume", path, "--cpu", "--n-workers", "0"])
    args, _, backend, model = load_model(flags)
    val_set = dataset(args, backend, scan_split(args.data_root, "val"), 2)
    losses, _ = Evaluator(args, backend, model)(val_set)
    logged = metrics(averaged, "val")[-1]
    assert logged["episode"] == 4
    assert sum(losses) / 2 == pytest.approx(logged["loss"]["mean"], rel=1e-6)
    _, _, _, model = load_model({**flags, "ema": 0.0})
    assert_same(model.metalearner.state_dict(), nth(averaged, 4)[TRAINED])


@pytest.mark.parametrize("flags", [(), ("--meta-batch", "2")])
def test_a_resumed_run_reaches_the_same_bits(master, tmp_path, flags):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    succeeded(train(master, whole, *EMA, *flags))
    succeeded(train(master, halves, *EMA, *flags, episode=2))
    succeeded(train(master, halves, "--resume", "auto", *flags))
    assert tensors(halves)["hyper_parameters"]["ema"] == 0.3
    assert_same(tensors(whole), tensors(halves))


def test_a_run_without_goes_on_with_it(master, trained, tmp_path):
    """The average starts from its weights."""
    save = tmp_path / "logs"
    succeeded(train(master, save, "--resume", trained, *EMA, episode=5, val_freq=1))
    assert_averaged(tensors(trained)["metalearner"], tensors(save), 0.3)


def test_a_run_goes_on_without_it(master, averaged, tmp_path):
    """In another folder, as if it had never averaged."""
    succeeded(train(master, tmp_path / "a", "--resume", averaged, "--ema", "0", episode=6))
    succeeded(train(master, tmp_path / "b", *EMA[2:], episode=6))
    assert_same(tensors(tmp_path / "a")["metalearner"], tensors(tmp_path / "b")["metalearner"])


def test_an_exported_run_has_the_average_alone(master, averaged, tmp_path):
    succeeded(run_test(master, averaged, "--episode-test", 2))
    succeeded(run_cli("--mode", "export", "--save", averaged, "--to", tmp_path))
    (file,) = tmp_path.rglob("meta-learner.pth.tar")
    exported = torch.load(file, weights_only=True)
    assert TRAINED not in exported
    assert_same(exported["metalearner"], nth(averaged, exported["episode"])["metalearner"])
    refused(run_test(master, "x", "--resume", file, "--ema", "0"), "--ema 0", file, "--ema 0.3")
