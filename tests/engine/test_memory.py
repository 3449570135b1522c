"""Exhausted memory, in each phase, and GPUs that cannot be used: one line, or the fallback."""

import contextlib
import errno
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import ROOT, completed, refused, train, training

from engine import model as models
from engine.backend import select_backend
from engine.distributed import PeerLost, Ranks
from engine.flags import resolve
from fast import gpu
from fast.graphs import CUDAGraphFunction
from utils import UserError, out_of_memory

ERRORS = {
    "PyTorch's": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    "Python's": MemoryError(),
    "a thread's": RuntimeError("can't start new thread"),
    "a fork's": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "CUDA's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA's other": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    "Triton's": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS's": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_one_line_names_the_flags(master, tmp_path, monkeypatch, error):
    monkeypatch.setattr(models, "meta_gradient", Mock(side_effect=error))
    done = train(master, tmp_path / "logs")
    refused(done, "out of memory", "--image-size", "--filters", "--n-workers")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EBADF, "bad")])
def test_other_errors_are_not_explained_away(master, tmp_path, monkeypatch, error):
    monkeypatch.setattr(models, "meta_gradient", Mock(side_effect=error))
    with pytest.raises(type(error)):
        train(master, tmp_path / "logs")


@pytest.mark.slow
def test_a_real_limit(master, tmp_path):
    words = training(master, tmp_path / "logs", "--image-size", 1024, "--filters", 1024)
    line = 'ulimit -v 9000000; exec "$@"'
    done = completed(["bash", "-c", line, "-", sys.executable, str(ROOT / "main.py"), *words])
    refused(done, "out of memory", "--image-size")


# ---- GPUs ----


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


TOO_MUCH = OutOfResources("out of resource: shared memory")


@pytest.mark.parametrize("error", [e for e in ERRORS.values() if isinstance(e, RuntimeError)])
def test_a_kernel_is_not_blamed_for_the_memory(error):
    with pytest.raises(RuntimeError):
        gpu._agrees(test_a_real_limit, None, 0.1, Mock(side_effect=error))


def test_a_kernel_that_needs_too_much_is_left_out(capsys):
    assert not gpu._agrees(test_a_real_limit, None, 0.1, Mock(side_effect=TOO_MUCH))
    assert "out of resource" in capsys.readouterr().out
    assert not out_of_memory(TOO_MUCH)


@pytest.mark.parametrize("error", [TOO_MUCH, ERRORS["CUDA's"]])
def test_a_capture_that_fails_falls_back(monkeypatch, capsys, error):
    for name in ("CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", MagicMock())
    torch.cuda.graph().__enter__.side_effect = error
    captured = CUDAGraphFunction(lambda episode: ())
    captured._capture()
    assert captured.graph is None
    assert str(error) in capsys.readouterr().out


@pytest.fixture
def one_gpu(monkeypatch):
    """A GPU on which the first operation raises the given error."""

    def set_up(message):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError(message)))

    return set_up


NO_CODE = "CUDA error: no kernel image is available for execution on the device"


def test_a_gpu_without_code_is_left_out(one_gpu):
    one_gpu(NO_CODE)
    backend = select_backend(resolve({"plain": True}))
    assert backend.device.type == "cpu"
    assert f"PyTorch {torch.__version__} has no code for GPU 0" in backend.description


@pytest.mark.parametrize(
    ("message", "flags", "n_ranks", "culprits"),
    [
        (NO_CODE, {"gpu": 0}, 1, f"GPU 0.*{NO_CODE}.*--cpu"),
        ("CUDA error: out of memory", {}, 1, "GPU 0.*out of memory.*--cpu"),
        ("device is busy", {}, 1, "GPU 0.*device is busy.*--cpu"),
        ("", {}, 4, "--nproc-per-node 1"),
        ("", {"gpu": 0}, 4, "--gpu 0"),
    ],
)
def test_a_gpu_that_cannot_be_used(one_gpu, message, flags, n_ranks, culprits):
    one_gpu(message)
    with pytest.raises(UserError, match=culprits):
        select_backend(resolve(flags), (0, n_ranks))


def test_several_processes_without_nccl(one_gpu, monkeypatch):
    one_gpu("")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"NCCL.*--cpu"):
        select_backend(resolve({"plain": True}))
    assert select_backend(resolve({"plain": True, "cpu": True})).device.type == "cpu"


def test_a_rank_that_has_ended_is_noticed_before_nccl_waits_for_it():
    ranks, ended = Ranks(0, 2), RuntimeError("Connection closed by peer")
    ranks._dist = Mock(all_reduce=Mock(side_effect=ended))
    rows = torch.zeros(2, 2).as_subclass(type("OnGPU", (torch.Tensor,), {"is_cuda": True}))
    with pytest.raises(PeerLost, match="closed by peer"):
        ranks.gather(rows)
    ranks._dist.all_gather.assert_not_called()  # it waits for 30 minutes


def test_memory_is_not_a_lost_rank():
    with pytest.raises(torch.OutOfMemoryError):
        Ranks(0, 2)._call(Mock(side_effect=ERRORS["CUDA's"]))
