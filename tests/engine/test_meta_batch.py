"""Several episodes an update: the mean of their gradients, whatever runs beside what."""

import copy
import os
import signal

import pytest
import torch
from conftest import WAYS
from test_cli import expect, metrics, tensors, train
from test_episode import make, new_episode
from test_resume import assert_same

from around import lanes
from episode import adapt, meta_gradient, query_loss, train_episode, update_metalearner
from fast.graphs import step_without_sync

M2 = ("--meta-batch", "2")


def stacked(episodes, *models):
    gradients, losses, _ = zip(
        *(meta_gradient(episode, *models, 100) for episode in episodes), strict=True
    )
    return torch.stack(gradients), torch.stack(losses)


def moments(optimizer):
    return [t.clone() for state in optimizer.state.values() for t in state.values()]


def test_it_is_the_gradient_of_the_mean_loss(way):
    first, w_grad, wo_grad, meta = make(way, dtype=torch.float64)
    group = [first, new_episode(dtype=torch.float64), new_episode(dtype=torch.float64)]
    optimizer = torch.optim.SGD(meta.parameters(), lr=0)
    update_metalearner(*stacked(group, w_grad, wo_grad, meta), meta, optimizer, 1e6)
    found = [p.grad.clone() for p in meta.parameters()]
    total = 0
    for episode in group:
        pair = copy.deepcopy(
            (w_grad, wo_grad.train())
        )  # each graph needs its own running statistics
        cI, _ = adapt(episode, pair[0], meta, 100)
        total = total + query_loss(episode, *pair, cI)[0]
    expected = torch.autograd.grad(total / 3, list(meta.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-15)
    norm = torch.cat([g.reshape(-1) for g in expected]).norm()
    update_metalearner(*stacked(group, w_grad, wo_grad, meta), meta, optimizer, float(norm) / 2)
    for p, theirs in zip(
        meta.parameters(), expected, strict=True
    ):  # clipped after the mean is taken
        assert torch.allclose(p.grad, theirs / 2, rtol=1e-4, atol=1e-12)


def test_one_episode_an_update_is_train_episode(way):
    episode, w_grad, wo_grad, meta = make(way)
    optimizer = torch.optim.Adam(meta.parameters())
    update_metalearner(*stacked([episode], w_grad, wo_grad, meta), meta, optimizer, 0.25)
    others = make(way)
    other = torch.optim.Adam(others[3].parameters())
    train_episode(*others, other, 100, 0.25)
    assert all(
        torch.equal(a, b) for a, b in zip(meta.parameters(), others[3].parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(moments(optimizer), moments(other), strict=True))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_is_skipped_if_one_episode_is_not_finite(way, broken):
    episode, w_grad, wo_grad, meta = make(way)
    optimizer = torch.optim.Adam(meta.parameters(), fused=way == "fast")
    step = {"step": step_without_sync} if way == "fast" else {}
    gradients, losses = stacked([episode, new_episode()], w_grad, wo_grad, meta)
    assert not update_metalearner(gradients, losses, meta, optimizer, 0.25, **step)
    before = [t.clone() for t in (*meta.parameters(), *moments(optimizer))]
    bad = (gradients.clone(), losses.clone())
    bad[broken == "loss"][1] = float("inf")
    assert update_metalearner(*bad, meta, optimizer, 0.25, **step)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (*meta.parameters(), *moments(optimizer)), strict=True)
    )
    assert not update_metalearner(gradients, losses, meta, optimizer, 0.25, **step)
    assert not torch.equal(before[0], next(meta.parameters()))


@pytest.fixture(scope="module")
def trained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("meta-batch") / "logs"
    assert train(master, save, *M2, "--log-freq", "3", episode=8, val_freq=4) == 0
    return save


def test_the_log_counts_episodes(trained):
    lines = metrics(trained, "train")
    assert [line["episode"] for line in lines] == [
        4,
        6,
        8,
    ]  # the first update at or after 3, 6 and 8
    assert [line["skipped"] for line in lines] == [0, 0, 0]
    assert [line["episode"] for line in metrics(trained, "val")] == [4, 8]
    assert tensors(trained)["hyper_parameters"]["meta_batch"] == 2
    assert {int(state["step"]) for state in tensors(trained)["optim"]["state"].values()} == {4}


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_same_bits_on_any_number_of_cores(master, trained, tmp_path, n_threads):
    kept = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert train(master, tmp_path / "logs", *M2, "--log-freq", "3", episode=8, val_freq=4) == 0
    finally:
        torch.set_num_threads(kept)
    assert metrics(tmp_path / "logs") == metrics(trained)
    assert_same(tensors(tmp_path / "logs"), tensors(trained))


def test_plain_agrees(master, trained, tmp_path):
    assert (
        train(master, tmp_path / "logs", *M2, "--plain", "--log-freq", "3", episode=8, val_freq=4)
        == 0
    )
    found, expected = (
        metrics(save, "train")[0]["mean_loss"] for save in (tmp_path / "logs", trained)
    )
    assert found == pytest.approx(
        expected, rel=0.02
    )  # later ones drift apart: 16 px, whole grey levels or not


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_waits_for_the_end_of_the_update(
    master, trained, tmp_path, monkeypatch, way, capsys
):
    """It comes in the second update's first episode; resumed, the run has the bits and logs of an
    undisturbed one.
    """
    original, calls = lanes.meta_gradient, []

    def signalled(*args):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(lanes, "meta_gradient", signalled)
    flags = (*M2, "--log-freq", "3", "--resume", "auto", *(["--plain"] if way == "plain" else []))
    assert train(master, tmp_path / "logs", *flags, episode=8, val_freq=4) == 128 + signal.SIGTERM
    assert "after episode 4" in capsys.readouterr().err
    assert tensors(tmp_path / "logs")["episode"] == 4
    assert train(master, tmp_path / "logs", *flags, episode=8, val_freq=4) == 0
    if way == "fast":
        assert metrics(tmp_path / "logs") == metrics(trained)
        assert_same(tensors(tmp_path / "logs"), tensors(trained))


def test_half_an_update_is_refused(master, trained, tmp_path, capsys):
    save = tmp_path / "logs"
    expect(
        capsys,
        train(master, save, *M2, episode=5),
        "--episode 5: not a multiple of --meta-batch 2",
        "give 6",
    )
    expect(
        capsys,
        train(master, save, "--meta-batch", "4"),
        "--val-freq 2: not a multiple of --meta-batch 4",
        "give 4",
    )
    again = ("--resume", str(trained.with_name("logs-719")), "--meta-batch", "3")
    expect(
        capsys,
        train(master, save, *again, episode=12, val_freq=3),
        "--meta-batch 3",
        "has seen 8 episodes",
    )
    assert not save.with_name("logs-719").exists()
    expect(capsys, train(master, save, "--meta-batch", "0"), "--meta-batch")


def test_a_checkpoint_that_does_not_say_has_one_episode_an_update(master, tmp_path, capsys):
    save = tmp_path / "logs"
    assert train(master, save) == 0
    content = tensors(save)
    del content["hyper_parameters"]["meta_batch"]
    torch.save(content, tmp_path / "logs-719" / "ckpts" / "meta-learner-last.pth.tar")
    code = train(master, save, *M2, "--resume", "auto", episode=6)
    expect(capsys, code, "--meta-batch 2", "was begun with --meta-batch 1")
    assert train(master, save, "--resume", "auto", episode=6) == 0
    assert tensors(save)["hyper_parameters"]["meta_batch"] == 1
