"""The Triton kernels without a GPU: Triton's interpreter runs them, and its compiler translates
them for two GPUs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_golden
import torch
import torch.nn.functional as F

from dataloader import draw_augmentation
from fast import augment, gpu, learner, native
from fast.gpu import blocks, colour, convolution, meta
from fast.learner import FastConv4
from fast.metalearner import FastMetaLearner
from learner import Conv4
from metalearner import MetaLearner, MetaState

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
EXACT = 1e-5 if INTERPRETED else 1e-4  # what tensor cores leave of float32 over a few layers
on_both = (
    (lambda test: test) if INTERPRETED else pytest.mark.gpu
)  # test_in_the_interpreter runs it, and a GPU


@pytest.mark.skipif(INTERPRETED, reason="it is this run")
def test_in_the_interpreter():
    """In a process of its own, because Triton chooses when it is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "pytorchs"]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "s" not in done.stdout.split()[0], done.stdout  # none was skipped


def pictures(n, size, device="cpu"):
    """Images from grey to colourful, with black, white and grey ones, and a draw of colours for
    each.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, size, size, generator=generator) * 255
    x[: n // 2] = x[: n // 2].round()
    x[0], x[1], x[2] = 0, 255, x[2, :1]
    drawn = draw_augmentation(3, "train", 0, np.full((n, 2), size))
    table = torch.from_numpy(augment.table(augment.Windows.crops(drawn.box, size), drawn))
    return x.to(device), table[:, 9:13].to(device), table[:, 13:].long().to(device)


@in_interpreter
@pytest.mark.parametrize(
    "size", [16, 33, 84]
)  # smaller than a block, not a multiple of it, several
def test_colours_are_pytorchs(size):
    x, factors, order = pictures(24, size)
    given = x.clone()
    ours, theirs = (
        colour.colour(x, factors, order),
        augment._colour_together(x.clone(), factors, order),
    )
    assert torch.equal(x, given)
    difference = (ours - theirs).abs()
    assert difference.mean() < 1e-3
    assert (difference > 1e-2).float().mean() < 1e-3  # a hue beside one of Pillow's steps


@in_interpreter
@pytest.mark.parametrize(("hidden_size", "n_params"), [(20, 150), (16, 2 * meta.TILE), (5, 10)])
def test_an_update_and_its_gradients_are_pytorchs(hidden_size, n_params):
    """Against float64, from a state with all its parts and for gradients of all sizes."""
    exact = MetaLearner(4, hidden_size, n_params).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.normal_(std=0.5)
    fast = FastMetaLearner(4, hidden_size, n_params)
    fast.load_state_dict(exact.state_dict())
    loss, grad = (
        torch.tensor(1.3),
        torch.randn(n_params, 1) * torch.logspace(-7, 0, n_params).view(-1, 1),
    )
    grad[3] = 0
    state = [torch.randn(n_params, k) * 0.5 for k in (hidden_size, hidden_size, 1, 1, 1)]
    weights = [torch.randn_like(t) for t in state]

    def found(metalearner, step, dtype):
        given = [t.to(dtype).requires_grad_() for t in state]
        made = step(loss.to(dtype), grad.to(dtype), MetaState(*given))
        total = sum((t * w.to(dtype)).sum() for t, w in zip(made, weights, strict=True))
        learned = [p for p in metalearner.parameters() if p is not metalearner.metalstm.cI]
        return *made, *torch.autograd.grad(total, [*learned, *given])

    for ours, theirs in zip(
        found(fast, fast._in_triton, torch.float32), found(exact, exact, torch.float64), strict=True
    ):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


# ---- Blocks of the learner ----


@pytest.fixture
def kernels(monkeypatch):
    """Sends the learner's blocks to the kernels; large tiles save the interpreter's time."""
    if INTERPRETED:
        monkeypatch.setattr(convolution, "ROWS", 4096)
        monkeypatch.setattr(
            convolution,
            "OF_FILTERS",
            {channels: {"ROWS": 4096} for channels in convolution.OF_FILTERS},
        )
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions={}))
    monkeypatch.setattr(
        gpu, "works", lambda kernel, *_: kernel in (blocks.train_block, blocks.eval_block)
    )


def assert_close(found, expected, close=1e-5):
    """As a share of each tensor's largest number; all zero but for rounding is zero."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.to(theirs) - theirs).abs().max() <= close * theirs.abs().max() + 1e-12


@on_both
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("parts", "image_size"), [(blocks.PARTS, 16), (4, 21)])
def test_a_learner_is_pytorchs(kernels, monkeypatch, parts, image_size, memory_format):
    """Against float64: loss, gradient, running statistics after two minibatches, and what they
    classify. With few programs each works on several tiles; the scale of some channels is negative
    or zero.
    """
    monkeypatch.setattr(blocks, "PARTS", parts)
    plain, fast = (way(image_size, 1e-3, 0.9, 3) for way in (Conv4, FastConv4))
    with torch.no_grad():
        plain.norm1.weight[3], plain.norm3.weight[5], plain.norm2.weight[1] = -0.7, -1.3, 0.0
        for b in (1, 2, 3, 4):
            getattr(plain, f"norm{b}").bias.normal_(std=0.3)
    fast.load_state_dict(plain.state_dict())
    plain, fast = plain.double().train(), fast.to(DEVICE).train()
    x, y = torch.randn(2, 6, 3, image_size, image_size).double(), torch.arange(6) % 3
    for images in x:
        loss, grad = fast.loss_and_grad(
            images.float().to(DEVICE).contiguous(memory_format=memory_format), y.to(DEVICE)
        )
        expected, expected_grad = plain.loss_and_grad(images, y)
        assert_close([loss, *fast.slices(grad)], [expected, *plain.slices(expected_grad)], EXACT)
    running = [[t for name, t in one.named_buffers() if "running" in name] for one in (fast, plain)]
    assert_close(*running, EXACT)
    with torch.no_grad():
        assert_close([fast.eval()(x[0].float().to(DEVICE))], [plain.eval()(x[0])], EXACT)


@in_interpreter
def test_the_worked_episode_is_pytorchs(kernels, monkeypatch):
    """tests/golden: eight updates, the query loss, the meta-learner's gradients. Large tiles save
    time.
    """
    monkeypatch.setattr(blocks, "ROWS", 2048)
    monkeypatch.setattr(meta, "TILE", 4096)
    test_golden.one_episode(0, *test_golden.golden_setup("fast", torch.float32), close=1e-5)


@on_both
@pytest.mark.parametrize("size", [(7, 10), (1, 3), (2, 2)])
@pytest.mark.parametrize("n_channels", [3, 32])
def test_convolutions_are_pytorchs(n_channels, size, monkeypatch):
    """Output and both gradients, against float64; with few programs each works on several tiles."""
    monkeypatch.setattr(convolution, "PARTS_OF_FILTERS", 2)
    x, weight = (
        channels_last(3, n_channels, *size),
        torch.randn(32, n_channels, 3, 3, device=DEVICE),
    )
    share = torch.randn(3, 32, *size, device=DEVICE)

    def found(convolve, dtype, of_weight):
        given = [x.detach().to(dtype), weight.detach().to(of_weight)]
        wanted = [t.requires_grad_() for t in given[n_channels == 3 :]]  # images want no gradient
        out = convolve(*given)
        return out.detach(), *torch.autograd.grad(out, wanted, share.to(dtype))

    theirs = found(lambda x, weight: F.conv2d(x, weight, padding=1), torch.float64, torch.float64)
    assert_close(
        found(convolution.Convolution.apply, torch.float32, torch.float32),
        theirs,
        2e-6 if INTERPRETED else 1e-5,
    )
    if INTERPRETED:  # which cannot multiply matrices of bfloat16
        return
    half = found(convolution.Convolution.apply, torch.bfloat16, torch.float32)
    assert [t.dtype for t in half[:-1]] == [torch.bfloat16] * (len(half) - 1)
    assert_close(half, theirs, 3e-2)


@on_both
def test_a_convolution_passes_on_what_is_not_finite():
    x, weight = channels_last(2, 32, 5, 6), torch.randn(32, 32, 3, 3, device=DEVICE)
    x[0, 3, 1, 2], x[1, 4, 0, 0] = float("nan"), float("inf")
    assert torch.equal(
        convolution.Convolution.apply(x, weight).isfinite(),
        F.conv2d(x, weight, padding=1).isfinite(),
    )


def channels_last(*shape):
    return torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)


def after_convolution(function, y, others, dtype):
    """Output, running statistics and gradients of what comes between a convolution and the next
    one.
    """
    y, gamma, beta, mean, var = (t.detach().to(dtype).clone() for t in (y, *others))
    given = [t.requires_grad_() for t in (y, gamma, beta)]
    out = function(*given, torch.zeros_like(gamma), mean, var, 0.9, 1e-3)
    weight = torch.linspace(1, 2, out.numel(), device=DEVICE, dtype=dtype).view(out.shape)
    return out.detach(), mean, var, *torch.autograd.grad((out * weight).sum(), given)


def in_pytorch(y, gamma, beta, bias, mean, var, momentum, eps):
    return F.max_pool2d(F.relu(F.batch_norm(y, mean, var, gamma, beta, True, momentum, eps)), 2)


def normalisation():
    """gamma > 0, beta, running mean and variance."""
    gamma, beta, mean, var = torch.rand(4, 32, device=DEVICE)
    return gamma + 0.1, -beta, mean, var


@on_both
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (7, 10)])
def test_ties_are_pytorchs(size):
    """Whole numbers: the first of the largest takes the gradient, but none where ReLU closes. At
    the edge an odd size leaves pixels that only the statistics see.
    """
    y, others = channels_last(4, 32, *size).mul(1.5).round(), normalisation()
    found, expected = (
        after_convolution(f, y, others, d)
        for f, d in ((blocks.NormPoolReLU.apply, torch.float32), (in_pytorch, torch.float64))
    )
    assert 0.1 < (expected[0] == 0).float().mean() < 0.9
    assert_close(found, expected)


@on_both
def test_statistics_far_from_zero_are_pytorchs():
    """Where a mean of squares loses all digits of the variance."""
    y, others = channels_last(4, 32, 9, 8) + 3000, normalisation()
    ours = after_convolution(blocks.NormPoolReLU.apply, y, others, torch.float32)
    theirs = after_convolution(in_pytorch, y, others, torch.float64)
    assert_close(ours, theirs, 1e-3)  # float32 rounds the mean itself, too


@on_both
def test_numbers_that_are_not_finite_are_pytorchs(monkeypatch):
    """They reach the output as in PyTorch: the update is then skipped."""
    conv, norm = torch.nn.Conv2d(32, 32, 3, device=DEVICE), torch.nn.BatchNorm2d(32, device=DEVICE)
    y = channels_last(2, 32, 5, 6)
    y[0, 3, 1, 2], y[1, 4, 0, 0], y[1, 5, 1, 1] = float("nan"), float("inf"), float("-inf")
    monkeypatch.setattr(blocks, "_convolved", lambda y, conv: y)
    monkeypatch.setattr(learner.F, "conv2d", lambda y, *args, **kwargs: y)
    torch.nn.init.zeros_(conv.bias)
    for kernel, code in (
        (blocks.eval_block, learner._eval_block),
        (blocks.train_block, learner._train_block),
    ):
        ours, theirs = (function(y, conv, norm) for function in (kernel, code))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert theirs.isnan().any()


@on_both
def test_blocks_in_bfloat16_are_pytorchs():
    """Numbers of eight bits, of which no two of a window are near: a rounding moves no maximum. The
    interpreter rounds towards zero where a GPU rounds to the nearest number.
    """
    windows = (
        torch.stack([torch.randperm(4) for _ in range(4 * 32 * 3 * 4)])
        .view(4, 32, 3, 4, 2, 2)
        .permute(0, 1, 2, 4, 3, 5)
    )
    y = (
        windows.reshape(4, 32, 6, 8)
        .to(DEVICE)
        .float()
        .contiguous(memory_format=torch.channels_last)
    )
    y[:, :, ::2] += torch.arange(4, device=DEVICE).repeat_interleave(2)
    others = normalisation()
    half = [y.bfloat16().requires_grad_(), *(t.clone().requires_grad_() for t in others[:2])]
    mean, var = (t.clone() for t in others[2:])
    out = blocks.NormPoolReLU.apply(*half, torch.zeros_like(mean), mean, var, 0.9, 1e-3)
    weight = torch.linspace(1, 2, out.numel(), device=DEVICE).view(out.shape).bfloat16()
    found = out, mean, var, *torch.autograd.grad(out, half, weight)
    assert [t.dtype for t in found] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    expected = after_convolution(in_pytorch, y, others, torch.float64)
    assert_close(found[1:3], expected[1:3])
    assert_close(found, expected, 0.01)


def test_the_blocks_check_compares_results_statistics_and_gradients():
    conv, norm = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32)
    x, before = torch.randn(4, 3, 8, 8), norm.running_mean.clone()

    def no_gradient(x, conv, norm):
        out = learner._train_block(x, conv, norm)
        return out.detach() + 0 * out

    def no_statistics(x, conv, norm):
        kept = norm.running_var.clone()
        out = learner._train_block(x, conv, norm)
        norm.running_var.copy_(kept)
        return out

    def only_even_sizes(x, conv, norm):
        return learner._train_block(x, conv, norm) * (1 + x.shape[3] % 2)

    wrong = [no_gradient, no_statistics, only_even_sizes]
    for way, agrees in ((learner._train_block, True), *((way, False) for way in wrong)):
        tried = lambda function: learner._tried(function, x, conv, norm)  # noqa: E731
        assert gpu._agrees(way, learner._train_block, 1e-3, tried) == agrees
    assert torch.equal(norm.running_mean, before)
    assert conv.weight.grad is None


def test_blocks_go_to_the_kernels_where_they_work(kernels, monkeypatch):
    """Not with another number of filters, and not to the one for testing where a gradient is
    wanted.
    """
    for name in ("train_block", "eval_block"):
        monkeypatch.setattr(blocks, name, lambda x, conv, norm, name=name: used.append(name) or x)
    for n_filters, expected in ((32, ["train_block", "eval_block"]), (16, [])):
        used = []
        block = torch.nn.Conv2d(3, n_filters, 3, padding=1), torch.nn.BatchNorm2d(n_filters)
        x = torch.randn(2, 3, 4, 4)
        learner.train_block(x, *block)
        learner.eval_block(x, *block)
        with torch.no_grad():
            learner.eval_block(x, *block)
        assert used == expected


COLOUR = (
    {"x": "*fp32", "factors": "*fp32", "order": "*i64", "out": "*fp32", "n_pixels": "i32"},
    {"BLOCK": colour.BLOCK},
    {"num_warps": colour.WARPS},
)


def of_update(function):
    names = dict.fromkeys(function.arg_names, "*fp32") | {
        n: "i32" for n in ("P", "PER", "N") if n in function.arg_names
    }
    more = meta.BACKWARD if function is meta._meta_backward else {}
    return names, {"H": 20, "W": 32, "TILE": meta.TILE}, {"num_warps": meta.WARPS, **more}


def of_block(function, number, **constants):
    """Its images hold numbers of this type."""
    types = dict.fromkeys(("y", "grad", "out", "d_y"), f"*{number}") | dict.fromkeys(
        ("momentum", "eps"), "fp32"
    )
    types |= dict.fromkeys(("P", "PER_OF_P", "N", "PER", "H", "W"), "i32")
    rows = blocks.ROWS * (4 if function is blocks._moments else 1)
    constants |= {"C": 32, "ROWS": rows, "PARTS": blocks.PARTS}
    return (
        {name: types.get(name, "*fp32") for name in function.arg_names},
        constants,
        {"num_warps": blocks.WARPS},
    )


def of_convolution(function, number, channels, **constants):
    types = dict.fromkeys(("x", "y", "grad"), f"*{number}") | dict.fromkeys(
        ("P", "PER", "H", "W"), "i32"
    )
    how = {"ROWS": convolution.ROWS, "num_warps": convolution.WARPS}
    if function is convolution._filters_backward:
        how = dict(convolution.OF_FILTERS[channels])
    constants |= {"C": channels, "ROWS": how.pop("ROWS"), "PRECISION": convolution.PRECISION}
    return {name: types.get(name, "*fp32") for name in function.arg_names}, constants, how


KERNELS = {"colour": (colour._colour, COLOUR)}
KERNELS |= {
    function.__name__: (function, of_update(function))
    for function in (meta._meta_forward, meta._meta_backward)
}
for number in ("fp32", "bf16"):
    for function in (blocks._moments, blocks._block_sums, blocks._block_backward):
        KERNELS[f"{function.__name__} {number}"] = function, of_block(function, number)
    for train in (True, False):
        how = of_block(blocks._block_forward, number, TRAIN=train)
        KERNELS[f"_block_forward {number} {train}"] = blocks._block_forward, how
    for channels, back in ((3, False), (32, False), (32, True)):
        how = of_convolution(convolution._convolve, number, channels, BACK=back)
        KERNELS[f"_convolve {number} {channels} {back}"] = convolution._convolve, how
    for channels in convolution.OF_FILTERS:
        how = of_convolution(convolution._filters_backward, number, channels)
        KERNELS[f"_filters_backward {number} {channels}"] = convolution._filters_backward, how


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile(kernel, capability, tmp_path):
    """Down to machine code, for an A100 and an H100, whose registers suffice: hardly anything is
    spilled to memory.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, (signature, constants, options) = KERNELS[kernel]
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, kind in enumerate(signature.values())
        if kind[0] == "*"
    }
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip(f"{tool} is not here")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert int(re.search(r" STACK:(\d+) ", found)[1]) <= 8


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
    metalearner = FastMetaLearner(4, 5, 40)
    loss, grad = torch.tensor(1.3), torch.randn(40, 1)

    def wrong(self, *args):
        state = FastMetaLearner._in_pytorch(self, *args)
        return state._replace(c=state.c.detach() + 2 * (state.c - state.c.detach()))

    args = (loss, grad, MetaLearner.initial_state(metalearner))
    for way, agrees in ((FastMetaLearner._in_pytorch, True), (wrong, False)):
        assert (
            gpu._agrees(
                way, FastMetaLearner._in_pytorch, 1e-3, lambda f: metalearner._two_updates(f, *args)
            )
            == agrees
        )


@pytest.mark.gpu
def test_kernels_work_on_this_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_works", {})
    x, factors, order = pictures(100, 84, "cuda")
    found = augment._colour(x, factors, order)
    assert torch.equal(found, augment._colour(x, factors, order))
    metalearner = FastMetaLearner(4, 20, 1000).to("cuda")
    metalearner(
        torch.tensor(1.3, device="cuda"),
        torch.randn(1000, 1, device="cuda"),
        metalearner.initial_state(),
    )
    model, x, y = (
        FastConv4(84, 1e-3, 0.9, 5).to("cuda").train(),
        channels_last(25, 3, 84, 84),
        torch.arange(25, device="cuda") % 5,
    )
    assert torch.equal(model.loss_and_grad(x, y)[1], model.loss_and_grad(x, y)[1])
    with torch.no_grad():
        model.eval()(x)
    assert list(gpu._works.values()) == [True] * 4
    gpu._works.clear()
    model = FastConv4(84, 1e-3, 0.9, 5, conv_dtype=torch.bfloat16).to("cuda").train()
    assert torch.equal(model.loss_and_grad(x, y)[1], model.loss_and_grad(x, y)[1])
    with torch.no_grad():
        model.eval()(x)
    assert list(gpu._works.values()) == [True] * 2
    assert capsys.readouterr().out == ""
