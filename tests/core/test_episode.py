import copy
import math
import random
import threading

import numpy as np
import pytest
import torch
from conftest import METALEARNERS, adam_state, assert_same, make, make_adam, new_episode
from torch import nn

from baselines.linear_head import LinearHead
from dataloader import scan_split
from engine.backend import dataset, select_backend
from engine.evaluation import Evaluator
from engine.flags import resolve
from engine.model import Model
from episode import (
    Episode,
    adapt,
    evaluate_episode,
    minibatches,
    query_loss,
    train_episode,
    updates,
)
from fast.threads import parallel_map
from learner import FlatModule


def test_no_gradient_reaches_learner_w_grad_or_the_inputs(backend):
    episode, w_grad, wo_grad, meta = make(backend)
    seen = []
    original = meta.forward

    def spy(loss, grad, state):
        seen.extend((loss, grad))
        return original(loss, grad, state)

    meta.forward = spy
    cI, _ = adapt(episode, w_grad, meta, 100)
    query_loss(episode, w_grad, wo_grad, cI)[0].backward()
    assert len(seen) == 4
    assert all(not t.requires_grad and t.grad_fn is None for t in seen)
    assert all(p.grad is None for p in w_grad.parameters())
    assert list(wo_grad.parameters()) == []
    assert all(p.grad.abs().sum() > 0 for p in meta.parameters())


@pytest.mark.parametrize(("divisor", "divided_by"), [(0, [4, 2, 4, 2]), (3, [3] * 4)])
def test_the_gradient_is_divided_by_the_minibatch_or_by_a_given_number(
    backend, divisor, divided_by
):
    episode, w_grad, _, meta = make(backend, dtype=torch.float64)
    meta.grad_divisor, seen, original = divisor, [], w_grad.loss_and_grad
    w_grad.loss_and_grad = lambda x, y: seen.append(original(x, y)) or seen[-1]
    step, taken = meta.forward, []
    meta.forward = lambda loss, grad, state: taken.append(grad) or step(loss, grad, state)
    adapt(episode, w_grad, meta, 4)
    for (_, grad), given, number in zip(seen, taken, divided_by, strict=True):
        assert torch.equal(given, grad / number)


def test_gradient_agrees_with_finite_differences(backend):
    """First order: the support set's losses and gradients are constants, recorded once."""
    episode, w_grad, wo_grad, meta = make(backend, dtype=torch.float64, n_pass=3)
    wo_grad.train()
    recorded, original = [], meta.forward
    meta.forward = lambda loss, grad, state: (
        recorded.append((loss, grad)) or original(loss, grad, state)
    )
    cI, _ = adapt(episode, w_grad, meta, 100)
    meta.forward = original
    query_loss(episode, w_grad, wo_grad, cI)[0].backward()

    @torch.no_grad()
    def value():
        state = meta.initial_state()
        for loss, grad in recorded:
            state = meta(loss, grad, state)
        return query_loss(episode, w_grad, wo_grad, state.c)[0].item()

    step = 1e-6
    cell = meta.metalstm
    # a bias under batch normalisation has no influence, so cI is sampled outside conv1.bias
    # (numbers 864 to 895)
    samples = [(cell.WF, (0, 4, 5, 6)), (cell.WI, (0, 4, 5, 6)), (cell.bF, [0]), (cell.bI, [0])]
    samples += [(cell.cI, [431, 950, 20000, cell.cI.numel() - 1])]
    for parameter, indices in samples:
        flat = parameter.data.view(-1)
        for k in indices:
            kept = flat[k].item()
            flat[k] = kept + step
            above = value()
            flat[k] = kept - step
            below = value()
            flat[k] = kept
            assert parameter.grad.view(-1)[k].item() == pytest.approx(
                (above - below) / (2 * step), rel=1e-4, abs=1e-8
            )


@pytest.mark.parametrize("batch_size", [6, 4])
def test_an_episode_of_a_linear_head_is_gradient_descent_by_hand(backend, batch_size):
    """With the gates shut to f = 1 and i = rate, on given features: softmax regression in NumPy."""
    head, meta = LinearHead(7, 3).double(), METALEARNERS[backend](4, 5, 24).double()
    with torch.no_grad():
        for weights in (meta.metalstm.WF, meta.metalstm.WI):
            weights.zero_()
        meta.metalstm.bF.fill_(50)
        meta.metalstm.bI.fill_(math.log(0.5 / (1 - 0.5)))
        meta.metalstm.cI.normal_()
    flat = meta.metalstm.cI.detach().numpy()[:, 0].copy()
    y = torch.arange(3).repeat_interleave(2)
    x = torch.randn(6, 7, dtype=torch.float64)
    order = torch.stack([torch.randperm(6) for _ in range(3)])
    found, losses = adapt(Episode(x, y, x, y, order), head, meta, batch_size)
    expected = []
    for images, labels in minibatches(Episode(x, y, x, y, order), batch_size):
        images, labels = images.numpy(), np.eye(3)[labels]
        logits = images @ flat[:21].reshape(3, 7).T + flat[21:]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected.append(-np.log((p * labels).sum(axis=1)).mean())
        wrong = (p - labels) / len(images)
        gradient = np.concatenate(((wrong.T @ images).reshape(-1), wrong.sum(axis=0)))
        flat -= 0.5 * gradient / len(images)
    assert np.allclose(torch.stack(losses), expected, rtol=1e-9)
    assert np.allclose(found.detach().numpy()[:, 0], flat, rtol=1e-9)


def test_a_validation_leaves_training_as_it_was(backend, master):
    """Parameters, buffers, gradients, Adam, modes, random states, with a worker and threads."""
    torch.set_num_threads(2)
    given = {"n_class": 3, "n_shot": 2, "n_eval": 2, "image_size": 16, "epoch": 2, "n_workers": 1}
    given |= {"cpu": True, "plain": backend == "plain", "data_root": str(master)}
    args = resolve(given)
    chosen = select_backend(args)
    val_set = dataset(args, chosen, scan_split(args.data_root, "val"), 3)
    episode, w_grad, wo_grad, meta = make(backend)
    optimizer = make_adam(backend, meta)
    evaluate = Evaluator(args, chosen, Model(w_grad, wo_grad, meta))
    train_episode(episode, w_grad, wo_grad, meta, optimizer, 100, 0.25)
    states, original = [], meta.forward
    meta.forward = lambda *inputs: states.append(original(*inputs)) or states[-1]

    def tensors():
        models = [t for m in (w_grad, wo_grad, meta) for t in (*m.parameters(), *m.buffers())]
        gradients = [p.grad for p in meta.parameters()]
        return [t.detach().clone() for t in (*models, *adam_state(optimizer), *gradients)]

    def settings():
        modes = [module.training for m in (w_grad, wo_grad, meta) for module in m.modules()]
        numbers = np.random.get_state()  # noqa: NPY002
        of_torch = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled()
        return modes, random.getstate(), numbers[1].tolist(), numbers[2:], of_torch

    before = tensors(), settings()
    try:
        evaluate(val_set)
        assert_same(before, (tensors(), settings()))
    finally:
        torch.set_num_threads(1)
    assert len(states) == 3 * 2  # episodes x passes
    found = [t for s in states for t in s if t is not meta.metalstm.cI]
    assert not any(t.requires_grad for t in found)


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

    try:
        assert list(parallel_map(count, items(), 2)) == [1, 1, 1]
    finally:
        torch.set_num_threads(1)


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


def test_updates_can_be_watched_one_by_one(backend):
    """Each has the loss before it, and the parameters after it, which the learner takes next."""
    episode, w_grad, _, meta = make(backend, n_pass=3)
    seen = []
    with torch.no_grad():
        for loss, state in updates(episode, w_grad, meta, 100):
            if seen:
                assert torch.equal(w_grad.get_flat_params(), seen[-1][1].squeeze(1))
            seen.append((loss, state.c))
    cI, losses = adapt(episode, w_grad, meta, 100)
    assert torch.equal(cI, seen[-1][1])
    assert [loss.item() for loss in losses] == [loss.item() for loss, _ in seen]


# ---- Someone else's learner ----


class Perceptron(FlatModule):
    def __init__(self, n_in, n_hidden, n_class):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, n_hidden), nn.BatchNorm1d(n_hidden), nn.Tanh())
        self.head, self.unused = nn.Linear(n_hidden, n_class), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_any_network_can_be_the_learner(backend):
    """Vectors, another kind of batch norm, and parameters without a part in the loss."""
    w_grad = Perceptron(7, 6, 3)
    wo_grad, *scratch = (copy.deepcopy(w_grad) for _ in range(3))
    meta = METALEARNERS[backend](4, 5, w_grad.size(), (-2.0, -1.0))
    meta.metalstm.init_cI(w_grad.get_flat_params())
    before = {name: p.detach().clone() for name, p in meta.named_parameters()}
    optimizer, y = torch.optim.Adam(meta.parameters(), lr=1e-3), torch.arange(3)
    support, query = torch.randn(6, 7), torch.randn(9, 7)
    labels, order = (y.repeat_interleave(2), y.repeat_interleave(3)), torch.arange(6).repeat(2, 1)
    episode = Episode(support, labels[0], query, labels[1], order)
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
