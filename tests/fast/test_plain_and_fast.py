"""Whole episodes of training on real JPEGs, plain and fast, held against each other; and bfloat16
against float32.
"""

from pathlib import Path

import pytest
import torch
from conftest import Model, drawn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import checkpoint as checkpoints


@pytest.mark.parametrize(("batch_size", "adapt"), [(25, "all"), (10, "all"), (10, "classifier")])
def test_twenty_consecutive_episodes_of_training_are_the_plain_ones(master, batch_size, adapt):
    """In float64, where rounding cannot hide a wrong gradient and none has room to grow."""
    plain, fast = (
        Model(way, 32, torch.float64, batch_size=batch_size, adapt=adapt)
        for way in ("plain", "fast")
    )
    for episode in drawn(master, 32, 20 if batch_size == 25 else 2, torch.float64):
        results = zip(fast.train(episode), plain.train(episode), strict=True)
        assert all(
            ours.item() == pytest.approx(theirs.item(), rel=1e-9) for ours, theirs in results
        )
        results = zip(fast.test(episode), plain.test(episode), strict=True)
        assert all(
            ours.item() == pytest.approx(theirs.item(), rel=1e-9) for ours, theirs in results
        )
    theirs = plain.meta.state_dict()
    for name, value in fast.meta.state_dict().items():
        assert torch.allclose(value, theirs[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(("image_size", "length"), [(42, 20), (84, 3)])
def test_each_episode_in_float32_is_the_plain_one(master, image_size, length):
    """Each from the plain way's parameters, since rounding grows from episode to episode: left
    alone in float32, the two were 2e-3 to 3e-2 apart within 20 episodes with three seeds, and the
    plain way 3e-3 from itself in float64 with one.
    """
    plain, fast = (Model(way, image_size) for way in ("plain", "fast"))
    for episode in drawn(master, image_size, length):
        fast.meta.load_state_dict(plain.meta.state_dict())
        assert fast.test(episode)[0].item() == pytest.approx(
            plain.test(episode)[0].item(), rel=1e-3
        )
        assert fast.train(episode)[0].item() == pytest.approx(
            plain.train(episode)[0].item(), rel=1e-3
        )


class Convolutions(TorchDispatchMode):
    """Notes the types of number that convolutions and their backward passes see."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::convolution", "aten::convolution_backward"):
            self.dtypes |= {a.dtype for a in args[:2]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("image_size", [32, 84])
def test_bf16_is_close_to_fp32(master, image_size):
    """Each episode from the same parameters, for the same reason as above."""
    full, half = Model("fast", image_size), Model("fast", image_size, conv_dtype=torch.bfloat16)
    for episode in drawn(master, image_size, 4):
        half.meta.load_state_dict(full.meta.state_dict())
        with Convolutions() as seen:
            loss = half.train(episode)[0].item()
        assert seen.dtypes == {torch.bfloat16}
        assert loss == pytest.approx(full.train(episode)[0].item(), rel=0.02)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in half.meta.parameters())


@pytest.mark.parametrize("fused", [True, None])
def test_the_count_of_adams_steps_goes_where_the_flags_adam_wants_it(fused):
    """A fused Adam reads it on the GPU, whatever kind of Adam wrote the checkpoint. The meta device
    stands in for one.
    """

    def adam(device, fused):
        optimizer = torch.optim.Adam([torch.zeros(3, device=device, requires_grad=True)], lr=0.5)
        optimizer.param_groups[0]["fused"] = fused
        return optimizer

    here, there = adam("cpu", None if fused else True), adam("meta", fused)
    (parameter,) = here.param_groups[0]["params"]
    parameter.grad = torch.ones(3)
    here.param_groups[0]["lr"] = 0.1
    here.step()
    checkpoints.load_optimizer(there, {"optim": here.state_dict()}, Path("x"))
    (state,) = there.state.values()
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert state["exp_avg"].device.type == "meta"
    assert there.param_groups[0]["fused"] is fused
    assert there.param_groups[0]["lr"] == 0.5
