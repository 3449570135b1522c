"""Whole training episodes on real JPEGs: fast against plain, bfloat16 against float32."""

import pytest
import torch
from conftest import Model, drawn
from torch.utils._python_dispatch import TorchDispatchMode

from fast.learner import FastConv4
from fast.library import library
from fast.metalearner import LARGEST_HIDDEN, FastMetaLearner
from learner import Conv4
from metalearner import MetaLearner

SLOW = pytest.mark.slow


def close(results, expected, rel):
    pairs = zip(results, expected, strict=True)
    return all(a.item() == pytest.approx(b.item(), rel=rel) for a, b in pairs)


@pytest.mark.parametrize(("batch_size", "length"), [(10, 2), pytest.param(25, 20, marks=SLOW)])
def test_consecutive_episodes_in_float64(master, batch_size, length):
    """Rounding cannot hide a wrong gradient, and has no room to grow."""
    plain, fast = (Model(w, 32, torch.float64, batch_size=batch_size) for w in ("plain", "fast"))
    for episode in drawn(master, 32, length, torch.float64):
        assert close(fast.train(episode), plain.train(episode), 1e-9)
        assert close(fast.test(episode), plain.test(episode), 1e-9)
    expected = plain.meta.state_dict()
    for name, value in fast.meta.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(
    ("image_size", "length"),
    [(42, 2), pytest.param(42, 20, marks=SLOW), pytest.param(84, 3, marks=SLOW)],
)
def test_single_episodes_in_float32(master, image_size, length):
    """Each from the plain parameters: rounding grows to 2e-3 or 3e-2 in 20 episodes in a row."""
    plain, fast = (Model(w, image_size) for w in ("plain", "fast"))
    for episode in drawn(master, image_size, length):
        fast.meta.load_state_dict(plain.meta.state_dict())
        assert close(fast.test(episode)[:1], plain.test(episode)[:1], 1e-3)
        assert close(fast.train(episode)[:1], plain.train(episode)[:1], 1e-3)


class Convolutions(TorchDispatchMode):
    """Collects the dtypes of convolutions and their backward passes."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::convolution", "aten::convolution_backward"):
            self.dtypes |= {a.dtype for a in args[:2]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("image_size", [32, pytest.param(84, marks=SLOW)])
def test_bf16_is_close_to_fp32(master, image_size):
    full, half = Model("fast", image_size), Model("fast", image_size, conv_dtype=torch.bfloat16)
    for episode in drawn(master, image_size, 4):
        half.meta.load_state_dict(full.meta.state_dict())
        with Convolutions() as convolutions:
            results = half.train(episode)
        assert convolutions.dtypes == {torch.bfloat16}
        assert close(results[:1], full.train(episode)[:1], 0.02)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in half.meta.parameters())


@pytest.mark.parametrize("hidden_size", [LARGEST_HIDDEN, LARGEST_HIDDEN + 1])
def test_wide_lstms_run_in_pytorch(hidden_size):
    """The CPU kernel's memory grows with the width."""
    torch.manual_seed(0)
    plain, fast = (cls(4, hidden_size, 9, (0, 1)) for cls in (MetaLearner, FastMetaLearner))
    fast.load_state_dict(plain.state_dict())
    loss, grad = torch.tensor(1.3), torch.randn(9, 1)
    c, expected = (rule(loss, grad, rule.initial_state()).c for rule in (fast, plain))
    assert torch.allclose(c, expected, rtol=1e-5, atol=1e-6)
    tiled = fast.initial_state().lstm_h.dim() == 3
    assert tiled == (hidden_size == LARGEST_HIDDEN and bool(library().functions))


def test_gradients_in_evaluation_mode():
    """With the running statistics, which stay as they are."""
    torch.manual_seed(0)
    plain, fast = (cls(16, 1e-3, 0.95, 3) for cls in (Conv4, FastConv4))
    fast.load_state_dict(plain.state_dict())
    x, y = torch.randn(6, 3, 16, 16), torch.arange(3).repeat(2)
    fast.loss_and_grad(x, y)
    fast.reset_batch_stats()
    found, expected = (net.eval().loss_and_grad(x, y)[1] for net in (fast, plain))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(fast.buffers(), plain.buffers(), strict=True))
