"""Second order: the meta-gradient goes through the learner's loss and gradient, too."""

import copy

import pytest
import torch
from conftest import (
    LEARNERS,
    METALEARNERS,
    assert_same,
    make,
    metrics,
    new_episode,
    succeeded,
    tensors,
    train,
)
from torch import nn

from baselines.linear_head import LinearHead
from episode import adapt, evaluate_episode, meta_gradient, query_loss, trainable_parameters
from learner import FlatModule

ON = ("--second-order", "true")


class Smooth(FlatModule):
    """A network without kinks, whose batch norm keeps statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Tanh())
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("network", [Smooth, lambda: LinearHead(4, 3)], ids=["smooth", "head"])
@pytest.mark.parametrize(("n_shot", "batch_size"), [(2, 6), (2, 4), (1, 3)])
def test_the_gradient_is_that_of_the_episodes_query_loss(backend, network, n_shot, batch_size):
    """By central differences along a random direction of each parameter of the meta-learner."""
    w_grad = network().double()
    meta = METALEARNERS[backend](4, 2, w_grad.size(), (-1.0, 0.0)).double()
    meta.second_order = True
    with torch.no_grad():
        for parameter in meta.parameters():
            parameter.normal_(std=0.5)
    networks = w_grad, copy.deepcopy(w_grad), meta
    episode = new_episode(3, n_shot, 3, n_pass=3, size=(4,), dtype=torch.float64)
    gradient, *_ = meta_gradient(episode, *networks, batch_size)

    @torch.no_grad()
    def value():
        c, _ = adapt(episode, w_grad, meta, batch_size)
        return query_loss(episode, *networks[:2], c)[0]

    def along(directions, gradient):
        parts = gradient.split([d.numel() for d in directions])
        return torch.stack([d.view(-1) @ g for d, g in zip(directions, parts, strict=True)])

    directions, slopes, step = [torch.randn_like(p) for p in trainable_parameters(meta)], [], 1e-5
    for parameter, direction in zip(trainable_parameters(meta), directions, strict=True):
        parameter.data += step * direction
        above = value()
        parameter.data -= 2 * step * direction
        slopes.append((above - value()) / (2 * step))
        parameter.data += step * direction
    expected = torch.stack(slopes)
    assert torch.allclose(along(directions, gradient), expected, rtol=1e-4, atol=1e-8)
    meta.second_order = False
    first_order, *_ = meta_gradient(episode, *networks, batch_size)
    assert (along(directions, first_order) - expected).norm() > 1e-2 * expected.norm()


def test_the_fast_learner_has_the_plain_ones_second_derivatives():
    products = []
    for learner in LEARNERS.values():
        torch.manual_seed(0)
        w_grad = learner(20, 1e-3, 0.95, 3).double()
        episode = new_episode(size=20, dtype=torch.float64)
        c = w_grad.get_flat_params().unsqueeze(1).requires_grad_()
        loss, grad = w_grad.loss_and_grad_at(episode.support, episode.support_y, c)
        v = torch.linspace(-1, 1, len(c), dtype=torch.float64).unsqueeze(1)
        products += torch.autograd.grad(0.3 * loss + (v * grad).sum(), c)
    assert all(torch.allclose(p, products[0], rtol=1e-9, atol=1e-12) for p in products)


def test_an_evaluation_is_unaffected(backend):
    episode, w_grad, wo_grad, meta = make(backend)
    expected = evaluate_episode(episode, w_grad, wo_grad, meta, 4)
    meta.second_order = True
    assert evaluate_episode(episode, w_grad, wo_grad, meta, 4) == expected


# ---- The command line ----


@pytest.fixture(scope="module", params=[(), ("--plain", "--meta-batch", "2")])
def flags(request):
    return request.param


def test_a_run_goes_on_to_the_same_bits(master, tmp_path, flags):
    whole, cut, first = (tmp_path / name for name in ("whole", "cut", "first"))
    succeeded(train(master, whole, *ON, *flags))
    succeeded(train(master, cut, *ON, *flags, episode=2))
    succeeded(train(master, cut, "--resume", "auto", *flags))  # the checkpoint carries the flag
    assert_same(tensors(whole), tensors(cut))
    succeeded(train(master, first, *flags))
    assert tensors(whole)["hyper_parameters"]["second_order"] is True
    assert tensors(first)["hyper_parameters"]["second_order"] is False
    losses = [[e["loss"] for e in metrics(save, "train")] for save in (whole, first)]
    assert losses[0][0] == pytest.approx(losses[1][0])  # until the first update
    assert losses[0][-1] != losses[1][-1]
