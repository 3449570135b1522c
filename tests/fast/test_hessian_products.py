"""Second order by the CPU kernels: a Hessian-vector product with frozen switches."""

import pytest
import torch
from conftest import make

from episode import Episode, meta_gradient
from fast import native
from fast.learner import FastConv4
from learner import Conv4

needs_kernels = pytest.mark.skipif(not native.handles(torch.ones(1)), reason="no kernels")


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


def learners(size, n_class=5):
    """The fast one in float32 and the definition in float64, with scales of both signs."""
    fast = FastConv4(size, 1e-3, 0.95, n_class)
    with torch.no_grad():
        fast.norm1.weight[::3] *= -1
        fast.norm3.weight[::5] *= -1
    exact = Conv4(size, 1e-3, 0.95, n_class).double()
    exact.copy_flat_params(fast.get_flat_params())
    return fast, exact


def product(learner, x, y, c, v):
    """Loss, gradient, and the derivative of 0.3 loss + v * gradient, at c."""
    c = c.to(x.dtype).requires_grad_()
    loss, grad = learner.loss_and_grad_at(x, y, c)
    of_c = torch.autograd.grad(0.3 * loss + (v.to(x.dtype) * grad).sum(), c)
    return loss, grad, *of_c


def statistics(learner):
    return [t for name, t in learner.named_buffers() if "running" in name]


SLOW = pytest.mark.slow
CASES = [(84, 1, 1), (84, 1, 8), (42, 3, 4)]
CASES += [pytest.param(84, 5, t, marks=SLOW) for t in (1, 8)]


@needs_kernels
@pytest.mark.parametrize(("size", "n_shot", "update"), CASES)
def test_product(size, n_shot, update):
    """Against double backward in float64, early and late in an episode of gradient descent."""
    fast, exact = learners(size)
    y = torch.arange(5).repeat_interleave(n_shot)
    x = torch.randn(5, 3, size, size).repeat_interleave(n_shot, dim=0)
    x = x + 0.5 * torch.randn_like(x)
    for _ in range(update - 1):
        fast.copy_flat_params(fast.get_flat_params() - 0.1 * fast.loss_and_grad(x, y)[1].squeeze(1))
    c, v = fast.get_flat_params().unsqueeze(1), torch.randn(fast.size(), 1)
    for learner in (fast, exact):
        learner.reset_batch_stats()
    found = *product(fast, x, y, c, v), *statistics(fast)
    expected = *product(exact, x.double(), y, c, v), *statistics(exact)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 0.01


@needs_kernels
def test_a_product_with_zero_is_zero():
    fast, _ = learners(20)
    x, y, c = torch.randn(5, 3, 20, 20), torch.arange(5), fast.get_flat_params().unsqueeze(1)
    _, grad, of_c = product(fast, x, y, c, torch.zeros_like(c))
    assert torch.equal(of_c, torch.tensor(0.3) * grad)


@needs_kernels
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e20])
def test_vectors_of_any_size(scale):
    fast, exact = learners(20)
    x, y, c = torch.randn(5, 3, 20, 20), torch.arange(5), fast.get_flat_params().unsqueeze(1)
    v, products = scale * torch.randn(fast.size(), 1), []
    for learner, images in ((fast, x), (exact, x.double())):
        at = c.to(images.dtype).requires_grad_()
        _, grad = learner.loss_and_grad_at(images, y, at)
        products += torch.autograd.grad((v.to(images.dtype) * grad).sum(), at)
    assert relative(*products) < 0.02


@needs_kernels
def test_images_that_are_overwritten_before_the_backward_pass():
    fast, _ = learners(20)
    x, y, c = torch.randn(5, 3, 20, 20), torch.arange(5), fast.get_flat_params().unsqueeze(1)
    _, grad = fast.loss_and_grad_at(x, y, c.requires_grad_())
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(grad.sum(), c)


def test_running_statistics_in_evaluation():
    """They normalise, and stay as they are."""
    fast, exact = learners(20)
    for of_fast, of_exact in zip(statistics(fast), statistics(exact), strict=True):
        of_exact.copy_(of_fast.uniform_(0.5, 1.5))
    before = [t.clone() for t in statistics(fast)]
    x, y, c = torch.randn(5, 3, 20, 20), torch.arange(5), fast.get_flat_params().unsqueeze(1)
    found = product(fast.eval(), x, y, c, torch.ones_like(c))
    expected = product(exact.eval(), x.double(), y, c, torch.ones_like(c))
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-3
    assert all(map(torch.equal, before, statistics(fast)))


@needs_kernels
@pytest.mark.parametrize(("n_shot", "batch_size"), [(2, 6), (2, 4), (1, 3)])
def test_a_whole_episode(n_shot, batch_size):
    """The kernels' error is small beside what second order changes."""
    episode, *fast = make("fast", n_shot=n_shot, size=32)
    doubled, *exact = make("plain", n_shot=n_shot, size=32, dtype=torch.float64)
    doubled = Episode(*(t.to(u.dtype) for t, u in zip(episode, doubled, strict=True)))
    exact[2].load_state_dict(fast[2].state_dict())
    fast[2].second_order = exact[2].second_order = True
    found, loss, _ = meta_gradient(episode, *fast, batch_size)
    expected, exact_loss, _ = meta_gradient(doubled, *exact, batch_size)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-4)
    exact[2].second_order = False
    first_order, *_ = meta_gradient(doubled, *exact, batch_size)
    assert relative(found, expected) < 0.01 < 0.1 < relative(first_order, expected)


def test_bfloat16_and_no_kernels_take_the_plain_way(monkeypatch):
    """As on a GPU; the convolutions keep their dtype."""
    x, y = torch.randn(10, 3, 32, 32), torch.arange(5).repeat(2)
    fast, exact = learners(32)
    c, v = fast.get_flat_params().unsqueeze(1), torch.randn(fast.size(), 1)
    expected = product(exact, x.double(), y, c, v)
    fast.conv_dtype = torch.bfloat16
    _, grad, of_c = product(fast, x, y, c, v)
    assert of_c.dtype == torch.float32
    assert 1e-4 < relative(grad, expected[1]) < 0.2
    assert torch.isfinite(of_c).all()
    monkeypatch.setattr(native, "handles", lambda *_: False)
    fast, _ = learners(32)
    fast.copy_flat_params(c)
    for a, b in zip(product(fast, x, y, c, v), expected, strict=True):
        assert relative(a, b) < 0.01
