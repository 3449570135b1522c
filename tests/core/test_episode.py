import copy
import threading

import numpy as np
import pytest
import torch
from conftest import METALEARNERS, make, new_episode
from torch import nn

from baselines.linear_head import LinearHead
from episode import adapt, evaluate_episode, minibatches, query_loss, train_episode
from fast.threads import parallel_map
from learner import FlatModule


def test_no_gradient_reaches_learner_w_grad_or_the_inputs(backend):
    episode, w_grad, wo_grad, meta = make(backend)
    seen, step = [], meta.forward
    meta.forward = lambda loss, grad, state: seen.extend((loss, grad)) or step(loss, grad, state)
    cI, _ = adapt(episode, w_grad, meta, 100)
    query_loss(episode, w_grad, wo_grad, cI)[0].backward()
    assert len(seen) == 4
    assert not any(t.requires_grad for t in seen)
    assert all(p.grad is None for p in w_grad.parameters())
    assert all(p.grad.abs().sum() > 0 for p in meta.parameters())


@pytest.mark.parametrize(("batch_size", "divisor"), [(6, 0), (4, 0), (4, 3)])
def test_an_episode_of_a_linear_head_is_gradient_descent_by_hand(backend, batch_size, divisor):
    """With the gates shut to f = 1 and i = 1/2, on given features: softmax regression in NumPy.

    A gradient is divided by the number of images in its minibatch, or by a given one.
    """
    head, meta = LinearHead(7, 3).double(), METALEARNERS[backend](4, 5, 24).double()
    with torch.no_grad():
        for parameter in (meta.metalstm.WF, meta.metalstm.WI, meta.metalstm.bI):
            parameter.zero_()
        meta.metalstm.bF.fill_(50)
        meta.metalstm.cI.normal_()
    meta.grad_divisor = divisor
    flat = meta.metalstm.cI.detach().numpy()[:, 0].copy()
    episode = new_episode(n_pass=3, size=(7,), dtype=torch.float64)
    found, losses = adapt(episode, head, meta, batch_size)
    expected = []
    for images, labels in minibatches(episode, batch_size):
        images, labels = images.numpy(), np.eye(3)[labels]
        logits = images @ flat[:21].reshape(3, 7).T + flat[21:]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected.append(-np.log((p * labels).sum(axis=1)).mean())
        wrong = (p - labels) / len(images)
        gradient = np.concatenate(((wrong.T @ images).reshape(-1), wrong.sum(axis=0)))
        flat -= 0.5 * gradient / (divisor or len(images))
    assert np.allclose(torch.stack(losses), expected, rtol=1e-9)
    assert np.allclose(found.detach().numpy()[:, 0], flat, rtol=1e-9)


def test_side_by_side_means_one_core_each():
    """Also while the main thread, which assembles episodes, changes its own number of threads."""
    started, proceed = threading.Semaphore(0), threading.Event()

    def count(_):
        started.release()
        assert proceed.wait(30)
        return torch.get_num_threads()

    def items():
        yield 1
        yield 2
        for _ in range(2):
            assert started.acquire(timeout=30)
        torch.set_num_threads(1)
        torch.set_num_threads(2)
        proceed.set()
        yield 3

    assert list(parallel_map(count, items(), 2)) == [1, 1, 1]


def test_minibatches_are_shuffled_and_complete():
    """Those of the whole support set keep its order."""
    episode = new_episode(n_pass=2)
    batches = list(minibatches(episode, 4))
    assert [len(x) for x, _ in batches] == [4, 2, 4, 2]
    for order, of_pass in zip(episode.order, (batches[:2], batches[2:]), strict=True):
        assert torch.equal(torch.cat([x for x, _ in of_pass]), episode.support[order])
        assert torch.equal(torch.cat([y for _, y in of_pass]), episode.support_y[order])
    whole = [*minibatches(episode, 6), *minibatches(episode, 7)]
    assert len(whole) == 4
    assert all(x is episode.support and y is episode.support_y for x, y in whole)


# ---- Someone else's learner ----


class Perceptron(FlatModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_any_network_can_be_the_learner(backend):
    """Vectors, another kind of batch norm, and parameters without a part in the loss."""
    w_grad = Perceptron()
    wo_grad, *scratch = (copy.deepcopy(w_grad) for _ in range(3))
    meta = METALEARNERS[backend](4, 5, w_grad.size(), (-2.0, -1.0))
    meta.init_cI(w_grad.get_flat_params())
    before = {name: p.detach().clone() for name, p in meta.named_parameters()}
    optimizer, episode = torch.optim.Adam(meta.parameters(), lr=1e-3), new_episode(size=(7,))
    for _ in range(2):
        loss, _, skipped = train_episode(episode, w_grad, wo_grad, meta, optimizer, 4, 0.25)
        assert torch.isfinite(loss)
        assert not skipped
    assert all(not torch.equal(p, before[name]) for name, p in meta.named_parameters())
    first, again = (evaluate_episode(episode, *scratch, meta, 4) for _ in range(2))
    assert first == again  # an episode leaves nothing behind for the next one
    assert not any(t.requires_grad for t in first)
    norm = scratch[1].body[1]
    assert norm.num_batches_tracked == 4  # two passes over the support set, two minibatches each


def test_final_stats_are_those_of_the_last_parameters_too(backend):
    """Tests only: with a momentum of 0.95, 5 % of the running statistics are older."""
    episode, w_grad, wo_grad, meta = make(backend)
    norm, plain = w_grad.norm1, evaluate_episode(episode, w_grad, wo_grad, meta, 100)
    old = norm.running_mean.clone()
    meta.final_stats = True
    tested = evaluate_episode(episode, w_grad, wo_grad, meta, 100)
    with torch.no_grad():
        images = episode.support
        filtered = torch.nn.functional.conv2d(images, wo_grad.conv1.weight, padding=1)
    expected = 0.05 * old + 0.95 * (filtered.mean((0, 2, 3)) + wo_grad.conv1.bias)
    assert torch.allclose(wo_grad.norm1.running_mean, expected, rtol=1e-4, atol=1e-6)
    assert tested != plain
    adapt(episode, w_grad, meta, 100)
    assert torch.equal(norm.running_mean, old)  # training needs none
