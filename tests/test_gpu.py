"""The Triton kernels without a GPU: Triton's interpreter runs them, and its compiler translates them for two GPUs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dataloader import draw_augmentation
from fast import augment, gpu

triton = pytest.importorskip("triton")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")


@pytest.mark.skipif(INTERPRETED, reason="it is this run")
def test_in_the_interpreter():
    """In a process of its own, because Triton chooses when it is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "pytorchs"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "s" not in done.stdout.split()[0], done.stdout  # none was skipped


def pictures(n, size, device="cpu"):
    """Images from grey to colourful, with black, white and grey ones, and a draw of colours for each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, size, size, generator=generator) * 255
    x[: n // 2] = x[: n // 2].round()
    x[0], x[1], x[2] = 0, 255, x[2, :1]
    drawn = draw_augmentation(3, "train", 0, np.full((n, 2), size))
    table = torch.from_numpy(augment.table(augment.Windows.crops(drawn.box, size), drawn))
    return x.to(device), table[:, 9:13].to(device), table[:, 13:].long().to(device)


@in_interpreter
@pytest.mark.parametrize("size", [16, 33, 84])  # smaller than a block, not a multiple of it, several
def test_colours_are_pytorchs(size):
    x, factors, order = pictures(24, size)
    given = x.clone()
    ours, theirs = gpu.colour(x, factors, order), augment._colour_together(x.clone(), factors, order)
    assert torch.equal(x, given)
    difference = (ours - theirs).abs()
    assert difference.mean() < 1e-3
    assert (difference > 1e-2).float().mean() < 1e-3  # a hue beside one of Pillow's steps


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "signature", "constants"),
    [("_colour", {"x": "*fp32", "factors": "*fp32", "order": "*i64", "out": "*fp32", "n_pixels": "i32"}, {"BLOCK": 1024})],
)
def test_kernels_compile(kernel, signature, constants, capability):
    """Down to machine code, for an A100 and an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(getattr(gpu, kernel), signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]


class OnGPU(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = True


def test_a_kernel_that_fails_or_differs_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "_works", {})
    calls = []

    def good(x):
        calls.append("good")
        return x + 1e-3

    def bad(x):
        calls.append("bad")
        return x + 1

    def broken(x):
        calls.append("broken")
        raise SystemError("no compiler\nmore")

    def code(x):
        return x.clone()

    x = torch.zeros(3).as_subclass(OnGPU)
    for kernel, expected in ((good, 1e-3), (bad, 0), (broken, 0)):
        for _ in range(3):
            assert torch.equal(gpu.replaced(kernel, code, 0.01, x), x + expected)
    assert calls == ["good"] * 4 + ["bad", "broken"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "kernel bad" in said[0]
    assert "differs" in said[0]
    assert said[1].endswith("SystemError: no compiler")
    calls.clear()
    gpu.replaced(good, code, 0.01, torch.zeros(3))
    assert not calls


@CUDA
def test_kernels_work_on_this_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_works", {})
    x, factors, order = pictures(100, 84, "cuda")
    found = augment._colour(x, factors, order)
    assert gpu._works == {gpu.colour: True}
    assert torch.equal(found, augment._colour(x, factors, order))
    assert capsys.readouterr().out == ""
