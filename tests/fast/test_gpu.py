"""The Triton kernels. Without a GPU, Triton interprets them, and compiles them for two GPUs."""

import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, networks, new_episode

import dataloader
from data.transforms import draw_augmentation
from episode import Episode, adapt, evaluate_episode, meta_gradient, trainable_parameters
from fast import augment, gpu, learner, native
from fast.gpu import blocks, colour, convolution, meta, update
from fast.learner import FastConv4
from fast.metalearner import FastMetaLearner
from learner import Conv4
from metalearner import MetaLearner, MetaState

triton = pytest.importorskip("triton")

MODULES = blocks, colour, convolution, meta, update
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
EXACT = 1e-5 if INTERPRETED else 1e-4  # what tensor cores leave of float32 over a few layers
# test_in_the_interpreter runs the marked ones; those marked on_both also run on a GPU
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
on_both = (lambda test: test) if INTERPRETED else pytest.mark.gpu


@pytest.mark.skipif(INTERPRETED, reason="it is this run")
@pytest.mark.slow
@pytest.mark.parametrize("marks", ["not slow", "slow"])
def test_in_the_interpreter(marks):
    """In another process, because Triton chooses when it is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "matches_pytorch", "-m", marks]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "s" not in done.stdout.split()[0], done.stdout  # none was skipped


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """In the interpreter, programs run in a random order, and memory beside each tensor is NaN:
    what a kernel reads there reaches its results, what it writes there is found.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import interpreter_builder

    set_place = interpreter_builder.set_grid_idx

    def shuffled(*place):
        size = interpreter_builder.grid_dim
        order = np.random.default_rng(0).permutation(math.prod(size))
        set_place(*map(int, np.unravel_index(order[np.ravel_multi_index(place, size)], size)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch_guarded)


def launch_guarded(kernel, programs, *args, **options):
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    pairs = {id(t): (t, guarded(t)) for t in tensors}
    args = [pairs[id(t)][1][1] if isinstance(t, torch.Tensor) else t for t in args]
    gpu.launch(kernel, programs, *args, **options)
    for t, (memory, copy) in pairs.values():
        t.data.copy_(copy)  # as a kernel, behind autograd's back
        copy.fill_(0)
        assert torch.equal(memory != 0, guarded(torch.zeros_like(t))[0] != 0)


def guarded(t, band=1000):
    """Memory in whose middle a copy of a dense tensor lies, and the copy."""
    beside = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max // 2
    memory = torch.full((t.numel() + 2 * band,), beside, dtype=t.dtype)
    copy = memory.as_strided(t.shape, t.stride(), band)
    return memory, copy.copy_(t.detach())


def colour_args(n, size, device="cpu"):
    """Images from grey to colourful, with black, white and grey ones; their factors and orders."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, size, size, generator=generator) * 255
    x[: n // 2] = x[: n // 2].round()
    x[0], x[1], x[2] = 0, 255, x[2, :1]
    rng = dataloader.generator(3, "train", 0, dataloader.AUGMENT)
    drawn = draw_augmentation(rng, np.full((n, 2), size))
    table = torch.from_numpy(augment.table(augment.Windows.crops(drawn.box, size), drawn))
    return x.to(device), table[:, 9:13].to(device), table[:, 13:].long().to(device)


@in_interpreter
@pytest.mark.parametrize("size", [16, 33, 84])  # a part of a block, some blocks and a part, many
def test_colour_matches_pytorch(size):
    x, factors, order = colour_args(24 if size == 16 else 6, size)
    before = x.clone()
    result, expected = (f(x, factors, order) for f in (colour.colour, augment._adjust_colours))
    assert torch.equal(x, before)
    difference = (result - expected).abs()
    assert difference.mean() < 1e-3
    assert (difference > 1e-2).float().mean() < 1e-3  # a hue beside one of Pillow's steps


@in_interpreter
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("size_of_loss", [1.3, 1e-6])
@pytest.mark.parametrize(("hidden_size", "n_params"), [(20, 150), (16, 2 * meta.TILE), (1, 10)])
def test_meta_step_matches_pytorch(hidden_size, n_params, size_of_loss, second_order):
    """Two updates in float64, from a state with all its parts and for gradients of all sizes."""
    exact = MetaLearner(4, hidden_size, n_params).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.normal_(std=0.5)
    fast = FastMetaLearner(4, hidden_size, n_params)
    fast.load_state_dict(exact.state_dict())
    loss, size = torch.tensor(size_of_loss), torch.logspace(-7, 0, n_params).view(-1, 1)
    grad = torch.randn(n_params, 1) * size
    grad[3] = 0
    state = [torch.randn(n_params, k) * 0.5 for k in (hidden_size, hidden_size, 1, 1, 1)]
    weights = [torch.randn_like(t) for t in state]

    def run(metalearner, step, dtype):
        old = [t.to(dtype).requires_grad_() for t in state]
        inputs = [t.detach().to(dtype).requires_grad_(second_order) for t in (loss, grad)]
        new = step(*inputs, MetaState(*old))
        new = step(inputs[0] / 2, inputs[1].flip(0), new)
        total = sum((t * w.to(dtype)).sum() for t, w in zip(new, weights, strict=True))
        learned = [p for p in metalearner.parameters() if p is not metalearner.metalstm.cI]
        learned += inputs if second_order else []
        return *new, *torch.autograd.grad(total, [*learned, *old])

    found, expected = run(fast, fast._in_triton, torch.float32), run(exact, exact, torch.float64)
    assert_close(found, expected, 3e-5)


# ---- Blocks of the learner ----


@pytest.fixture
def kernels(monkeypatch):
    """Sends the learner's blocks to the kernels; large tiles save the interpreter's time."""
    if INTERPRETED:
        tiles = {channels: {"ROWS": 4096} for channels in convolution.FILTERS_BACKWARD}
        monkeypatch.setattr(convolution, "ROWS", 4096)
        monkeypatch.setattr(convolution, "FILTERS_BACKWARD", tiles)
    in_triton = blocks.train_block, blocks.eval_block, update.classifier, FastConv4._differences
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions={}))
    monkeypatch.setattr(gpu, "works", lambda kernel, *_: kernel in in_triton)


def assert_close(results, expected, close=1e-5):
    """Relative to each tensor's largest number; where all are zero, so are the results."""
    for a, b in zip(results, expected, strict=True):
        assert a.shape == b.shape
        assert (a.to(b) - b).abs().max() <= close * b.abs().max() + 1e-12


def channels_last(*shape):
    return torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)


@on_both
@pytest.mark.parametrize(
    ("parts", "image_size", "memory_format", "n_class"),
    [
        (blocks.PARTS, 16, torch.contiguous_format, 3),
        (4, 21, torch.channels_last, 3),
        pytest.param(blocks.PARTS, 16, torch.channels_last, 3, marks=pytest.mark.slow),
        pytest.param(4, 21, torch.contiguous_format, 3, marks=pytest.mark.slow),
        pytest.param(4, 28, torch.channels_last, 20, marks=pytest.mark.slow),
        pytest.param(4, 33, torch.contiguous_format, 20, marks=pytest.mark.slow),
        pytest.param(4, 112, torch.channels_last, 5, marks=pytest.mark.slow),
    ],
)
def test_learner_matches_pytorch(kernels, monkeypatch, parts, image_size, memory_format, n_class):
    """In float64, after two minibatches; with few programs each works on several tiles."""
    monkeypatch.setattr(blocks, "PARTS", parts)
    if image_size > 21:
        monkeypatch.setattr(blocks, "ROWS", 1024)
    plain, fast = (network(image_size, 1e-3, 0.9, n_class) for network in (Conv4, FastConv4))
    with torch.no_grad():
        plain.norm1.weight[3], plain.norm3.weight[5], plain.norm2.weight[1] = -0.7, -1.3, 0.0
        for b in (1, 2, 3, 4):
            getattr(plain, f"norm{b}").bias.normal_(std=0.3)
    fast.load_state_dict(plain.state_dict())
    plain, fast = plain.double().train(), fast.to(DEVICE).train()
    x, y = torch.randn(2, 6, 3, image_size, image_size).double(), torch.arange(6) % n_class
    for images in x:
        values = torch.cat([plain.get_flat_params()[:-1], torch.randn(1).double()])
        for model in (plain, fast):  # the second time the filters move into the kernels' order
            model.copy_flat_params(values.to(model.cls.bias))
        assert_close([fast.get_flat_params()], [plain.get_flat_params()], EXACT)
        on_device = images.float().to(DEVICE).contiguous(memory_format=memory_format)
        loss, grad = fast.loss_and_grad(on_device, y.to(DEVICE))
        expected, expected_grad = plain.loss_and_grad(images, y)
        assert_close([loss, *fast.slices(grad)], [expected, *plain.slices(expected_grad)], EXACT)
    running = [[t for name, t in m.named_buffers() if "running" in name] for m in (fast, plain)]
    assert_close(*running, EXACT)
    with torch.no_grad():
        assert_close([fast.eval()(x[0].float().to(DEVICE))], [plain.eval()(x[0])], EXACT)


@on_both
@pytest.mark.parametrize("image_size", [16, pytest.param(21, marks=pytest.mark.slow)])
def test_second_order_matches_pytorch(kernels, monkeypatch, image_size):
    """The derivative of loss and gradient against double backward in float64."""
    monkeypatch.setattr(blocks, "PARTS", 4)
    plain, fast = (network(image_size, 1e-3, 0.9, 3) for network in (Conv4, FastConv4))
    with torch.no_grad():
        plain.norm1.weight[3], plain.norm3.weight[5] = -0.7, -1.3
    fast.load_state_dict(plain.state_dict())
    plain, fast = plain.double().train(), fast.to(DEVICE).train()
    x, y = torch.randn(6, 3, image_size, image_size).double(), torch.arange(6) % 3
    c, v = plain.get_flat_params().unsqueeze(1), torch.randn(plain.size(), 1).double()
    results = []
    for model in (fast, plain):
        weight = model.cls.weight
        images, labels, at, along = x.to(weight), y.to(weight.device), c.to(weight), v.to(weight)
        loss, grad = model.loss_and_grad_at(images, labels, at.requires_grad_())
        (product,) = torch.autograd.grad(0.3 * loss + (along * grad).sum(), at)
        results.append([loss.detach(), grad.detach(), product])
    for close, *pair in zip((EXACT, EXACT, 0.02), *results, strict=True):
        assert (pair[0].to(pair[1]) - pair[1]).norm() <= close * pair[1].norm()
    running = [[t for name, t in m.named_buffers() if "running" in name] for m in (fast, plain)]
    assert_close(*running, EXACT)
    assert_close([fast.get_flat_params()], [plain.get_flat_params()], EXACT)


@in_interpreter
@pytest.mark.slow
def test_golden_episode_matches_pytorch(kernels, monkeypatch):
    """Eight updates, the query loss, the meta-learner's gradients. Large tiles save time."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "core")
    import test_golden

    monkeypatch.setattr(blocks, "ROWS", 2048)
    monkeypatch.setattr(meta, "TILE", 4096)
    test_golden.one_episode(0, *test_golden.golden_setup("fast", torch.float32), close=1e-5)


@on_both
@pytest.mark.parametrize("size", [(7, 10), (1, 3), (2, 2)])
@pytest.mark.parametrize("channels", [3, 32])
def test_convolution_matches_pytorch(channels, size, monkeypatch):
    """Output and both gradients, in float64; with few programs each works on several tiles."""
    monkeypatch.setattr(convolution, "PROGRAMS", 6)
    weight = torch.randn(32, channels, 3, 3, device=DEVICE)
    x, grad_out = channels_last(3, channels, *size), torch.randn(3, 32, *size, device=DEVICE)

    def run(convolve, dtype, weight_dtype):
        inputs = [x.detach().to(dtype), weight.detach().to(weight_dtype)]
        learned = [t.requires_grad_() for t in inputs[channels == 3 :]]  # images need no gradient
        out = convolve(*inputs)
        return out.detach(), *torch.autograd.grad(out, learned, grad_out.to(dtype))

    expected = run(lambda x, w: F.conv2d(x, w, padding=1), torch.float64, torch.float64)
    kernel, close = convolution.Convolution.apply, 2e-6 if INTERPRETED else 1e-5
    assert_close(run(kernel, torch.float32, torch.float32), expected, close)
    if not INTERPRETED:  # the interpreter cannot multiply matrices of bfloat16
        half = run(kernel, torch.bfloat16, torch.float32)
        assert {t.dtype for t in half[:-1]} == {torch.bfloat16}
        assert_close(half, expected, 3e-2)


@in_interpreter
@pytest.mark.parametrize("n_classes", [5, 8])
def test_a_wrong_label_matches_pytorch(n_classes):
    """PyTorch raises an error; here, where the host does not look, the loss is NaN."""
    x, bias = channels_last(2, 32, 2, 2), torch.randn(n_classes)
    weight = torch.randn(n_classes, 128)
    for label in (n_classes, 100, -1, -100):
        y, grads = torch.tensor([0, label]), (torch.empty_like(weight), torch.empty_like(bias))
        assert update.classifier(x, y, weight, bias, *grads)[0].isnan()


@in_interpreter
def test_a_frozen_call_of_infinite_inputs_matches_pytorch():
    """The running statistics stay as they are."""
    affine, mean, var = (torch.ones(32), torch.zeros(32)), torch.zeros(32), torch.ones(32)
    y, bias, running = channels_last(2, 32, 6, 6), torch.zeros(32), (mean, var, 0.9, 1e-3)
    _, used = blocks.normalised(y, *affine, bias, *running, True)
    before, frozen = (mean.clone(), var.clone()), (y, used, *affine)
    blocks.normalised(y + float("inf"), *affine, bias, *running, True, frozen=frozen)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@on_both
def test_nonfinite_convolution_matches_pytorch():
    x, weight = channels_last(2, 32, 5, 6), torch.randn(32, 32, 3, 3, device=DEVICE)
    x[0, 3, 1, 2], x[1, 4, 0, 0] = float("nan"), float("inf")
    out, expected = convolution.Convolution.apply(x, weight), F.conv2d(x, weight, padding=1)
    assert torch.equal(out.isfinite(), expected.isfinite())


def norm_pool_relu(function, y, others, dtype):
    """Output, running statistics and gradients of what follows a convolution."""
    y, gamma, beta, mean, var = (t.detach().to(dtype).clone() for t in (y, *others))
    learned = [t.requires_grad_() for t in (y, gamma, beta)]
    out = function(*learned, torch.zeros_like(gamma), mean, var, 0.9, 1e-3)
    weight = torch.linspace(1, 2, out.numel(), device=DEVICE, dtype=dtype).view(out.shape)
    return out.detach(), mean, var, *torch.autograd.grad((out * weight).sum(), learned)


def eager(y, gamma, beta, bias, mean, var, momentum, eps):
    return F.max_pool2d(F.relu(F.batch_norm(y, mean, var, gamma, beta, True, momentum, eps)), 2)


def compare_norm(y, close=1e-5):
    """The kernels in float32 against PyTorch in float64; returns the latter's results."""
    others = norm_args()
    results = norm_pool_relu(blocks.NormPoolReLU.apply, y, others, torch.float32)
    expected = norm_pool_relu(eager, y, others, torch.float64)
    assert_close(results, expected, close)
    return expected


def norm_args():
    """gamma > 0, beta, running mean and variance."""
    gamma, beta, mean, var = torch.rand(4, 32, device=DEVICE)
    return gamma + 0.1, -beta, mean, var


@on_both
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (7, 10)])
def test_tied_maxima_matches_pytorch(size):
    """Integers: the first of the largest takes the gradient; the last pixels of odd sizes count."""
    out = compare_norm(channels_last(4, 32, *size).mul(1.5).round())[0]
    assert 0.1 < (out == 0).float().mean() < 0.9


@on_both
def test_statistics_far_from_zero_matches_pytorch():
    """Where a mean of squares loses all digits of the variance; float32 rounds the mean, too."""
    compare_norm(channels_last(4, 32, 9, 8) + 3000, 1e-3)


@on_both
@pytest.mark.parametrize("block", ["eval_block", "train_block"])
def test_nonfinite_block_matches_pytorch(monkeypatch, block):
    """NaN reaches the output as in PyTorch: the update is then skipped."""
    conv, norm = torch.nn.Conv2d(32, 32, 3, device=DEVICE), torch.nn.BatchNorm2d(32, device=DEVICE)
    y = channels_last(2, 32, 5, 6)
    y[0, 3, 1, 2], y[1, 4, 0, 0], y[1, 5, 1, 1] = float("nan"), float("inf"), float("-inf")
    monkeypatch.setattr(blocks, "Convolution", SimpleNamespace(apply=lambda y, weight: y))
    monkeypatch.setattr(learner.F, "conv2d", lambda y, *args, **kwargs: y)
    torch.nn.init.zeros_(conv.bias)
    kernel, code = getattr(blocks, block), getattr(learner, f"_{block}")
    result, expected = kernel(y, conv, norm), code(y, conv, norm)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert expected.isnan().any()


@on_both
def test_bfloat16_block_matches_pytorch():
    """Numbers of eight bits, far apart in each window, so that no rounding moves a maximum."""
    windows = torch.stack([torch.randperm(4) for _ in range(4 * 32 * 3 * 4)])
    y = windows.view(4, 32, 3, 4, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(4, 32, 6, 8)
    y = y.to(DEVICE).float().contiguous(memory_format=torch.channels_last)
    y[:, :, ::2] += torch.arange(4, device=DEVICE).repeat_interleave(2)
    others = norm_args()
    half = [y.bfloat16().requires_grad_(), *(t.clone().requires_grad_() for t in others[:2])]
    mean, var = (t.clone() for t in others[2:])
    out = blocks.NormPoolReLU.apply(*half, torch.zeros_like(mean), mean, var, 0.9, 1e-3)
    weight = torch.linspace(1, 2, out.numel(), device=DEVICE).view(out.shape).bfloat16()
    results = out, mean, var, *torch.autograd.grad(out, half, weight)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [t.dtype for t in results] == [bf16, fp32, fp32, bf16, fp32, fp32]
    expected = norm_pool_relu(eager, y, others, torch.float64)
    assert_close(results[1:3], expected[1:3])
    assert_close(results, expected, 0.01)


# ---- Which implementation runs ----


def block_args(channels, n_filters=32, size=8):
    conv = torch.nn.Conv2d(channels, n_filters, 3, padding=1)
    return torch.randn(4, channels, size, size), conv, torch.nn.BatchNorm2d(n_filters)


def no_gradient(x, conv, norm):
    out = learner._train_block(x, conv, norm)
    return out.detach() + 0 * out


def no_statistics(x, conv, norm):
    var = norm.running_var.clone()
    out = learner._train_block(x, conv, norm)
    norm.running_var.copy_(var)
    return out


def only_even_sizes(x, conv, norm):
    return learner._train_block(x, conv, norm) * (1 + x.shape[3] % 2)


def test_checks_compare_everything(capsys):
    """Outputs of even and odd sizes, statistics and gradients; they leave no trace."""
    x, conv, norm = block_args(3)
    before, eager = norm.running_mean.clone(), learner._train_block
    results = partial(learner._results, x, conv, norm)
    for kernel in (eager, no_gradient, no_statistics, only_even_sizes):
        assert gpu._agrees(kernel, eager, 1e-3, results) == (kernel is eager)
    assert torch.equal(norm.running_mean, before)
    assert conv.weight.grad is None
    metalearner, eager = FastMetaLearner(4, 5, 40), FastMetaLearner._in_pytorch
    args = torch.tensor(1.3), torch.randn(40, 1), MetaLearner.initial_state(metalearner)

    def wrong(self, *args):
        state = eager(self, *args)
        return state._replace(c=state.c.detach() + 2 * (state.c - state.c.detach()))

    results = partial(metalearner._two_updates, *args)
    for right, found in ((True, [1.0, 2.0]), (False, [1.0, math.nan]), (False, [math.nan, 2.0])):
        numbers = {eager: torch.tensor([1.0, 2.0]), wrong: torch.tensor(found)}
        assert gpu._agrees(wrong, eager, 1e-3, numbers.__getitem__) == right
    assert gpu._agrees(eager, eager, 1e-3, results)
    assert not gpu._agrees(wrong, eager, 1e-3, results)


class OnGPU(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = True


@pytest.fixture
def unchecked(monkeypatch):
    """No kernel has been checked yet; the CPU's kernels are absent."""
    monkeypatch.setattr(gpu, "_works", {})
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions={}))


def test_failing_and_wrong_kernels_are_left_out(capsys, unchecked):
    calls, x = [], torch.ones(3).as_subclass(OnGPU)

    def good(x):
        calls.append("good")
        return x + 1e-3

    def bad(x):
        calls.append("bad")
        return x + 1

    def broken(x):
        calls.append("broken")
        raise SystemError("no compiler\nmore")

    for kernel in (good, bad, broken):
        for _ in range(3):
            right = gpu.works(kernel, torch.clone, 0.01, x, lambda f: [f(x)])
            assert right == (kernel is good)
    assert calls == ["good", "bad", "broken"]
    wrong, failing = capsys.readouterr().out.splitlines()
    assert "kernel bad" in wrong
    assert "differs" in wrong
    assert failing.endswith("SystemError: no compiler")
    for other in (torch.ones(3), x.double()):
        assert not gpu.works(good, torch.clone, 0.01, other, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_of_channels_is_checked(monkeypatch, capsys, unchecked, dtype):
    """A kernel that is right for 3 channels and wrong for 32 runs for 3 alone."""
    checked = []

    def right_for_3(x, conv, norm):
        checked.append(x.shape[1])
        return learner._train_block(x, conv, norm) * (1 if x.shape[1] == 3 else 2)

    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    for channels in (3, 32, 3, 32):
        x, conv, norm = block_args(channels)
        function = learner._triton_or(learner._train_block, right_for_3, x.to(dtype), conv, norm)
        assert (function is right_for_3) == (channels == 3)
    assert checked == [3, 3, 32, 32]  # an even and an odd size each
    assert "right_for_3 (32 channels" in capsys.readouterr().out


def test_blocks_run_the_kernels_that_work(kernels, monkeypatch):
    """Not with other numbers of filters, and not ``eval_block`` where a gradient is needed."""
    for name in ("train_block", "eval_block"):
        monkeypatch.setattr(blocks, name, lambda x, conv, norm, name=name: used.append(name) or x)
    monkeypatch.setattr(gpu, "works", lambda *_: True)
    for n_filters, expected in ((32, ["train_block", "eval_block"]), (16, [])):
        used, block = [], block_args(3, n_filters)
        learner.train_block(*block)
        learner.eval_block(*block)
        with torch.no_grad():
            learner.eval_block(*block)
        assert used == expected


def test_second_order_without_its_kernels(monkeypatch, unchecked):
    """The others can be differentiated once only, so that PyTorch's operations run."""
    missing = FastConv4._differences, FastMetaLearner._in_triton
    monkeypatch.setattr(gpu, "works", lambda kernel, *_: kernel not in missing)
    kernels = (meta.MetaStep, "apply"), (blocks, "train_block"), (update, "loss_and_grad")
    for owner, name in kernels:
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("a kernel ran"))
    torch.manual_seed(1)
    plain, fast = (network(16, 1e-3, 0.9, 3).train() for network in (Conv4, FastConv4))
    fast.load_state_dict(plain.state_dict())
    images, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    episode = Episode(images, y, images, y, torch.arange(6).repeat(2, 1))
    metalearners = [rule(4, 20, plain.size()) for rule in (MetaLearner, FastMetaLearner)]
    metalearners[1].load_state_dict(metalearners[0].state_dict())
    grads = []
    for learner_, metalearner in zip((plain, fast), metalearners, strict=True):
        metalearner.second_order = True
        metalearner.init_cI(plain.get_flat_params())
        c, _ = adapt(episode, learner_, metalearner, batch_size=6)
        grads.append(torch.autograd.grad(c.square().sum(), trainable_parameters(metalearner)))
    assert_close(grads[1], grads[0], 1e-3)


def test_offsets_beyond_int32_are_left_to_pytorch(monkeypatch, unchecked):
    """Above about 100 million parameters with 20 hidden units, for one."""
    with torch.device("meta"):
        assert meta.handles(torch.empty(100_000_000, 1), 20)
        assert not meta.handles(torch.empty(108_000_000, 1), 20)
        assert not meta.handles(torch.empty(10, 1), meta.LARGEST_HIDDEN + 1)
        assert colour.handles(torch.empty(1, 3, 20000, 20000))
        assert not colour.handles(torch.empty(2, 3, 20000, 20000))
        filters = torch.empty(32, 32, 3, 3)
        assert blocks.handles_block(torch.empty(63, 32, 1024, 1024), filters)
        assert not blocks.handles_block(torch.empty(64, 32, 1024, 1024), filters)
    monkeypatch.setattr(gpu, "works", lambda *_: True)
    for module in (meta, colour, blocks):
        monkeypatch.setattr(module, "INT32", 100)
    kernels = (meta.MetaStep, "apply"), (colour, "colour")
    for owner, name in (*kernels, (blocks, "train_block"), (blocks, "eval_block")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("the kernel ran"))
    metalearner, grad = FastMetaLearner(4, 5, 40), torch.randn(40, 1)
    metalearner(torch.tensor(1.3), grad, metalearner.initial_state())
    augment.adjust_colours(*colour_args(4, 16))
    learner.train_block(*block_args(3))
    with torch.no_grad():
        learner.eval_block(*block_args(3))


def test_kernels_launch_on_the_tensors_device(monkeypatch):
    """Whichever is the current one, here 0; a CPU's tensor has -1, which changes nothing."""
    current, launched = [], []
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, lambda index: current.append(index) or 0)
    kernel = {(2,): lambda *args, **options: launched.append((current[-1], args, options))}
    for index in (0, 1, -1):
        x = SimpleNamespace(is_cuda=index >= 0, get_device=lambda index=index: index)
        gpu.launch(kernel, (2,), x, 3, C=4)
        assert launched.pop() == (index, (x, 3), {"C": 4})
        assert current.pop() == 0


# ---- Machine code ----

KERNELS = "_block_backward _block_forward _block_sums _classifier_backward _classify _colour "
KERNELS += "_convolve _filters_backward _meta_backward _meta_forward _moments"
TRAININGS = [  # number of classes, hidden size, dtype of the convolutions, second order
    (5, 20, None, False),
    (20, 20, torch.bfloat16, False),
    (5, 20, None, True),
    (5, 1, None, True),
]


@pytest.fixture(scope="module")
def launches():
    """What augmentation, training and tests launch, recorded on the meta device: by kernel, each
    variant of its machine code as (function, types, constants, options).
    """
    numbers = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
    found = defaultdict(dict)

    def kind(value):
        if isinstance(value, torch.Tensor):
            return f"*{numbers[value.dtype]}"
        return "i32" if isinstance(value, int) else "fp32"

    def record(function, _programs, *args, **options):
        constants = {name: options.pop(name) for name in function.arg_names if name in options}
        types = dict(zip(function.arg_names, map(kind, args), strict=False))
        types |= dict.fromkeys(constants, "constexpr")
        found[function.__name__][f"{types} {constants}"] = function, types, constants, options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "works", lambda *_: True)
        for module in MODULES:
            patch.setattr(module, "launch", record)
        augment.adjust_colours(*colour_args(3, 16, "meta"))
        for n_class, hidden_size, dtype, second_order in TRAININGS:
            shape = 16, torch.float32, n_class, hidden_size
            models = networks("fast", *shape, device="meta", conv_dtype=dtype)
            models[-1].second_order = second_order
            episode = Episode(*(t.to("meta") for t in new_episode(n_class)))
            meta_gradient(episode, *models, 100)
            evaluate_episode(episode, *models, 100)
    return found


def run_tool(name, *arguments):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not tool.is_file():
        pytest.skip(f"{tool} is not here")
    return subprocess.run([tool, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", KERNELS.split())
def test_kernels_compile(launches, kernel, capability, tmp_path):
    """To machine code for an H100 and an A100: hardly a register is spilled, no two warps of a
    matrix product compute the same, and those of 32 channels copy no single numbers to shared
    memory.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert launches.keys() == set(KERNELS.split())
    for function, types, constants, options in launches[kernel].values():
        pointers = [k for k, kind in enumerate(types.values()) if kind[0] == "*"]
        aligned = {(k,): [["tt.divisibility", 16]] for k in pointers}
        source = ASTSource(function, signature=types, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", tmp_path / "kernel.cubin")
        spilled = int(re.search(r" STACK:(\d+) ", usage)[1])  # bytes
        assert spilled <= (48 if constants.get("INPUTS") else 16)
        code = compiled.asm["ttgir"]
        layouts = re.findall(r"warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)", code)
        shapes = re.findall(r"dot.*-> tensor<(\d+)x(\d+)xf32, #mma>", code)
        assert bool(layouts) == bool(shapes) == (function.__module__ == convolution.__name__)
        for down, right, height, width in layouts:
            covered = int(down) * int(height), int(right) * int(width)
            assert all(c <= int(s) for c, s in zip(covered, min(shapes), strict=True))
        if layouts and constants["C"] == 32:
            machine_code = run_tool("nvdisasm", "-c", tmp_path / "kernel.cubin")
            copies = re.findall(r"\bLDGSTS[.\w]*", machine_code)
            assert copies
            assert all(copy.endswith((".128", ".64")) for copy in copies)


# ---- On a GPU ----


@pytest.mark.gpu
def test_all_kernels_work_on_this_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_works", {})
    args = colour_args(100, 84, "cuda")
    assert torch.equal(augment.adjust_colours(*args), augment.adjust_colours(*args))
    metalearner = FastMetaLearner(4, 20, 1000).to("cuda")
    step = torch.tensor(1.3, device="cuda"), torch.randn(1000, 1, device="cuda")
    metalearner(*step, metalearner.initial_state())
    x, y = channels_last(25, 3, 84, 84), torch.arange(25, device="cuda") % 5
    for conv_dtype in (None, torch.bfloat16):
        model = FastConv4(84, 1e-3, 0.9, 5, conv_dtype=conv_dtype).to("cuda").train()
        assert torch.equal(model.loss_and_grad(x, y)[1], model.loss_and_grad(x, y)[1])
        model.loss_and_grad_at(x, y, model.get_flat_params().unsqueeze(1).requires_grad_())
        with torch.no_grad():
            model.eval()(x)
    assert list(gpu._works.values()) == [True] * (1 + 1 + 2 * 5 + 1)
    assert capsys.readouterr().out == ""
