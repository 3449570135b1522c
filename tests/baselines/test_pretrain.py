"""Pre-training: what comes before the paper's method, or before those of test_methods.py."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    assert_same,
    dataset,
    make,
    metrics,
    pretrain,
    refused,
    run_test,
    succeeded,
    tensors,
    train,
)
from torch.nn.functional import cosine_similarity, cross_entropy

from baselines.pretrain import PretrainModel
from learner import Conv4


@pytest.fixture(scope="module")
def pretrained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("pretrained") / "logs"
    succeeded(pretrain(master, save))
    return save


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_loss_and_gradient_are_those_of_a_classifier(backend, classifier):
    episode, network, ordinary, _ = make(backend, dtype=torch.float64)
    x = torch.cat((episode.support, episode.query))
    y = torch.cat((episode.support_y, episode.query_y))
    args = argparse.Namespace(classifier=classifier)
    gradient, loss, percent = PretrainModel(network).gradient(args, episode)
    logits, weights = ordinary(x), ordinary.cls.weight
    if classifier == "cosine":
        logits = 10 * cosine_similarity(ordinary.features(x)[:, None], weights, dim=2)
    expected = cross_entropy(logits, y)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)
    right = (logits.argmax(1) == y).double().mean()
    assert float(percent) == pytest.approx(100 * float(right), rel=1e-6)
    for (name, parameter), found in zip(
        ordinary.named_parameters(), network.slices(gradient), strict=True
    ):
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9), name


def test_a_class_has_the_same_label_in_every_batch(backend, master):
    batches = dataset(backend, master, n_class=6, n_shot=1, in_order=True)
    drawn = dataset(backend, master, n_class=6, n_shot=1)
    names = [[batches.files[k].parent.name for k in batches.indices(i)] for i in range(6)]
    in_order = [f"class {c}" for c in range(6)]
    assert names == [in_order + [name for name in in_order for _ in range(3)]] * 6
    assert batches.indices(0).tolist() != drawn.indices(0).tolist()
    assert sorted(batches.indices(0)) == sorted(drawn.indices(0))  # the same images
    assert len({tuple(batches.indices(i)) for i in range(6)}) == 6


def test_it_learns(pretrained, tmp_path, master):
    assert [m["episode"] for m in metrics(pretrained)] == [1, 2, 3, 4]
    assert tensors(pretrained)["mode"] == "pretrain"
    assert tensors(pretrained)["hyper_parameters"]["n_class"] == 6
    flags = ("--lr", "1e-2", "--augment", "flip", "--lr-decay", "0.5")
    succeeded(pretrain(master, tmp_path / "long", *flags, episode=60))
    losses = [m["loss"] for m in metrics(tmp_path / "long")]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_it_resumes_to_the_same_bits(pretrained, tmp_path, master):
    save = tmp_path / "logs"
    succeeded(pretrain(master, save, episode=2))
    succeeded(pretrain(master, save, "--resume", "auto"))
    assert metrics(save) == metrics(pretrained)
    assert_same(tensors(save), tensors(pretrained))


def test_plain_agrees(pretrained, tmp_path, master):
    succeeded(pretrain(master, tmp_path / "logs", "--plain", episode=2))
    found, expected = metrics(tmp_path / "logs"), metrics(pretrained)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)


def test_the_papers_method_may_start_from_it(pretrained, tmp_path, master):
    """From its convolutions, with an empty classifier and the flags' own gates."""
    save, flags = tmp_path / "logs", ("--lr", "1e-30", "--bi-init", "0.5", "0.6")
    succeeded(train(master, save, "--init-from", pretrained, *flags, episode=1, val_freq=0))
    found = tensors(save)
    cI, network = found["metalearner"]["metalstm.cI"][:, 0], tensors(pretrained)["network"]
    n = 3 * (32 + 1)  # of the classifier
    learner = Conv4(16, 1e-3, 0.95, 6)
    learner.load_state_dict(network)
    assert torch.equal(cI[:-n], learner.get_flat_params()[: -2 * n])
    assert cI[-n:].abs().max() < 1e-20
    assert 0.5 <= found["metalearner"]["metalstm.bI"] <= 0.6
    origin = {"checkpoint": "logs-719/meta-learner-last.pth.tar", "episode": 4}
    assert found["about"]["started_from"] == origin


def test_refusals(pretrained, tmp_path, master):
    save, start = tmp_path / "logs", f"{pretrained}-719"
    refused(pretrain(master, save, "--n-class", "3"), "--n-class 3")
    refused(pretrain(master, save, "--meta-batch", "2"), "--meta-batch 2")
    refused(pretrain(master, save, "--method", "linear-head"), "--method linear-head")
    refused(pretrain(master, save, "--bn-shift", "0.4"), "--bn-shift 0.4")
    refused(train(master, save, "--resume", start, "--n-class", "6"), start, "--init-from")
    refused(run_test(master, pretrained), pretrained, "--init-from")
    assert not Path(f"{save}-719").exists()


def test_leaks_are_looked_for(data, tmp_path):
    shutil.copytree(data / "train" / "class 0", data / "test" / "class 0")
    refused(pretrain(data, tmp_path / "logs"), data, "class 0")
