"""The Triton kernels without a GPU: Triton's interpreter runs them, and its compiler translates them for two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloader import draw_augmentation
from fast import augment, gpu
from fast.metalearner import FastMetaLearner
from metalearner import MetaLearner, MetaState

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


@in_interpreter
@pytest.mark.parametrize(("hidden_size", "n_params"), [(20, 150), (16, 2 * gpu.TILE), (5, 10)])
def test_an_update_and_its_gradients_are_pytorchs(hidden_size, n_params):
    """Against float64, from a state with all its parts and for gradients of all sizes."""
    exact = MetaLearner(4, hidden_size, n_params).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.normal_(std=0.5)
    fast = FastMetaLearner(4, hidden_size, n_params)
    fast.load_state_dict(exact.state_dict())
    loss, grad = torch.tensor(1.3), torch.randn(n_params, 1) * torch.logspace(-7, 0, n_params).view(-1, 1)
    grad[3] = 0
    state = [torch.randn(n_params, k) * 0.5 for k in (hidden_size, hidden_size, 1, 1, 1)]
    weights = [torch.randn_like(t) for t in state]

    def found(meta, step, dtype):
        given = [t.to(dtype).requires_grad_() for t in state]
        made = step(loss.to(dtype), grad.to(dtype), MetaState(*given))
        total = sum((t * w.to(dtype)).sum() for t, w in zip(made, weights, strict=True))
        learned = [p for p in meta.parameters() if p is not meta.metalstm.cI]
        return *made, *torch.autograd.grad(total, [*learned, *given])

    for ours, theirs in zip(found(fast, fast._in_triton, torch.float32), found(exact, exact, torch.float64), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


COLOUR = ({"x": "*fp32", "factors": "*fp32", "order": "*i64", "out": "*fp32", "n_pixels": "i32"}, {"BLOCK": 1024})
META = {"H": 20, "W": 32, "TILE": gpu.TILE}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_colour", "_meta_forward", "_meta_backward"])
def test_kernels_compile(kernel, capability, tmp_path):
    """Down to machine code, for an A100 and an H100, whose registers suffice: nothing is spilled to memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(gpu, kernel)
    signature, constants = COLOUR if kernel == "_colour" else (dict.fromkeys(function.arg_names, "*fp32"), META)
    signature = signature | {name: "i32" for name in ("P", "N") if name in function.arg_names}
    source = ASTSource(function, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": gpu.WARPS})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip(f"{tool} is not here")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    assert " STACK:0 " in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


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

    x = torch.ones(3).as_subclass(OnGPU)
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
    gpu.replaced(good, code, 0.01, torch.ones(3))
    assert not calls


def test_the_meta_learners_check_compares_results_and_gradients():
    """The two ways must not be mixed up, and a wrong gradient must show."""
    meta = FastMetaLearner(4, 5, 40)
    loss, grad = torch.tensor(1.3), torch.randn(40, 1)

    def wrong(self, *args):
        state = FastMetaLearner._in_pytorch(self, *args)
        return state._replace(c=state.c.detach() + 2 * (state.c - state.c.detach()))

    args = (loss, grad, MetaLearner.initial_state(meta))
    for way, agrees in ((FastMetaLearner._in_pytorch, True), (wrong, False)):
        assert gpu._agrees(way, FastMetaLearner._in_pytorch, 1e-3, lambda f: meta._two_updates(f, *args)) == agrees


@CUDA
def test_kernels_work_on_this_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_works", {})
    x, factors, order = pictures(100, 84, "cuda")
    found = augment._colour(x, factors, order)
    assert torch.equal(found, augment._colour(x, factors, order))
    meta = FastMetaLearner(4, 20, 1000).to("cuda")
    meta(torch.tensor(1.3, device="cuda"), torch.randn(1000, 1, device="cuda"), meta.initial_state())
    assert list(gpu._works.values()) == [True, True]
    assert capsys.readouterr().out == ""
