"""Several episodes an update: the mean of their gradients, whatever runs beside what."""

import copy
import signal

import pytest
import torch
from conftest import (
    STEPS,
    adam_state,
    assert_same,
    before_call,
    kill_self,
    make,
    make_adam,
    metrics,
    new_episode,
    refused,
    succeeded,
    tensors,
    train,
)

from engine import model as models
from episode import adapt, meta_gradient, query_loss, update_metalearner

M2 = ("--meta-batch", "2", "--log-freq", "3")
LONG = {"episode": 8, "val_freq": 4}


def stacked(episodes, *models):
    gradients, losses, _ = zip(
        *(meta_gradient(episode, *models, 100) for episode in episodes), strict=True
    )
    return torch.stack(gradients), torch.stack(losses)


def test_it_is_the_gradient_of_the_mean_loss(backend):
    first, w_grad, wo_grad, meta = make(backend, dtype=torch.float64)
    group = [first, new_episode(dtype=torch.float64), new_episode(dtype=torch.float64)]
    optimizer = torch.optim.SGD(meta.parameters(), lr=0)
    update_metalearner(*stacked(group, w_grad, wo_grad, meta), meta, optimizer, 1e6)
    found = [p.grad.clone() for p in meta.parameters()]
    total = 0
    for episode in group:
        pair = copy.deepcopy((w_grad, wo_grad.train()))  # with its own running statistics
        cI, _ = adapt(episode, pair[0], meta, 100)
        total = total + query_loss(episode, *pair, cI)[0]
    expected = torch.autograd.grad(total / 3, list(meta.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-15)
    norm = torch.cat([g.reshape(-1) for g in expected]).norm()
    update_metalearner(*stacked(group, w_grad, wo_grad, meta), meta, optimizer, float(norm) / 2)
    for p, theirs in zip(meta.parameters(), expected, strict=True):  # clips the mean
        assert torch.allclose(p.grad, theirs / 2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_is_skipped_if_one_episode_is_not_finite(backend, broken):
    episode, w_grad, wo_grad, meta = make(backend)
    optimizer, step = make_adam(backend, meta), STEPS[backend]
    gradients, losses = stacked([episode, new_episode()], w_grad, wo_grad, meta)
    assert not update_metalearner(gradients, losses, meta, optimizer, 0.25, step)
    before = [t.clone() for t in (*meta.parameters(), *adam_state(optimizer))]
    bad = (gradients.clone(), losses.clone())
    bad[broken == "loss"][1] = float("inf")
    assert update_metalearner(*bad, meta, optimizer, 0.25, step)
    assert_same(before, [t.detach() for t in (*meta.parameters(), *adam_state(optimizer))])
    assert not update_metalearner(gradients, losses, meta, optimizer, 0.25, step)
    assert not torch.equal(before[0], next(meta.parameters()))


@pytest.fixture(scope="module")
def batched(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("meta-batch") / "logs"
    succeeded(train(master, save, *M2, **LONG))
    return save


def test_the_log_counts_episodes(batched):
    lines = metrics(batched, "train")
    # the first update at or after 3, 6 and 8
    assert [line["episode"] for line in lines] == [4, 6, 8]
    assert [line["skipped"] for line in lines] == [0, 0, 0]
    assert [line["episode"] for line in metrics(batched, "val")] == [4, 8]
    assert tensors(batched)["hyper_parameters"]["meta_batch"] == 2
    assert {int(state["step"]) for state in tensors(batched)["optim"]["state"].values()} == {4}


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_same_bits_on_any_number_of_cores(master, batched, tmp_path, n_threads):
    torch.set_num_threads(n_threads)
    try:
        succeeded(train(master, tmp_path / "logs", *M2, **LONG))
    finally:
        torch.set_num_threads(1)
    assert metrics(tmp_path / "logs") == metrics(batched)
    assert_same(tensors(tmp_path / "logs"), tensors(batched))


def test_a_signal_waits_for_the_end_of_the_update(master, batched, tmp_path, monkeypatch, backend):
    """It comes in the second update's first episode; a resumed run has the bits of another one."""
    save, at = tmp_path / "logs", (monkeypatch.setattr, models, "meta_gradient")
    before_call(*at, lambda n: kill_self(signal.SIGTERM) if n == 3 else None)
    flags = (*M2, "--resume", "auto", *(["--plain"] if backend == "plain" else []))
    assert train(master, save, *flags, **LONG).returncode == 128 + signal.SIGTERM
    assert tensors(save)["episode"] == 4
    succeeded(train(master, save, *flags, **LONG))
    if backend == "fast":
        assert metrics(save) == metrics(batched)
        assert_same(tensors(save), tensors(batched))
    else:  # later ones drift apart: 16 px, whole grey levels or not
        found, expected = (metrics(of, "train")[0]["mean_loss"] for of in (save, batched))
        assert found == pytest.approx(expected, rel=0.02)


def test_half_an_update_is_refused(master, batched, tmp_path):
    save = tmp_path / "logs"
    refused(train(master, save, *M2, episode=5), "--episode 5", "--meta-batch 2")
    refused(train(master, save, "--meta-batch", "4"), "--val-freq 2", "--meta-batch 4")
    again = ("--resume", f"{batched}-719", "--meta-batch", "3")
    refused(train(master, save, *again, episode=12, val_freq=3), "--meta-batch 3", batched)
    assert not (tmp_path / "logs-719").exists()
