"""Memory that is exhausted, worker processes that fail or have nothing for a long time, and GPUs
that cannot be used: one line, or the fallback.
"""

import errno
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
    assert_same_runs,
    completed,
    kill_self,
    refused,
    succeeded,
    tensors,
    train,
    training,
)

from dataloader import EpisodeDataset
from engine.backend import select_backend
from engine.distributed import PeerLost, Ranks
from engine.flags import resolve
from engine.process import explain_failures
from engine.stream import episodes
from fast import gpu
from utils import UserError

MAIN = ("-", sys.executable, str(ROOT / "main.py"))
slow = pytest.mark.slow
ERRORS = {
    "PyTorch's": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    "Python's": MemoryError(),
    "a thread's": RuntimeError("can't start new thread"),
    "a fork's": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "CUDA's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA's other": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    "Triton's": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS's": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_one_line_names_the_flags(error):
    culprits = r"out of memory.*--image-size.*--filters.*--n-workers"
    with pytest.raises(UserError, match=culprits), explain_failures():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EBADF, "bad")])
def test_other_errors_are_not_explained_away(error):
    with pytest.raises(type(error)), explain_failures():
        raise error


def test_batch_norm_of_one_image_is_explained():
    with pytest.raises(UserError, match="--batch-size"), explain_failures():
        torch.nn.BatchNorm1d(2).train()(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="other"), explain_failures():
        raise ValueError("other")


@slow
def test_a_real_limit(master, tmp_path):
    words = training(master, tmp_path / "logs", "--image-size", 1024, "--filters", 1024)
    done = completed(["bash", "-c", 'ulimit -v 9000000; exec "$@"', *MAIN, *words])
    refused(done, "out of memory", "--image-size")


def test_memory_is_the_fault_of_neither_a_kernel_nor_another_rank():
    for function in (lambda f: gpu._agrees(resolve, None, 0.1, f), Ranks(0, 2)._call):
        with pytest.raises(torch.OutOfMemoryError):
            function(Mock(side_effect=ERRORS["CUDA's"]))


# ---- Worker processes ----


class Items:
    """Stands in for a split's episodes: the function of an index."""

    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 6

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


@slow
@pytest.mark.parametrize("options", ["size=2m", "ro", "size=4k,nr_inodes=2"])
def test_a_small_dev_shm(master, tmp_path, options):
    """A real one, where this process may mount it."""
    words = training(master, tmp_path / "logs", "--image-size", 256, "--n-workers", 2)
    mount = f'mount -t tmpfs -o {options} x /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount]
    if completed([*command, "-", "true"]).returncode:
        pytest.skip("may not mount")
    refused(completed([*command, *MAIN, *words]), "/dev/shm", "--n-workers 0")


def test_the_wait_has_a_limit(monkeypatch):
    monkeypatch.setattr("engine.stream.LONGEST_WAIT", 2)
    waits = []
    with pytest.raises(UserError, match=r"--n-workers 2.*2 seconds"):
        stream(lambda index: time.sleep(3.5) or (index,), lambda: waits.append(1))
    assert waits


def test_slow_is_not_stuck(monkeypatch):
    """The limit is of one wait, not of all."""
    monkeypatch.setattr("engine.stream.LONGEST_WAIT", 3)
    found = stream(lambda index: time.sleep(1.5) or (index,))
    assert found == [(k,) for k in range(6)]


@slow
def test_a_signal_is_heeded_while_waiting(master, trained, tmp_path, monkeypatch):
    """No episode is lost: the run continues to the same bits."""
    original, parent = EpisodeDataset.order, os.getpid()

    def order(dataset, index):
        if dataset.split.name == "train" and index == 3:
            time.sleep(4)  # until the training has nothing to do but wait
            os.kill(parent, signal.SIGTERM)
            time.sleep(3)
        return original(dataset, index)

    monkeypatch.setattr(EpisodeDataset, "order", order)
    done = train(master, tmp_path / "logs", "--n-workers", 1)
    assert done.returncode == 128 + signal.SIGTERM
    assert "--resume auto" in done.stderr
    assert tensors(tmp_path / "logs")["episode"] == 3
    monkeypatch.undo()
    succeeded(train(master, tmp_path / "logs", "--resume", "auto"))
    assert_same_runs(tmp_path / "logs", trained)


ENDS = [(kill_self, "--n-workers 0"), (lambda: os._exit(3), "--resume auto")]
ENDS += [(Mock(side_effect=MemoryError), "out of memory")]


@pytest.mark.parametrize(("end", "culprit"), ENDS)
def test_a_worker_that_ends(master, tmp_path, monkeypatch, end, culprit):
    monkeypatch.setattr(EpisodeDataset, "order", lambda dataset, index: end())
    refused(train(master, tmp_path / "logs", "--n-workers", 1), "--n-workers", culprit)


def test_a_fault_of_the_program_is_not_explained_away():
    with pytest.raises(ZeroDivisionError):
        stream(lambda index: 1 / 0)
    assert not multiprocessing.active_children()


# ---- GPUs ----


@pytest.fixture
def one_gpu(monkeypatch):
    """Make a GPU on which the first operation raises the given error."""
    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda _: None}
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return lambda why: monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError(why)))


NO_CODE = "CUDA error: no kernel image is available for execution on the device"


def test_a_gpu_without_code_is_left_out(one_gpu):
    one_gpu(NO_CODE)
    backend = select_backend(resolve({"plain": True}))
    assert backend.device.type == "cpu"
    assert f"PyTorch {torch.__version__} has no code for GPU 0" in backend.description


UNUSABLE = [
    (NO_CODE, {"gpu": 0}, 1, f"GPU 0.*{NO_CODE}.*--cpu"),
    ("device is busy", {}, 1, "GPU 0.*device is busy.*--cpu"),
    ("", {}, 4, "--nproc-per-node 1"),
    ("", {"gpu": 0}, 4, "--gpu 0"),
]


@pytest.mark.parametrize(("message", "flags", "n_ranks", "culprits"), UNUSABLE)
def test_a_gpu_that_cannot_be_used(one_gpu, message, flags, n_ranks, culprits):
    one_gpu(message)
    with pytest.raises(UserError, match=culprits):
        select_backend(resolve(flags), (0, n_ranks))


def test_several_processes_without_nccl(one_gpu, monkeypatch):
    for name, value in {"is_initialized": True, "is_nccl_available": False}.items():
        monkeypatch.setattr(torch.distributed, name, Mock(return_value=value))
    with pytest.raises(UserError, match=r"NCCL.*--cpu"):
        select_backend(resolve({"plain": True}))


def test_a_rank_that_has_ended_is_noticed_before_nccl_waits_for_it():
    ranks, ended = Ranks(0, 2), RuntimeError("Connection closed by peer")
    ranks._dist = Mock(all_reduce=Mock(side_effect=ended))
    rows = torch.zeros(2, 2).as_subclass(type("OnGPU", (torch.Tensor,), {"is_cuda": True}))
    with pytest.raises(PeerLost, match="closed by peer"):
        ranks.gather(rows)
    ranks._dist.all_gather.assert_not_called()  # it waits for 30 minutes
