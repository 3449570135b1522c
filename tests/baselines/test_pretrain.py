"""Pre-training, and a linear head on its features: what comes before the paper's method, or in its
place.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    assert_same,
    dataset,
    make,
    metrics,
    pretrain,
    refused,
    run_cli,
    run_test,
    succeeded,
    tensors,
    train,
)
from torch.nn.functional import cross_entropy

from baselines.methods import MEASURED
from baselines.pretrain import pretrain_batch
from dataloader import episodes
from learner import Conv4

HEAD = ("--method", "linear-head")


@pytest.fixture(scope="module")
def pretrained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("pretrained") / "logs"
    succeeded(pretrain(master, save))
    return save


@pytest.fixture(scope="module")
def head(master, pretrained, tmp_path_factory):
    save = tmp_path_factory.mktemp("head") / "logs"
    start = ("--init-from", f"{pretrained}-719", "--bn-shift", 0.5)
    succeeded(train(master, save, *HEAD, *start))
    return save


# ---- Pre-training ----


def test_it_is_adam_on_the_loss_of_a_classifier_by_cosines(backend):
    episode, network, ordinary, _ = make(backend, dtype=torch.float64)
    ours, theirs = (torch.optim.Adam(n.parameters(), lr=1e-2) for n in (network, ordinary))
    x = torch.cat((episode.support, episode.query))
    y = torch.cat((episode.support_y, episode.query_y))
    for _ in range(5):
        loss, percent, skipped = pretrain_batch(episode, network, ours, 1e6)
        ordinary.reset_batch_stats()
        features, classes = ordinary.features(x), ordinary.cls.weight
        logits = 10 * torch.cosine_similarity(features[:, None], classes, dim=2)
        expected = cross_entropy(logits, y)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        assert torch.allclose(loss, expected, rtol=1e-9)
        right = (logits.argmax(1) == y).double().mean()
        assert float(percent) == pytest.approx(100 * float(right), rel=1e-6)
        assert not skipped
    for name, parameter in ordinary.named_parameters():
        # the gradient of a bias under batch norm is noise, which Adam makes large
        if not (name.startswith("conv") and name.endswith("bias")):
            found = network.get_parameter(name)
            assert torch.allclose(found, parameter, rtol=1e-6, atol=1e-9), name


def test_a_loss_that_is_not_finite_changes_nothing(backend):
    episode, network, *_ = make(backend)
    optimizer, before = torch.optim.Adam(network.parameters()), network.get_flat_params()
    episode.support[0, 0, 0, 0] = torch.nan
    assert pretrain_batch(episode, network, optimizer, 0.25)[2]
    assert torch.equal(network.get_flat_params(), before)


def test_a_class_has_the_same_label_in_every_batch(backend, master):
    batches = dataset(backend, master, n_class=6, n_shot=1, in_order=True)
    drawn = dataset(backend, master, n_class=6, n_shot=1)
    names = [[batches.files[k].parent.name for k in batches.numbers(i)] for i in range(6)]
    in_order = [f"class {c}" for c in range(6)]
    assert names == [in_order + [name for name in in_order for _ in range(3)]] * 6
    assert batches.numbers(0).tolist() != drawn.numbers(0).tolist()
    assert sorted(batches.numbers(0)) == sorted(drawn.numbers(0))  # the same images
    assert len({tuple(batches.numbers(i)) for i in range(6)}) == 6


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


def test_refusals(pretrained, head, tmp_path, master):
    save, start = tmp_path / "logs", ("--init-from", f"{pretrained}-719")
    refused(pretrain(master, save, "--n-class", "3"), "--n-class 3")
    refused(pretrain(master, save, "--meta-batch", "2"), "--meta-batch 2")
    refused(pretrain(master, save, *HEAD), "--method linear-head")
    refused(pretrain(master, save, "--bn-shift", "0.4"), "--bn-shift 0.4")
    refused(train(master, save, *HEAD, "--init-from", f"{head}-719"), head)
    refused(train(master, save, "--resume", start[1], "--n-class", "6"), start[1], "--init-from")
    refused(pretrain(master, save, "--resume", f"{head}-719"), head, "--save")
    refused(run_test(master, pretrained), pretrained, "--init-from")
    assert not Path(f"{save}-719").exists()


# ---- A linear head on its features ----


def test_its_backbone_is_the_pretrained_network(pretrained, head, master):
    """With the mean statistics of 20 episodes' images, and the last shift raised."""
    network, backbone = tensors(pretrained)["network"], tensors(head)["backbone"]
    learner = Conv4(16, 1e-3, 0.95, 6)
    learner.load_state_dict(network)
    learner.train().reset_batch_stats()
    for module in learner.children():
        module.momentum = None  # the mean of all batches
    shown = dataset("plain", master, n_shot=1, n_eval=2, length=MEASURED)
    with torch.no_grad():
        for e in episodes(shown, 0, 0, CPU, False):
            learner(torch.cat((e.support, e.query)))
        learner.norm4.bias += 0.5 * learner.norm4.weight.abs()
    expected = {k: v for k, v in learner.state_dict().items() if not k.startswith("cls.")}
    assert expected.keys() == backbone.keys()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        close = {"rtol": 0.05, "atol": 0.05} if "running" in name else {}  # grey levels are whole
        assert torch.allclose(backbone[name].float(), value.float(), **close), name


def test_the_head_alone_is_trained(pretrained, head, master, tmp_path):
    assert tensors(head)["metalearner"]["metalstm.cI"].shape == (3 * (32 + 1), 1)
    save, start = tmp_path / "logs", ("--init-from", f"{pretrained}-719", "--bn-shift", "0.5")
    succeeded(train(master, save, *HEAD, *start, episode=2))
    succeeded(train(master, save, *HEAD, "--resume", "auto"))
    assert metrics(save) == metrics(head)
    assert_same(tensors(save), tensors(head))
    assert_same(tensors(save, "meta-learner-2.pth.tar")["backbone"], tensors(save)["backbone"])
    refused(train(master, head, "--method", "lstm", "--resume", "auto"), "--method lstm")


def test_plain_trains_and_tests_it_alike(pretrained, head, master, tmp_path):
    start = ("--init-from", f"{pretrained}-719", "--bn-shift", "0.5")
    succeeded(train(master, tmp_path / "logs", *HEAD, *start, "--plain", episode=2))
    found, expected = metrics(tmp_path / "logs", "train"), metrics(head, "train")
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.05)
    succeeded(run_test(None, tmp_path / "logs", "--episode-test", 2, "--plain"))


def test_its_checkpoint_tests_and_predicts(head, master, tmp_path):
    succeeded(run_test(None, head, "--episode-test", 3, "--tta-permutations", 3))
    refused(run_test(None, head, "--transductive", "true"), "--transductive")
    folder, out = master / "test", tmp_path / "out"
    argv = ["--mode", "predict", "--save", head, "--cpu", "--n-shot", 2, "--support"]
    query = folder / "test class 0" / "7.jpg"
    for k in range(3):
        (tmp_path / "support" / f"{k}").mkdir(parents=True)
        for image in sorted((folder / f"test class {k}").iterdir())[:2]:
            (tmp_path / "support" / f"{k}" / image.name).write_bytes(image.read_bytes())
    succeeded(run_cli(*argv, tmp_path / "support", "--query", query, "--out", out))
    with out.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
