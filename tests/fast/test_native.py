"""The compiled kernels against the same arithmetic in PyTorch, and what happens where they cannot
be compiled.
"""

import copy
import os
import platform
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from engine.backend import choose
from engine.flags import parse, settle
from episode import Episode, evaluate_episode, train_episode
from fast import augment, library, native
from fast.learner import FastConv4, eval_block, train_block
from fast.metalearner import FastMetaLearner
from fast.native import PatchMoments

WITHOUT = SimpleNamespace(functions={}, state="")
PORTABLE = [
    flag if flag != "-march=native" else "-march=x86-64-v3" for flag in library.FLAGS
]  # AVX2, no AVX-512


@pytest.fixture(params=["this processor", "without AVX-512"])
def compiled(request, monkeypatch):
    """Kernels made for this processor, and those that one without AVX-512 would get."""
    if request.param == "without AVX-512":
        if platform.machine() != "x86_64":
            pytest.skip("not an x86-64 processor")
        monkeypatch.setattr(library, "FLAGS", PORTABLE)
        found = library.Library()
        monkeypatch.setattr(native, "library", lambda: found)
    if not native.library().functions:
        pytest.skip(native.library().state)
    return monkeypatch


@pytest.fixture
def calls(compiled):
    """How often each kernel has been called."""
    found = Counter()

    def counted(name, kernel):
        def call(*args):
            found[name] += 1
            kernel(*args)

        return call

    kernels = {name: counted(name, kernel) for name, kernel in native.library().functions.items()}
    compiled.setattr(native.library(), "functions", kernels)
    return found


def plain(monkeypatch, function):
    """What ``function`` gives without the kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: WITHOUT)
        return function()


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm().clamp_min(1e-30)).item()


def layers(n_channels, dtype=torch.float32):
    conv, norm = (
        torch.nn.Conv2d(n_channels, 32, 3, padding=1),
        torch.nn.BatchNorm2d(32, eps=1e-3, momentum=0.95),
    )
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.bias.uniform_(-1, 1)
    return conv.to(dtype), norm.to(dtype)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("height", "width"), [(16, 16), (21, 10), (10, 21), (5, 5), (2, 7), (42, 42)]
)
def test_block(compiled, first, height, width):
    """Odd sizes, too, whose last row and column are not pooled but count in the statistics; scales
    of both signs.
    """
    conv, norm = layers(3 if first else 32)
    x = channels_last(3, 3 if first else 32, height, width).requires_grad_(not first)
    ahead = torch.randn(3, 32, height // 2, width // 2)

    def run():
        norm.reset_running_stats()
        out = train_block(x, conv, norm, PatchMoments.of(x) if first else None)
        inputs = [conv.weight, norm.weight, norm.bias] + ([] if first else [x])
        return [
            out,
            *torch.autograd.grad(out, inputs, ahead),
            norm.running_mean.clone(),
            norm.running_var.clone(),
        ]

    for ours, theirs in zip(run(), plain(compiled, run), strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("images", "height", "width"), [(3, 42, 42), (30, 10, 9), (2, 21, 5), (1, 2, 2)]
)
def test_convolution(compiled, images, height, width):
    """About as close to float64 as PyTorch's, or closer, forward and back; sizes that fill no tile;
    several groups of tiles.
    """
    shape = (images, 32, height, width)
    x, weight, ahead = channels_last(*shape), torch.randn(32, 32, 3, 3), channels_last(*shape)

    def by_pytorch(x, weight, ahead):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        return [y, *torch.autograd.grad(y, (x, weight), ahead)]

    ours = [native._convolved(x, weight), *native._convolved_back(ahead, x, weight, True)]
    theirs = by_pytorch(*(t.clone() for t in (x, weight, ahead)))
    exact = by_pytorch(*(t.double() for t in (x, weight, ahead)))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert relative(a, c) < max(1e-6, relative(b, c))
    without, grad_w = native._convolved_back(ahead, x, weight, False)
    assert without is None
    assert torch.equal(grad_w, ours[2])


@pytest.mark.parametrize("channels", [3, 32])
def test_block_in_bf16(compiled, channels):
    """No further from float32 with the same rounded inputs than PyTorch is, which rounds more in
    between.
    """
    conv, norm = layers(channels)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.bfloat16())
    x, ahead = channels_last(4, channels, 20, 20).bfloat16(), torch.randn(4, 32, 10, 10).bfloat16()

    def run(dtype=torch.bfloat16):
        images = x.to(dtype).requires_grad_(channels > 3)
        out = train_block(
            images, conv, norm, PatchMoments.of(images.detach()) if channels == 3 else None
        )
        assert out.dtype == dtype
        return [
            out,
            *torch.autograd.grad(out, [conv.weight, norm.weight, norm.bias], ahead.to(dtype)),
        ]

    for ours, theirs, exact in zip(run(), plain(compiled, run), run(torch.float32), strict=True):
        assert relative(ours.float(), exact) < max(1.1 * relative(theirs.float(), exact), 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 32])
@torch.no_grad()
def test_block_in_eval_mode(compiled, channels, dtype):
    conv, norm = layers(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = channels_last(2, channels, 11, 14).to(dtype)
    ours, theirs = eval_block(x, conv, norm), plain(compiled, lambda: eval_block(x, conv, norm))
    assert ours.dtype == theirs.dtype
    assert relative(ours.float(), theirs.float()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_first_of_equal_maxima_gets_the_gradient(compiled):
    """Of zeros: then the sums are equal to the bit in whatever order they are taken."""
    conv, norm = layers(32)
    x = torch.zeros(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()

    def run():
        return torch.autograd.grad(train_block(x, conv, norm)[:, :, 1:-1, 1:-1].sum(), [x])[0]

    assert torch.allclose(run(), plain(compiled, run), atol=1e-4)
    assert run().abs().max() > 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [3, 32])
def test_what_is_not_finite_stays_so(compiled, channels, bad):
    conv, norm = layers(channels)
    x = channels_last(2, channels, 8, 8)
    x[0, 1, 3, 3] = bad
    out = train_block(x, conv, norm, PatchMoments.of(x) if channels == 3 else None)
    assert not torch.isfinite(out).all()
    meta, good = FastMetaLearner(4, 5, 300), torch.randn(300, 1)
    grad = good.clone()
    grad[7] = bad

    def run():
        state = meta.initial_state()
        return torch.cat(
            (meta(torch.tensor(1.0), grad, state).c, meta(torch.tensor(bad), good, state).c)
        ).isfinite()

    found = run()
    assert not found.all()
    assert torch.equal(found, plain(compiled, run))


def test_patch_moments(compiled):
    for shape in ((2, 3, 9, 14), (1, 3, 16, 16), (3, 3, 2, 2)):
        x = channels_last(*shape)
        patches = torch.nn.functional.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1)
        found = PatchMoments.of(x)
        assert relative(found.total, patches.sum(1)) < 1e-5
        assert relative(found.product, patches @ patches.t()) < 1e-6
        assert found.count == patches.shape[1]
    assert PatchMoments.of(x.double()) is None


@pytest.mark.parametrize(("hidden_size", "n_params"), [(20, 900), (20, 128), (1, 5), (7, 130)])
def test_steps_of_the_meta_learner(compiled, hidden_size, n_params):
    """Three steps, whose gradients reach all that is learned; P need not fill the tiles."""
    meta = FastMetaLearner(4, hidden_size, n_params)
    with torch.no_grad():
        meta.metalstm.WF.normal_()
        meta.metalstm.WI.normal_()
        meta.metalstm.cI.normal_()
    size = 10 ** torch.empty(3, n_params, 1).uniform_(-7, 1)  # on both sides of prep's e^-10
    grads, losses, ahead = (
        size * torch.randn(3, n_params, 1).sign(),
        torch.rand(3),
        torch.randn(n_params, 1),
    )

    def run():
        state = meta.initial_state()
        for loss, grad in zip(losses, grads, strict=True):
            state = meta(loss, grad, state)
        return [
            state.c,
            state.f,
            state.i,
            *torch.autograd.grad(state.c, list(meta.parameters()), ahead),
        ]

    for ours, theirs in zip(run(), plain(compiled, run), strict=True):
        assert relative(ours, theirs) < 2e-4


def an_episode(conv_dtype=None, image_size=32):
    torch.manual_seed(3)
    w_grad, wo_grad = (
        FastConv4(image_size, 1e-3, 0.95, 5, "one", conv_dtype=conv_dtype) for _ in range(2)
    )
    meta = FastMetaLearner(4, 20, w_grad.get_flat_params().numel())
    meta.metalstm.init_cI(w_grad.get_flat_params())
    y = torch.arange(5)
    support, query = (
        channels_last(10, 3, image_size, image_size),
        channels_last(15, 3, image_size, image_size),
    )
    episode = Episode(
        support,
        y.repeat_interleave(2),
        query,
        y.repeat_interleave(3),
        torch.arange(10).repeat(3, 1),
    )
    optimizer = torch.optim.Adam(meta.parameters(), fused=True)
    tested = evaluate_episode(episode, w_grad, wo_grad, meta, 10)[0]
    trained = train_episode(episode, w_grad, wo_grad, meta, optimizer, 10, 0.25)[0]
    return [tested, trained, *(p.grad for p in meta.parameters())]


@pytest.mark.parametrize("conv_dtype", [None, torch.bfloat16])
def test_an_episode(compiled, calls, conv_dtype):
    """The kernels do all the work of an evaluation and a training episode, three updates each, and
    agree with PyTorch.
    """
    ours = an_episode(conv_dtype)
    kind = "float" if conv_dtype is None else "bfloat16"
    # the query images take one pass more: in eval mode, then in train mode, with moments of their
    # own
    expected = Counter({"meta_forward": 6, "meta_backward": 3})
    if conv_dtype is None:  # one call an update
        expected |= Counter(
            {"learner_gradient": 6, "convolve": 6, "convolve_to_input": 3, "convolve_to_filters": 3}
        )
        passes = 1
    else:  # the convolutions, but for the first block's, are PyTorch's
        passes = 7
    by_type = {
        "patch_moments": 3,
        "first_forward": passes,
        "first_backward": passes,
        "first_eval": 1,
    }
    by_type |= {"block_forward": 3 * passes, "block_backward": 3 * passes, "block_eval": 3}
    assert calls == expected | Counter({f"{name}_{kind}": n for name, n in by_type.items()})
    calls.clear()
    theirs = plain(compiled, lambda: an_episode(conv_dtype))
    assert not calls
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-4 if conv_dtype is None else 1e-2)


@pytest.mark.parametrize(
    ("images", "image_size", "n_classes"), [(25, 32, 5), (3, 50, 20), (1, 16, 2)]
)
def test_loss_and_gradient_in_one_call(compiled, images, image_size, n_classes):
    """Against PyTorch in float64: loss, gradient and running statistics; scales of both signs;
    sizes that pooling cuts.
    """
    learner, x = (
        FastConv4(image_size, 1e-3, 0.9, n_classes),
        channels_last(images, 3, image_size, image_size),
    )
    with torch.no_grad():
        for b in range(1, 5):
            getattr(learner, f"norm{b}").weight.uniform_(-1, 1)
            getattr(learner, f"norm{b}").bias.uniform_(-1, 1)
    y, exact, theirs = (
        torch.randint(n_classes, (images,)),
        copy.deepcopy(learner).double(),
        copy.deepcopy(learner),
    )

    def found(learner, x):
        return [*learner.loss_and_grad(x, y), *learner._running("mean"), *learner._running("var")]

    reference = found(exact, x.double())
    ours, by_pytorch = found(learner, x), plain(compiled, lambda: found(theirs, x))
    for a, b, c in zip(ours, by_pytorch, reference, strict=True):
        assert a.shape == c.shape
        assert a.dtype == torch.float32
        assert relative(a, c) < max(2e-6, 3 * relative(b, c))
    again = plain(
        compiled, lambda: learner.loss_and_grad(x, y)
    )  # although it has seen these images with the kernels
    assert all(relative(a, b) < 1e-4 for a, b in zip(again, ours[:2], strict=True))


def test_loss_and_gradient_of_what_does_not_fit(compiled):
    """An error like PyTorch's, or no number, and no reading beyond a tensor's end."""
    learner, x, y = FastConv4(32, 1e-3, 0.9, 5), channels_last(2, 3, 32, 32), torch.tensor([0, 4])
    for wrong in (y + 1, y - 1, y + 2**60):
        assert learner.loss_and_grad(x, wrong)[0].isnan()
    for images, labels in ((x, y[:1]), (x, y.int()), (channels_last(2, 3, 48, 32), y)):
        for run in (
            learner.loss_and_grad,
            lambda *args: plain(compiled, lambda: learner.loss_and_grad(*args)),
        ):
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                run(images, labels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_and_gradient_that_are_not_finite(compiled, bad):
    learner, x = FastConv4(32, 1e-3, 0.9, 5), channels_last(2, 3, 32, 32)
    x[1, 2, 5, 5] = bad
    loss, grad = learner.loss_and_grad(x, torch.tensor([0, 4]))
    assert loss.isnan()
    assert not grad.isfinite().all()


def test_the_number_of_threads_changes_no_bit(compiled):
    (conv, norm), (conv2, norm2) = layers(3), layers(32)
    learner, y = FastConv4(42, 1e-3, 0.9, 4), torch.arange(12) % 4
    x, meta, grad = (
        channels_last(12, 3, 42, 42),
        FastMetaLearner(4, 20, 3000),
        torch.randn(3000, 1) * 1e-3,
    )
    kept, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = train_block(train_block(x, conv, norm, PatchMoments.of(x)), conv2, norm2)
            state = meta(
                torch.tensor(1.0), grad, meta(torch.tensor(1.0), grad, meta.initial_state())
            )
            learned = [conv.weight, norm.weight, conv2.weight, norm2.weight, *meta.parameters()]
            found = torch.autograd.grad(out.square().sum() + state.c.sum(), learned)
            learner.reset_batch_stats()
            results.append(
                [
                    out,
                    state.c,
                    *found,
                    *learner.loss_and_grad(x, y),
                    *(b.clone() for b in learner.buffers()),
                ]
            )
    finally:
        torch.set_num_threads(kept)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- What the kernels do not know ----


def wide(n_channels, n_filters=32, kernel_size=3):
    return torch.nn.Conv2d(n_channels, n_filters, kernel_size, padding=1), torch.nn.BatchNorm2d(
        n_filters
    )


@pytest.mark.parametrize(
    ("x", "layers"),
    [
        (torch.rand(2, 1, 8, 8), lambda: wide(1)),
        (torch.rand(2, 5, 8, 8), lambda: wide(5)),
        (torch.rand(2, 3, 8, 8), lambda: wide(3, 8)),
        (torch.rand(2, 3, 8, 8), lambda: wide(3, 32, 5)),
        (torch.rand(2, 3, 8, 8), lambda: wide(32)),
        (torch.rand(2, 3, 8, 8).double(), lambda: layers(3, torch.float64)),
        (torch.rand(2, 3, 8, 8), lambda: layers(3, torch.float64)),
        (torch.rand(2, 3, 8, 8).half(), lambda: layers(3)),
        (torch.rand(2, 3, 8, 1), lambda: layers(3)),
        (torch.rand(2, 32, 1, 1), lambda: layers(32)),
        (torch.rand(0, 3, 8, 8), lambda: layers(3)),
        (torch.rand(0, 32, 8, 8), lambda: layers(32)),
        (torch.rand(3, 8, 8), lambda: layers(3)),
        (torch.rand(2, 3, 8, 8, device="meta"), lambda: tuple(m.to("meta") for m in layers(3))),
        (torch.rand(2, 3, 8, 8).to_sparse(), lambda: layers(3)),
    ],
    ids=lambda v: (
        f"{str(v.dtype)[6:]} {list(v.shape)} {v.device} {str(v.layout)[6:]}"
        if isinstance(v, torch.Tensor)
        else ""
    ),
)
def test_what_the_blocks_leave_to_pytorch(compiled, calls, x, layers):
    """The same numbers as PyTorch's, or the same complaint."""
    conv, norm = layers()

    def outcome(function):
        torch.manual_seed(0)
        try:
            return function(x, copy.deepcopy(conv), copy.deepcopy(norm))
        except (RuntimeError, ValueError, NotImplementedError) as e:
            return type(e)

    for function in (
        lambda x, *layers: train_block(x, *layers, PatchMoments.of(x)),
        torch.no_grad()(eval_block),
    ):
        ours, theirs = (
            outcome(function),
            plain(compiled, lambda function=function: outcome(function)),
        )
        if isinstance(ours, type) or ours.is_meta:
            assert ours is theirs or ours.is_meta
        else:
            assert torch.equal(ours, theirs)
    assert not set(calls) - {"patch_moments_float"}  # which it may compute in vain


def test_autocast_is_pytorchs(compiled, calls):
    conv, norm = layers(32)
    with torch.autocast("cpu", torch.bfloat16):
        x = channels_last(2, 32, 8, 8)
        train_block(x, conv, norm)
        with torch.no_grad():
            eval_block(x, conv, norm)
    assert not calls


def test_moments_of_what_is_no_image(compiled, calls):
    for shape in (
        (400, 1, 128, 128),
        (2, 32, 8, 8),
        (2, 4, 8, 8),
        (3, 8, 8),
        (0, 3, 8, 8),
        (2, 3, 1, 8),
    ):
        assert PatchMoments.of(torch.rand(shape)) is None
    assert not calls


def test_moments_of_other_images_are_not_used(compiled):
    conv, norm = layers(3)
    x = channels_last(2, 3, 8, 8)
    assert torch.equal(
        train_block(x, conv, norm, PatchMoments.of(x[:1])), train_block(x, conv, norm)
    )


@pytest.mark.parametrize("n_channels", [3, 32])
def test_any_strides(compiled, n_channels):
    """Weights that are every second number of something, and an input and a gradient that repeat
    one image.
    """
    conv, norm = layers(n_channels)
    for module in (conv, norm):
        for name, p in list(module.named_parameters()):
            spread = torch.stack((p.detach(), torch.full_like(p, torch.nan)), dim=-1)[..., 0]
            setattr(module, name, torch.nn.Parameter(spread))
    x = torch.randn(1, n_channels, 9, 8).expand(3, -1, -1, -1)
    ahead = torch.randn(1, 32, 4, 4).expand(3, -1, -1, -1)

    def run():
        norm.reset_running_stats()
        out = train_block(x, conv, norm, PatchMoments.of(x) if n_channels == 3 else None)
        with torch.no_grad():
            tested = eval_block(x, conv, norm)
        return [
            out,
            tested,
            *torch.autograd.grad(out, [conv.weight, norm.weight, norm.bias], ahead),
        ]

    for ours, theirs in zip(run(), plain(compiled, run), strict=True):
        assert relative(ours, theirs) < 1e-4


def test_images_that_need_a_gradient(compiled):
    conv, norm = layers(3)
    x = channels_last(2, 3, 8, 8).requires_grad_()
    ahead = torch.randn(2, 32, 4, 4)

    def run():
        return torch.autograd.grad(train_block(x, conv, norm, PatchMoments.of(x)), [x], ahead)[0]

    assert relative(run(), plain(compiled, run)) < 1e-4


@pytest.mark.parametrize("n_channels", [3, 32])
def test_a_second_backward_pass(compiled, n_channels):
    """Through the same graph it gives the same; through the gradient itself there is none, which
    autograd says.
    """
    conv, norm = layers(n_channels)
    out = train_block(channels_last(2, n_channels, 8, 8), conv, norm)
    first, second = (
        torch.autograd.grad(out.square().sum(), [conv.weight], retain_graph=True)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(out.square().sum(), [conv.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_norm_of_another_width(compiled):
    conv, _ = layers(3)
    with pytest.raises((ValueError, RuntimeError)):
        train_block(channels_last(2, 3, 8, 8), conv, torch.nn.BatchNorm2d(1))


def test_steps_that_do_not_fit(compiled):
    """Sizes, types and graphs that the kernel does not know: an error and no reading beyond a
    tensor's end.
    """
    meta, loss = FastMetaLearner(4, 5, 300), torch.tensor(1.0)
    state, grad = meta.initial_state(), torch.randn(300, 1)
    short = torch.zeros(10, 1)
    for wrong in (
        lambda: meta(loss, torch.randn(100000, 1), state),
        lambda: meta(loss, torch.randn(300), state),
        lambda: meta(loss, grad, state._replace(f=short)),
        lambda: meta(loss, grad, state._replace(c=short)),
        lambda: meta(loss, grad, state._replace(lstm_h=state.lstm_h[:1])),
        lambda: meta(loss, grad, state._replace(lstm_c=torch.zeros(300, 5))),
        lambda: meta(loss, grad, state._replace(i=state.i.double())),
        lambda: meta(loss, grad.clone().requires_grad_(), state),
        lambda: meta.double()(loss, grad, state),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            wrong()


def test_steps_with_any_strides(compiled):
    meta, loss, grad = FastMetaLearner(4, 5, 300), torch.tensor(1.0), torch.randn(300, 2)[:, :1]
    for p in ("WF", "WI", "cI"):
        spread = torch.stack(
            (
                getattr(meta.metalstm, p).detach(),
                torch.full_like(getattr(meta.metalstm, p), torch.nan),
            ),
            -1,
        )
        setattr(meta.metalstm, p, torch.nn.Parameter(spread[..., 0]))

    def run():
        c = meta(loss, grad, meta.initial_state()).c
        return [c, *torch.autograd.grad(c.sum(), [meta.metalstm.WF, meta.metalstm.cI])]

    for ours, theirs in zip(run(), plain(compiled, run), strict=True):
        assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("image_size", [16, 37, 50])
def test_windows_of_any_size(compiled, image_size):
    """Narrower than a vector, of fewer rows than a filter's, enlarged and reduced, mirrored or not;
    nothing outside counts.
    """
    windows = torch.tensor(
        [(2, 2), (3, 90), (100, 3), (20, 20), (7, 8), (1, 9), (99, 1), (40, 65), (12, 89)]
    )
    n = 2 * len(windows)
    extent = windows.repeat(2, 1)
    start = torch.tensor([100, 90]) - extent  # up to the last row and column
    start[::3] //= 2
    skip = (torch.tensor([4, 0]) if image_size == 37 else torch.tensor([0, 0])).expand(n, 2)
    flip = torch.arange(n) < len(windows)
    table = torch.cat((start, extent, skip + image_size, skip, flip[:, None]), dim=1).float()
    pixels = torch.full((n, 3, 100, 90), 255, dtype=torch.uint8)
    for image, (y, x), (height, width) in zip(pixels, start.tolist(), extent.tolist(), strict=True):
        image[:, y : y + height, x : x + width].random_(0, 100)
    ours = augment.transform(pixels, table, image_size, "unit")
    assert ours.max() < 100 / 255
    theirs = plain(compiled, lambda: augment.transform(pixels, table, image_size, "unit"))
    assert (ours - theirs).abs().max() < 1e-5


def augmented(channels=3, **changes):
    args = {
        "start": 0,
        "extent": 20,
        "flip": torch.zeros(2, dtype=torch.bool),
        "jitter": torch.ones(2, 4),
        "order": torch.arange(4).repeat(2, 1),
        "out": torch.empty(2, 3, 16, 16).contiguous(memory_format=torch.channels_last),
    } | changes
    pixels = torch.randint(0, 256, (2, channels, 20, 20), dtype=torch.uint8)
    windows = torch.stack([torch.full((2, 2), v) for v in (args["start"], args["extent"], 16, 0)])
    scale = torch.zeros(3), torch.ones(3)
    return native.augment(
        pixels, windows, args["flip"], args["jitter"], args["order"], scale, args["out"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 1},
        {"start": 1},
        {"start": -1},
        {"start": 10**6},
        {"start": 2**63 - 1},
        {"extent": 0},
        {"flip": torch.zeros(1, dtype=torch.bool)},
        {"flip": torch.zeros(2)},
        {"jitter": torch.ones(1, 4)},
        {"jitter": torch.ones(2, 4).double()},
        {"order": torch.full((2, 4), 10**6)},
        {"order": torch.arange(4).repeat(2, 1).int()},
        {"out": torch.empty(2, 3, 16, 16)},
        {"out": torch.empty(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)},
        {"out": torch.empty(2, 3, 16, 16).half().contiguous(memory_format=torch.channels_last)},
    ],
    ids=lambda changes: ", ".join(
        f"{k} {tuple(v.shape) if torch.is_tensor(v) else v}" for k, v in changes.items()
    ),
)
def test_augmentation_that_does_not_fit(compiled, changes):
    augmented()
    with pytest.raises(ValueError, match=r"kernel|window|order|channels_last"):
        augmented(**changes)


def test_grey_and_empty_pixels_are_pytorchs(compiled):
    for shape in ((2, 1, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)):
        assert not native.handles(torch.zeros(shape, dtype=torch.uint8), torch.uint8)


# ---- Compiling ----

PROBE = "from fast.library import library; print(bool(library().functions)); print(library().state)"


def probe(cache, **environment):
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)} | environment
    found = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True
    )
    assert found.stderr == ""
    made, state = found.stdout.splitlines()
    return made == "True", state


def test_without_a_compiler_it_says_so_and_goes_on(tmp_path):
    for environment, words in (
        ({"PATH": str(tmp_path)}, "install g++"),
        ({"CXX": str(tmp_path / "none")}, "No such file"),
        ({"CXX": "/bin/false"}, "/bin/false"),
    ):
        made, state = probe(tmp_path, **({"CXX": ""} | environment))
        assert not made
        assert words in state
        assert "a third of the speed" in state
    assert list(tmp_path.iterdir()) == []


def test_a_compilers_error_is_shown(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho note >&2\necho 'a.cpp:1: error: bad' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    made, state = probe(tmp_path / "cache", CXX=str(compiler))
    assert not made
    assert "a.cpp:1: error: bad" in state
    assert list((tmp_path / "cache" / "lstm-meta-learner").iterdir()) == []


def test_compiled_once_and_again_if_damaged(tmp_path):
    if not native.library().functions:
        pytest.skip(native.library().state)
    assert probe(tmp_path)[0]
    (made,) = (tmp_path / "lstm-meta-learner").iterdir()
    first = made.stat()
    assert probe(tmp_path, PATH=f"{os.environ['PATH']}")[0]
    assert made.stat().st_mtime_ns == first.st_mtime_ns
    made.write_bytes(made.read_bytes()[:1000])
    assert probe(tmp_path)[0]
    assert made.stat().st_size == first.st_size
    assert list((tmp_path / "lstm-meta-learner").iterdir()) == [made]


def test_nowhere_to_keep_them(tmp_path):
    if not native.library().functions:
        pytest.skip(native.library().state)
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert probe(occupied)[0]
    assert occupied.read_text() == ""


@pytest.mark.parametrize(
    ("capability", "precision", "said"),
    [("AVX2", "bf16", True), ("AVX2", "fp32", False), ("AVX512", "bf16", False)],
)
def test_bf16_on_a_processor_that_is_slow_at_it_is_noted(monkeypatch, capability, precision, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    way = choose(settle({"cpu": True, "precision": precision}, parse([])[1]))
    assert ("note: --precision bf16" in way.description) == said
