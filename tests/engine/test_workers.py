"""Worker processes that fail, or that have nothing for a long time."""

import multiprocessing
import os
import signal
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    assert_same,
    completed,
    kill_self,
    refused,
    run_cli,
    succeeded,
    tensors,
    train,
    training,
)
from torch.utils.data import Dataset

import dataloader
from dataloader import EpisodeDataset, episodes
from utils import UserError


class Items(Dataset):
    """Stands in for a split's episodes: the function of an index."""

    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.function(index)

    def deliver(self, item, device):
        return item


def stream(function, waiting=lambda: None):
    return list(episodes(Items(function), 0, 2, CPU, False, waiting=waiting))


def test_shared_memory_that_is_full_is_an_error(monkeypatch):
    error = RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"--n-workers 2.*/dev/shm.*--n-workers 0"):
        stream(lambda index: (torch.zeros(9), 3))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=2m", "ro", "size=4k,nr_inodes=2"])
def test_a_small_dev_shm(master, tmp_path, options):
    """A real one, where this process may mount it."""
    words = training(master, tmp_path / "logs", "--image-size", 256, "--n-workers", 2)
    mount = f'mount -t tmpfs -o {options} x /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount]
    if completed([*command, "-", "true"]).returncode:
        pytest.skip("may not mount")
    command += ["-", sys.executable, str(ROOT / "main.py"), *words]
    refused(completed(command), "/dev/shm", "--n-workers 0")


def test_the_wait_has_a_limit(monkeypatch):
    monkeypatch.setattr(dataloader, "LONGEST_WAIT", 2)
    waits = []
    with pytest.raises(UserError, match=r"--n-workers 2.*2 seconds"):
        stream(lambda index: time.sleep(5) or (index,), lambda: waits.append(1))
    assert waits


def test_slow_is_not_stuck(monkeypatch):
    """The limit is of one wait, not of all."""
    monkeypatch.setattr(dataloader, "LONGEST_WAIT", 3)
    waits = []
    found = stream(lambda index: time.sleep(1.5) or (index,), lambda: waits.append(1))
    assert found == [(k,) for k in range(8)]
    assert len(waits) > 3


@pytest.mark.slow
def test_a_signal_is_heeded_while_waiting(master, tmp_path, monkeypatch):
    """No episode is lost: the run continues to the same bits."""
    original, parent = EpisodeDataset.order, os.getpid()

    def order(dataset, index):
        if dataset.split.name == "train" and index == 3:
            time.sleep(4)  # until the training has nothing to do but wait
            os.kill(parent, signal.SIGTERM)
            time.sleep(3)
        return original(dataset, index)

    monkeypatch.setattr(EpisodeDataset, "order", order)
    done = train(master, tmp_path / "logs", "--n-workers", 1, val_freq=0)
    assert done.returncode == 128 + signal.SIGTERM
    assert "--resume auto" in done.stderr
    assert tensors(tmp_path / "logs")["episode"] == 3
    monkeypatch.undo()
    succeeded(train(master, tmp_path / "logs", "--resume", "auto", val_freq=0))
    succeeded(train(master, tmp_path / "other", val_freq=0))
    assert_same(*(tensors(tmp_path / save) for save in ("logs", "other")))


@pytest.mark.parametrize("end", [kill_self, lambda: os._exit(3)])
def test_a_worker_that_dies(master, tmp_path, monkeypatch, end):
    monkeypatch.setattr(EpisodeDataset, "order", lambda dataset, index: end())
    words = training(master, tmp_path / "logs", "--n-workers", 1)
    refused(run_cli(*words), "worker", "--n-workers 0", "--resume auto")


def test_a_worker_out_of_memory(master, tmp_path, monkeypatch):
    monkeypatch.setattr(EpisodeDataset, "order", Mock(side_effect=MemoryError))
    refused(train(master, tmp_path / "logs", "--n-workers", 1), "out of memory", "--n-workers")


def test_a_fault_of_the_program_is_not_explained_away():
    with pytest.raises(ZeroDivisionError):
        stream(lambda index: 1 / 0)
    assert not multiprocessing.active_children()
