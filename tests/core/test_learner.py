import pytest
import torch
from conftest import LEARNERS

SHAPE = dict(image_size=21, bn_eps=1e-3, bn_momentum=0.9, n_classes=3)


@pytest.mark.parametrize(("n_filters", "size"), [(5, 1500), (32, 32901), (64, 121093)])
def test_numbers_of_filters(backend, n_filters, size):
    """32 is the published learner."""
    learner = LEARNERS[backend](84, 1e-3, 0.95, 5, n_filters=n_filters)
    assert learner.size() == learner.get_flat_params().numel() == size
    grad = learner.loss_and_grad(torch.randn(4, 3, 84, 84), torch.arange(4))[1]
    assert grad.abs().sum() > 0
    assert learner.eval()(torch.randn(2, 3, 84, 84)).shape == (2, 5)


def test_scale_of_batch_normalisation_starts_as_in_the_earlier_codes(backend):
    uniform, one = LEARNERS[backend](**SHAPE), LEARNERS[backend](**SHAPE, bn_scale="one")
    scales = torch.cat([getattr(uniform, f"norm{b}").weight.detach() for b in (1, 2, 3, 4)])
    assert 0 <= scales.min() < 0.1 < 0.9 < scales.max() <= 1
    assert abs(scales.mean() - 0.5) < 0.1
    assert all((getattr(one, f"norm{b}").weight == 1).all() for b in (1, 2, 3, 4))


def test_copied_values_are_the_learners_own(backend):
    """Without a graph, and in memory of their own: at first the cell state is the parameter cI."""
    learner = LEARNERS[backend](**SHAPE)
    cI = torch.randn(learner.size(), 1, requires_grad=True)
    values = cI.detach().squeeze(1).clone()
    learner.copy_flat_params(cI)
    assert torch.equal(learner.get_flat_params(), values)
    assert all(p.is_leaf and p.requires_grad for p in learner.parameters())
    with torch.no_grad():
        for p in learner.parameters():
            p.zero_()
    assert torch.equal(cI.squeeze(1), values)


def test_transferred_parameters_are_slices_of_the_cell_state(backend):
    w_grad, wo_grad = LEARNERS[backend](**SHAPE), LEARNERS[backend](**SHAPE)
    w_grad.train()(torch.randn(4, 3, 21, 21))
    cI = torch.randn(w_grad.size(), 1, requires_grad=True)
    for _ in range(2):
        wo_grad.transfer_params(w_grad, cI * 1.0)
        assert list(wo_grad.parameters()) == []
        assert wo_grad.conv1.weight.grad_fn is not None
    assert torch.equal(wo_grad.norm1.running_mean, w_grad.norm1.running_mean)
    assert torch.equal(wo_grad.get_flat_params(), cI.detach().squeeze(1))
    wo_grad.train()(torch.randn(4, 3, 21, 21)).sum().backward()
    assert cI.grad.abs().sum() > 0


def test_statistics_go_from_either_class_to_the_other(backend):
    for other in LEARNERS.values():
        source, target = other(**SHAPE), LEARNERS[backend](**SHAPE)
        source.train()(torch.randn(4, 3, 21, 21))
        target.copy_buffers(source)
        assert torch.equal(target.norm3.running_var, source.norm3.running_var)


def test_what_does_not_fit_is_refused(backend):
    with pytest.raises(ValueError, match="16"):
        LEARNERS[backend](15, 1e-3, 0.95, 5)
    with pytest.raises(RuntimeError, match="7"):
        LEARNERS[backend](**SHAPE).copy_flat_params(torch.zeros(7))
