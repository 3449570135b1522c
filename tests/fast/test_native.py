"""The compiled kernels against PyTorch, and what happens where they cannot be compiled."""

import copy
import functools
import platform
import shutil
import sys
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Model, completed, new_episode

from fast import augment, library, native
from fast.learner import FastConv4, eval_block, train_block
from fast.metalearner import FastMetaLearner
from fast.native import PatchMoments
from metalearner import MetaLearner

NO_KERNELS = SimpleNamespace(functions={}, state="")
CHANNELS = pytest.mark.parametrize("channels", [3, 32])


@functools.cache
def compiled_for(arch):
    """Kernels for a lesser processor; by clang++ if that is ``arch``."""
    with pytest.MonkeyPatch.context() as patch:
        if arch == "clang++":
            patch.setenv("CXX", arch)
        else:
            flags = [f if f != library.ARCH else f"-march={arch}" for f in library.FLAGS]
            patch.setattr(library, "FLAGS", flags)
        return library.Library()


@pytest.fixture(params=["native", "x86-64-v3", "x86-64", "clang++"])
def compiled(request, monkeypatch):
    """Kernels for this processor, for AVX2, for vectors of four; yields monkeypatch."""
    arch = request.param
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if arch == "clang++" and shutil.which(arch) is None:
        pytest.skip("no clang++")
    if "86" in arch and (platform.machine() != "x86_64" or (arch == "x86-64-v3" and not avx512)):
        pytest.skip("not for this processor, or the same as native")
    if arch != "native":
        kernels = compiled_for(arch)
        assert kernels.functions, kernels.state
        monkeypatch.setattr(native, "library", lambda: kernels)
    if not native.library().functions:
        pytest.skip(native.library().state)
    return monkeypatch


@pytest.fixture
def calls(compiled):
    """How often each kernel has been called."""
    counts = Counter()

    def counted(name, kernel):
        def call(*args):
            counts[name] += 1
            return kernel(*args)

        return call

    kernels = {name: counted(name, kernel) for name, kernel in native.library().functions.items()}
    compiled.setattr(native.library(), "functions", kernels)
    return counts


def plain(monkeypatch, function):
    """What ``function`` returns without the kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: NO_KERNELS)
        return function()


def relative(a, b):
    assert a.shape == b.shape
    return ((a - b).double().norm() / b.double().norm().clamp_min(1e-30)).item()


def check_plain(monkeypatch, run, close=1e-4):
    """``run`` returns the same tensors with and without the kernels."""
    for a, b in zip(run(), plain(monkeypatch, run), strict=True):
        assert relative(a, b) < close


def layers(n_channels, dtype=torch.float32):
    """A block's convolution and batch norm, with scales of both signs."""
    conv = torch.nn.Conv2d(n_channels, 32, 3, padding=1)
    norm = torch.nn.BatchNorm2d(32, eps=1e-3, momentum=0.95)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.bias.uniform_(-1, 1)
    return conv.to(dtype), norm.to(dtype)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def train(x, conv, norm):
    return train_block(x, conv, norm)


def spread(parameter):
    """The same parameter as every second number of something."""
    values = torch.stack((parameter.detach(), torch.full_like(parameter, torch.nan)), dim=-1)
    return torch.nn.Parameter(values[..., 0])


def check_block(monkeypatch, x, conv, norm):
    """Output, gradients, running statistics and test output are those of PyTorch."""
    grad_out = torch.randn(1, 32, x.shape[2] // 2, x.shape[3] // 2).expand(len(x), -1, -1, -1)

    def run():
        norm.reset_running_stats()
        out = train(x, conv, norm)
        learned = [conv.weight, norm.weight, norm.bias, *([x] if x.requires_grad else [])]
        grads = torch.autograd.grad(out, learned, grad_out)
        with torch.no_grad():
            tested = eval_block(x, conv, norm)
        return [out, tested, *grads, norm.running_mean.clone(), norm.running_var.clone()]

    check_plain(monkeypatch, run)


SIZES = [(16, 16), (21, 10), (10, 21), (5, 5), (2, 7), (42, 42)]


@CHANNELS
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_block(compiled, channels, height, width):
    """With odd sizes, whose last row and column only count in the statistics."""
    x = channels_last(3, channels, height, width).requires_grad_(channels == 32)
    check_block(compiled, x, *layers(channels))


@CHANNELS
def test_block_with_any_strides(compiled, channels):
    """Spread weights; an input and a gradient that repeat one image."""
    conv, norm = layers(channels)
    for module in (conv, norm):
        for name, p in list(module.named_parameters()):
            setattr(module, name, spread(p))
    check_block(compiled, torch.randn(1, channels, 9, 8).expand(3, -1, -1, -1), conv, norm)


@pytest.mark.parametrize(
    ("images", "height", "width"), [(3, 42, 42), (30, 10, 9), (2, 21, 5), (1, 2, 2)]
)
def test_convolution(compiled, images, height, width):
    """About as close to float64 as PyTorch's; incomplete tiles, several groups of tiles."""
    shape = (images, 32, height, width)
    x, weight, grad_out = channels_last(*shape), torch.randn(32, 32, 3, 3), channels_last(*shape)

    def in_pytorch(x, weight, grad_out):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        return [y, *torch.autograd.grad(y, (x, weight), grad_out)]

    args = x, weight, grad_out
    found = [native._convolve(x, weight), native._convolve(grad_out, weight, turned=True)]
    found.append(native._filters_gradient(grad_out, x, weight))
    eager, exact = in_pytorch(*(t.clone() for t in args)), in_pytorch(*(t.double() for t in args))
    for a, b, c in zip(found, eager, exact, strict=True):
        assert relative(a, c) < max(1e-6, relative(b, c))


def test_first_of_equal_maxima_gets_the_gradient(compiled):
    """With zeros, whose sums are equal to the bit in any order."""
    conv, norm = layers(32)
    x = torch.zeros(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()

    def run():
        return torch.autograd.grad(train_block(x, conv, norm)[:, :, 1:-1, 1:-1].sum(), [x])[0]

    assert torch.allclose(run(), plain(compiled, run), atol=1e-4)
    assert run().abs().max() > 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_numbers_stay_so(compiled, bad):
    for channels in (3, 32):
        x = channels_last(2, channels, 8, 8)
        x[0, 1, 3, 3] = bad
        assert not torch.isfinite(train(x, *layers(channels))).all()
    learner, x = FastConv4(32, 1e-3, 0.9, 5), channels_last(2, 3, 32, 32)
    x[1, 2, 5, 5] = bad
    loss, grad = learner.loss_and_grad(x, torch.tensor([0, 4]))
    assert loss.isnan()
    assert not grad.isfinite().all()
    meta, good = FastMetaLearner(4, 5, 300), torch.randn(300, 1)
    grad = good.clone()
    grad[7] = bad

    def run():
        steps = (torch.tensor(1.0), grad), (torch.tensor(bad), good)
        return torch.cat([meta(*step, meta.initial_state()).c for step in steps]).isfinite()

    finite = run()
    assert not finite.all()
    assert torch.equal(finite, plain(compiled, run))


def test_a_temporary_argument_lives_as_long_as_the_kernel_runs(monkeypatch):
    seen = []
    probe = {"probe": lambda *_: seen.append(made() is not None) or 1}
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions=probe))

    def temporary():
        nonlocal made
        tensor = torch.ones(3)
        made = weakref.ref(tensor)
        return tensor

    made = None
    native._call("probe", temporary(), 1)
    assert seen == [True]


def test_patch_moments(compiled, calls):
    for shape in ((2, 3, 9, 14), (1, 3, 16, 16), (3, 3, 2, 2)):
        x = channels_last(*shape)
        patches = torch.nn.functional.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1)
        total, product = PatchMoments.of(x)
        assert relative(total, patches.sum(1)) < 1e-5
        assert relative(product, patches @ patches.t()) < 1e-6
    calls.clear()
    others = [
        (400, 1, 128, 128),
        (2, 32, 8, 8),
        (2, 4, 8, 8),
        (3, 8, 8),
        (0, 3, 8, 8),
        (2, 3, 1, 8),
    ]
    images = [x.double(), *(torch.rand(shape) for shape in others)]
    assert [PatchMoments.of(x) for x in images] == [None] * len(images)
    assert not calls


@pytest.mark.parametrize("size_of_loss", [1.3, 1e-6])
@pytest.mark.parametrize(("hidden_size", "n_params"), [(20, 900), (20, 128), (1, 5), (7, 130)])
def test_meta_learner_steps(compiled, hidden_size, n_params, size_of_loss):
    """Three, and the gradients of what is learned, loss and gradients, against float64. Their sizes
    lie on both sides of e^-10, where ``prep`` changes its form; incomplete tiles, any strides.
    """
    fast = FastMetaLearner(4, hidden_size, n_params)
    with torch.no_grad():
        for p in (fast.metalstm.WF, fast.metalstm.WI, fast.metalstm.cI):
            p.normal_()
    exact = MetaLearner(4, hidden_size, n_params).double()
    exact.load_state_dict(fast.state_dict())
    cell = fast.metalstm
    cell.WF, cell.WI, cell.cI = map(spread, (cell.WF, cell.WI, cell.cI))
    grads = torch.randn(n_params, 1) * torch.logspace(-8, 1, n_params).unsqueeze(1)
    weights = torch.randn(n_params, 1)

    def run(meta, dtype):
        loss = torch.tensor(size_of_loss, dtype=dtype, requires_grad=True)
        grad, state = spread(grads.to(dtype)), meta.initial_state()
        for k in range(3):
            state = meta(loss * (1 + k), grad, state)
        inputs = [loss, grad, *meta.parameters()]
        return state.c, state.f, state.i, *torch.autograd.grad(state.c, inputs, weights.to(dtype))

    for a, b in zip(run(fast, torch.float32), run(exact, torch.float64), strict=True):
        assert relative(a, b) < 2e-4


def run_episode():
    """Test and train on an episode: the losses and the meta-learner's gradients."""
    model = Model("fast", 32, batch_size=10)
    episode = new_episode(5, n_eval=3, n_pass=3, size=32)
    tested, trained = model.test(episode)[0], model.train(episode)[0]
    return [tested, trained, *(p.grad for p in model.meta.parameters())]


def test_an_episode(compiled, calls):
    """The kernels do all the work of a test and a training episode, three updates each."""
    results = run_episode()
    assert set(calls) == set(library.KERNELS) - {"augment", "learner_gradient_frozen"}
    updates = ("learner_gradient", 6), ("meta_forward", 6), ("meta_backward", 3)
    assert all(calls[name] == n for name, n in updates)
    calls.clear()
    eager = plain(compiled, run_episode)
    assert not calls
    for a, b in zip(results[:2], eager[:2], strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-4)


@pytest.mark.parametrize(("images", "size", "n_classes"), [(25, 32, 5), (3, 50, 20), (1, 16, 2)])
def test_loss_and_grad_in_one_call(compiled, images, size, n_classes):
    """Loss, gradient and running statistics against float64; sizes that pooling cuts."""
    learner, x = FastConv4(size, 1e-3, 0.9, n_classes), channels_last(images, 3, size, size)
    with torch.no_grad():
        for b in range(1, 5):
            getattr(learner, f"norm{b}").weight.uniform_(-1, 1)
            getattr(learner, f"norm{b}").bias.uniform_(-1, 1)
    y = torch.randint(n_classes, (images,))
    eager, exact = copy.deepcopy(learner), copy.deepcopy(learner).double()

    def run(learner, x):
        return [*learner.loss_and_grad(x, y), *learner._running()]

    results, in_pytorch = run(learner, x), plain(compiled, lambda: run(eager, x))
    for a, b, c in zip(results, in_pytorch, run(exact, x.double()), strict=True):
        assert a.dtype == torch.float32
        assert relative(a, c) < max(2e-6, 3 * relative(b, c))
    again = plain(compiled, lambda: learner.loss_and_grad(x, y))  # with moments of these images
    assert all(relative(a, b) < 1e-4 for a, b in zip(again, results[:2], strict=True))


def test_loss_and_grad_of_misfits(compiled):
    """An error like PyTorch's, or NaN, and no reading beyond a tensor's end."""
    learner, x, y = FastConv4(32, 1e-3, 0.9, 5), channels_last(2, 3, 32, 32), torch.tensor([0, 4])
    for wrong in (y + 1, y - 1, y + 2**60):
        assert learner.loss_and_grad(x, wrong)[0].isnan()
    errors = ValueError, IndexError, RuntimeError
    for args in ((x, y[:1]), (x, y.int()), (channels_last(2, 3, 48, 32), y)):
        with pytest.raises(errors):
            learner.loss_and_grad(*args)
        with pytest.raises(errors):
            plain(compiled, lambda args=args: learner.loss_and_grad(*args))


def test_layers_that_the_kernels_do_not_know_are_refused(compiled):
    learner, x, y = FastConv4(32, 1e-3, 0.9, 5), channels_last(2, 3, 32, 32), torch.tensor([0, 4])
    learner.conv2 = torch.nn.Conv2d(32, 32, 1)
    with pytest.raises(ValueError, match="32, 3, 3"):
        learner.loss_and_grad(x, y)


def test_inference_mode(compiled):
    """Its tensors have no version."""
    learner = FastConv4(16, 1e-3, 0.9, 3).eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = learner(x)
    with torch.inference_mode():
        assert torch.equal(learner(torch.empty_like(x).copy_(x)), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_that_is_exhausted(compiled):
    """An exception, not the end of the process."""
    code = """import re, resource, torch
from fast.learner import FastConv4
torch.set_num_threads(1)
net, x, y = FastConv4(84, 1e-3, .9, 5), torch.rand(100, 3, 84, 84), torch.arange(100) % 5
net.loss_and_grad(x[:5], y[:5])
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 50 * 2**20, -1))
try:
    net.loss_and_grad(x, y)
except (MemoryError, RuntimeError) as e:
    print(type(e).__name__)
"""
    done = completed([sys.executable, "-c", code.replace("\\\\", "\\")], cwd=ROOT)
    assert done.stdout.split()[-1] == "MemoryError", done.stderr


def test_threads_change_no_bit(compiled):
    (conv, norm), (conv2, norm2) = layers(3), layers(32)
    learner, x, y = FastConv4(42, 1e-3, 0.9, 4), channels_last(12, 3, 42, 42), torch.arange(12) % 4
    meta, step = FastMetaLearner(4, 20, 3000), (torch.tensor(1.0), torch.randn(3000, 1) * 1e-3)
    learned = [conv.weight, norm.weight, conv2.weight, norm2.weight, *meta.parameters()]
    n_threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = train_block(train(x, conv, norm), conv2, norm2)
            c = meta(*step, meta(*step, meta.initial_state())).c
            grads = torch.autograd.grad(out.square().sum() + c.sum(), learned)
            learner.reset_batch_stats()
            loss_and_grad = learner.loss_and_grad(x, y)
            buffers = [b.clone() for b in learner.buffers()]
            results.append([out, c, *grads, *loss_and_grad, *buffers])
    finally:
        torch.set_num_threads(n_threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ---- What the kernels do not handle ----


def other_layers(channels, n_filters=32, kernel_size=3):
    conv = torch.nn.Conv2d(channels, n_filters, kernel_size, padding=1)
    return conv, torch.nn.BatchNorm2d(n_filters)


MISFITS = {  # images and layers
    "1 channel": (torch.rand(2, 1, 8, 8), lambda: other_layers(1)),
    "8 filters": (torch.rand(2, 3, 8, 8), lambda: other_layers(3, 8)),
    "5x5 filters": (torch.rand(2, 3, 8, 8), lambda: other_layers(3, 32, 5)),
    "other channels": (torch.rand(2, 3, 8, 8), lambda: other_layers(32)),
    "float64": (torch.rand(2, 3, 8, 8).double(), lambda: layers(3, torch.float64)),
    "float64 weights": (torch.rand(2, 3, 8, 8), lambda: layers(3, torch.float64)),
    "float16": (torch.rand(2, 3, 8, 8).half(), lambda: layers(3)),
    "bfloat16": (torch.rand(2, 32, 8, 8).bfloat16(), lambda: layers(32)),
    "1 px": (torch.rand(2, 32, 1, 1), lambda: layers(32)),
    "no images": (torch.rand(0, 3, 8, 8), lambda: layers(3)),
    "3-dimensional": (torch.rand(3, 8, 8), lambda: layers(3)),
    "meta": (torch.rand(2, 3, 8, 8, device="meta"), lambda: (m.to("meta") for m in layers(3))),
    "images with a gradient": (torch.rand(2, 3, 8, 8, requires_grad=True), lambda: layers(3)),
    "sparse": (torch.rand(2, 3, 8, 8).to_sparse(), lambda: layers(3)),
}


@pytest.mark.parametrize(("x", "layers"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_blocks_left_to_pytorch(compiled, calls, x, layers, mode):
    """The same numbers as PyTorch's, or the same exception."""
    conv, norm = layers()

    def outcome():
        torch.manual_seed(0)
        block = x, copy.deepcopy(conv), copy.deepcopy(norm)
        try:
            if mode == "train":
                return train_block(*block)
            return torch.no_grad()(eval_block)(*block)
        except (RuntimeError, ValueError, NotImplementedError) as e:
            return type(e)

    result, expected = outcome(), plain(compiled, outcome)
    if isinstance(result, type) or result.is_meta:
        assert result is expected or result.is_meta
    else:
        assert torch.equal(result, expected)
    assert not set(calls) - {"patch_moments"}  # which it may compute in vain


def test_autocast_is_pytorchs(compiled, calls):
    conv, norm = layers(32)
    with torch.autocast("cpu", torch.bfloat16):
        x = channels_last(2, 32, 8, 8)
        train_block(x, conv, norm)
        with torch.no_grad():
            eval_block(x, conv, norm)
    assert not calls


@CHANNELS
def test_second_backward_pass(compiled, channels):
    """Through the same graph: the same bits; through the gradient: autograd's error."""
    conv, norm = layers(channels)
    out = train_block(channels_last(2, channels, 8, 8), conv, norm)
    loss = out.square().sum()
    first, second = (
        torch.autograd.grad(loss, [conv.weight], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(loss, [conv.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_misfits_are_refused(compiled):
    """No reading beyond a tensor's end."""
    with pytest.raises((ValueError, RuntimeError)):
        train_block(channels_last(2, 3, 8, 8), layers(3)[0], torch.nn.BatchNorm2d(1))
    meta, loss = FastMetaLearner(4, 5, 300), torch.tensor(1.0)
    state, grad, short = meta.initial_state(), torch.randn(300, 1), torch.zeros(10, 1)
    changes = [{"f": short}, {"c": short}, {"lstm_h": state.lstm_h[:1]}]
    changes += [{"lstm_c": torch.zeros(300, 5)}, {"i": state.i.double()}]
    steps = [(loss, grad, state._replace(**change)) for change in changes]
    steps += [(loss, torch.randn(100000, 1), state), (loss, torch.randn(300), state)]
    for step in steps:
        with pytest.raises((ValueError, RuntimeError)):
            meta(*step)
    with pytest.raises((ValueError, RuntimeError)):
        meta.double()(loss, grad, state)


@pytest.mark.parametrize("image_size", [16, 37, 50])
def test_windows_of_any_size(compiled, image_size):
    """Of any size, enlarged, reduced and mirrored; pixels outside them do not matter."""
    sizes = [(2, 2), (3, 90), (100, 3), (20, 20), (7, 8), (1, 9), (99, 1), (40, 65), (12, 89)]
    n, extent = 2 * len(sizes), torch.tensor(sizes).repeat(2, 1)
    start = torch.tensor([100, 90]) - extent  # up to the last row and column
    start[::3] //= 2
    skip = torch.tensor([4 if image_size == 37 else 0, 0]).expand(n, 2)
    flip = torch.arange(n) < len(sizes)
    table = torch.cat((start, extent, skip + image_size, skip, flip[:, None]), dim=1).float()
    pixels = torch.full((n, 3, 100, 90), 255, dtype=torch.uint8)
    for image, (y, x), (height, width) in zip(pixels, start.tolist(), extent.tolist(), strict=True):
        image[:, y : y + height, x : x + width].random_(0, 100)

    def run():
        return augment.transform(pixels, table, image_size, "unit")

    x = run()
    assert x.max() < 100 / 255
    assert (x - plain(compiled, run)).abs().max() < 1e-5


def run_augment(start=0, extent=20, **changes):
    args = {"flip": torch.zeros(2, dtype=torch.bool), "jitter": torch.ones(2, 4)}
    args |= {"order": torch.arange(4).repeat(2, 1), "out": channels_last(2, 3, 16, 16)} | changes
    pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    windows = torch.stack([torch.full((2, 2), v) for v in (start, extent, 16, 0)])
    return native.augment(pixels, windows, scale=(torch.zeros(3), torch.ones(3)), **args)


WRONG_ARGUMENTS = {
    "start -1": {"start": -1},
    "start far": {"start": 10**6},
    "start overflows": {"start": 2**63 - 1},
    "empty window": {"extent": 0},
    "order": {"order": torch.full((2, 4), 10**6)},
    "channels first": {"out": torch.empty(2, 3, 16, 16)},
}


@pytest.mark.parametrize("changes", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_misfit_augmentation_is_refused(compiled, changes):
    run_augment()
    with pytest.raises(ValueError, match=r"kernel|window|order|channels_last"):
        run_augment(**changes)


def test_grey_and_empty_pixels_are_left_to_pytorch(compiled):
    for shape in ((2, 1, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)):
        assert not native.handles(torch.zeros(shape, dtype=torch.uint8), torch.uint8)
