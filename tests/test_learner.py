import pytest
import torch
from textbook import TextbookLearner

from learner import Learner

SHAPE = dict(image_size=21, bn_eps=1e-3, bn_momentum=0.9, n_classes=3)


@pytest.fixture
def pair():
    """Ours and the textbook's with the same float64 weights, one scale of batch normalisation negative and one zero."""
    ours, plain = Learner(**SHAPE).double(), TextbookLearner(**SHAPE).double()
    with torch.no_grad():
        ours.norm1.weight[3], ours.norm3.weight[5], ours.norm2.weight[1] = -0.7, -1.3, 0.0
    plain.load_state_dict(ours.state_dict())
    return ours.train(), plain.train()


def test_size_of_the_published_learner():
    assert Learner(84, 1e-3, 0.95, 5).get_flat_params().numel() == 32901


def test_order_of_the_flat_vector():
    learner = Learner(**SHAPE)
    names = [name for name, _ in learner.named_parameters()]
    assert names[:4] == ["conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"]
    assert names[-2:] == ["cls.weight", "cls.bias"]
    expected = torch.cat([p.detach().reshape(-1) for p in learner.parameters()])
    assert torch.equal(learner.get_flat_params(), expected)


def test_scale_of_batch_normalisation_starts_as_in_the_earlier_codes():
    uniform, one = Learner(**SHAPE), Learner(**SHAPE, bn_scale="one")
    scales = torch.cat([getattr(uniform, f"norm{b}").weight.detach() for b in (1, 2, 3, 4)])
    assert 0 <= scales.min() < 0.1 < 0.9 < scales.max() <= 1
    assert abs(scales.mean() - 0.5) < 0.1
    assert all((getattr(one, f"norm{b}").weight == 1).all() for b in (1, 2, 3, 4))


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 16"):
        Learner(15, 1e-3, 0.95, 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_block_is_the_textbook_block(pair, memory_format):
    ours, plain = pair
    x = torch.randn(6, 3, 21, 21, dtype=torch.float64).contiguous(memory_format=memory_format)
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    loss, grad = ours.loss_and_grad(x, y)
    expected = torch.nn.functional.cross_entropy(plain(x), y)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-12)
    expected_grad = torch.cat([p.grad.reshape(-1) for p in plain.parameters()])
    assert (grad.squeeze(1) - expected_grad).abs().max() < 1e-12 * expected_grad.abs().max() + 1e-14
    for (name, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        if "running" in name:
            assert torch.allclose(mine, theirs, rtol=1e-10), name
    x = torch.randn(4, 3, 21, 21, dtype=torch.float64)
    assert torch.allclose(ours.eval()(x), plain.eval()(x), rtol=1e-10)


def test_gradient_of_the_bias_under_normalisation_is_exactly_zero(pair):
    ours, _ = pair
    _, grad = ours.loss_and_grad(torch.randn(6, 3, 21, 21, dtype=torch.float64), torch.arange(6) % 3)
    bias = ours._slices(grad)[1]
    assert bias.shape == (32,)
    assert (bias == 0).all()


def test_copied_values_leave_the_graph_behind():
    learner = Learner(**SHAPE)
    cI = torch.randn(learner.get_flat_params().numel(), 1, requires_grad=True)
    learner.copy_flat_params(cI * 2)
    assert torch.equal(learner.get_flat_params(), cI.detach().squeeze(1) * 2)
    assert all(p.is_leaf and p.requires_grad for p in learner.parameters())


def test_transferred_parameters_are_slices_of_the_cell_state():
    w_grad, wo_grad = Learner(**SHAPE), Learner(**SHAPE)
    w_grad.train()(torch.randn(4, 3, 21, 21))
    cI = torch.randn(w_grad.get_flat_params().numel(), 1, requires_grad=True)
    for _ in range(2):
        wo_grad.transfer_params(w_grad, cI * 1.0)
        assert list(wo_grad.parameters()) == []
        assert wo_grad.conv1.weight.grad_fn is not None
    assert torch.equal(wo_grad.norm1.running_mean, w_grad.norm1.running_mean)
    assert torch.equal(wo_grad.get_flat_params(), cI.detach().squeeze(1))
    wo_grad.train()(torch.randn(4, 3, 21, 21)).sum().backward()
    assert cI.grad.abs().sum() > 0


def test_flat_vector_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the flat vector has 7 numbers"):
        Learner(**SHAPE).copy_flat_params(torch.zeros(7))


def test_reset_batch_stats():
    learner = Learner(**SHAPE).train()
    learner(torch.randn(4, 3, 21, 21))
    assert learner.norm4.running_mean.abs().sum() > 0
    learner.reset_batch_stats()
    for b in (1, 2, 3, 4):
        norm = getattr(learner, f"norm{b}")
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
