"""Several episodes an update: the mean of their gradients, whatever runs beside what."""

import pytest
import torch
from conftest import (
    STEPS,
    adam_state,
    assert_same,
    assert_same_runs,
    make,
    make_adam,
    metrics,
    refused,
    succeeded,
    tensors,
    train,
)

from episode import trainable_parameters, update_metalearner

M2 = ("--meta-batch", "2", "--log-freq", "3")
LONG = {"episode": 8, "val_freq": 4}


def drawn(meta):
    """Gradients and losses of two episodes."""
    return torch.randn(2, sum(p.numel() for p in trainable_parameters(meta))), torch.ones(2)


def test_it_is_the_mean_which_is_clipped(backend):
    *_, meta = make(backend)
    gradients, losses = drawn(meta)
    expected, optimizer = gradients.mean(0), torch.optim.SGD(meta.parameters(), lr=0)
    for share in (2, 0.5):
        update_metalearner(gradients, losses, meta, optimizer, share * float(expected.norm()))
        found = torch.cat([p.grad.reshape(-1) for p in meta.parameters()])
        assert torch.allclose(found, min(share, 1) * expected, rtol=1e-4)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_is_skipped_if_one_episode_is_not_finite(backend, broken):
    *_, meta = make(backend)
    optimizer, step = make_adam(backend, meta), STEPS[backend]
    gradients, losses = drawn(meta)
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


def test_the_same_bits_on_any_number_of_cores(master, batched, tmp_path):
    """And near those of plain PyTorch."""
    torch.set_num_threads(3)
    succeeded(train(master, tmp_path / "logs", *M2, **LONG))
    assert_same_runs(tmp_path / "logs", batched)
    succeeded(train(master, tmp_path / "plain", *M2, "--plain", episode=4, val_freq=4))
    # later ones drift apart: 16 px, whole grey levels or not
    found, expected = (metrics(of, "train")[0]["mean_loss"] for of in (tmp_path / "plain", batched))
    assert found == pytest.approx(expected, rel=0.02)


def test_half_an_update_is_refused(master, batched, tmp_path):
    save = tmp_path / "logs"
    refused(train(master, save, "--meta-batch", "4"), "--val-freq 2", "--meta-batch 4")
    again = ("--resume", f"{batched}-719", "--meta-batch", "3")
    refused(train(master, save, *again, episode=12, val_freq=3), "--meta-batch 3", batched)
    assert not (tmp_path / "logs-719").exists()
