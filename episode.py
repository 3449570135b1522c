"""Algorithm 1 of the paper, one episode at a time.

The meta-learner trains the learner on the support set (``updates``, lines 4 to 10, not counting
the paper's blank lines). The query loss (``query_loss``, lines 11 and 12) is differentiated through
that training (``meta_gradient``), and its gradient trains the meta-learner
(``update_metalearner``, line 13). ``train_episode`` does it all; ``evaluate_episode`` runs the same
inner loop without a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner import FlatModule
from metalearner import UpdateRule


class Episode(NamedTuple):
    """An n-way k-shot task, sorted by class; label k is the episode's k-th class."""

    support: Tensor  # [n_class * n_shot, 3, H, W], float32
    support_y: Tensor  # [n_class * n_shot], int64
    query: Tensor  # [n_class * n_eval, 3, H, W], float32
    query_y: Tensor  # [n_class * n_eval], int64
    order: Tensor  # [n_pass, n_class * n_shot], int64: the order of the support set in each pass


def minibatches(episode: Episode, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of every support minibatch of every pass.

    A minibatch of the whole support set keeps the set's own order; smaller ones follow
    ``episode.order``.
    """
    for order in episode.order:
        if batch_size >= len(episode.support):
            yield episode.support, episode.support_y
        else:
            for indices in order.split(batch_size):
                yield episode.support[indices], episode.support_y[indices]


def updates(
    episode: Episode, learner_w_grad: FlatModule, metalearner: UpdateRule, batch_size: int
) -> Iterator[tuple[Tensor, Any]]:
    """Train the learner on the support set, one update of the meta-learner per minibatch.

    Args:
        episode: ``order`` has one row per pass.
        learner_w_grad: computes loss and gradient at each cell state in turn. Its running
            statistics come from these passes, so none is of the last parameters; with
            ``metalearner.final_stats``, validation and test add a pass with those.
        metalearner: makes each cell state from the last one.
        batch_size: images in a minibatch; the last minibatch of a pass may be smaller.

    Yields:
        The support loss [] before each update, and the state after it, whose ``c`` [P, 1] is the
        learner's new parameters, with their graph unless under ``torch.no_grad()``. The learner's
        loss and gradient are constants in it unless ``metalearner.second_order``.
    """
    learner_w_grad.train()
    learner_w_grad.reset_batch_stats()
    state = metalearner.initial_state()
    n_updates = len(episode.order) * math.ceil(len(episode.support) / batch_size)
    for t, (x, y) in enumerate(minibatches(episode, batch_size), 1):
        if metalearner.second_order and torch.is_grad_enabled():
            loss, grad = learner_w_grad.loss_and_grad_at(x, y, state.c)
        else:
            learner_w_grad.copy_flat_params(state.c)
            loss, grad = learner_w_grad.loss_and_grad(x, y)
        # grad is a mean already; the authors divide it again
        state = metalearner(loss, grad / (metalearner.grad_divisor or len(x)), state)
        if t == n_updates and metalearner.final_stats and not torch.is_grad_enabled():
            learner_w_grad.copy_flat_params(state.c)
            learner_w_grad(episode.support)
        yield loss, state


def adapt(
    episode: Episode, learner_w_grad: FlatModule, metalearner: UpdateRule, batch_size: int
) -> tuple[Tensor, list[Tensor]]:
    """Run all updates of an episode.

    Returns:
        The last cell state [P, 1] and the support losses, [] each.
    """
    losses = []
    for loss, state in updates(episode, learner_w_grad, metalearner, batch_size):
        losses.append(loss)
        c = state.c
    return c, losses


def query_loss(
    episode: Episode, learner_w_grad: FlatModule, learner_wo_grad: FlatModule, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate a cell state c [P, 1] on the query set, in learner_wo_grad's mode (train or eval).

    Returns:
        The mean cross entropy [] and the logits [n_class * n_eval, n_class].
    """
    learner_wo_grad.transfer_params(learner_w_grad, c)
    logits = learner_wo_grad(episode.query)
    return F.cross_entropy(logits, episode.query_y), logits


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of correct predictions in percent, [], of logits [B, n] and labels y [B], int64."""
    return (logits.argmax(dim=1) == y).float().mean() * 100.0


def trainable_parameters(metalearner: torch.nn.Module) -> list[Tensor]:
    """The meta-learner's trainable parameters, in the order of its gradient."""
    return [p for p in metalearner.parameters() if p.requires_grad]


def meta_gradient(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: UpdateRule,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate an episode's query loss with respect to the meta-learner's parameters.

    Overwrites both learners; leaves the meta-learner as it is.

    Returns:
        The gradient [G], of all ``trainable_parameters`` one after the other; the query loss [];
        the query accuracy [] in percent. They are detached and still on the device.
    """
    learner_wo_grad.train()
    c, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, c)
    parameters = trainable_parameters(metalearner)
    grads = torch.autograd.grad(loss, parameters)  # an unused parameter is an error
    gradient = torch.cat([g.reshape(-1) for g in grads])
    return gradient, loss.detach(), accuracy(logits, episode.query_y)


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take the optimiser's step if ``finite`` [], bool, is true."""
    if finite:
        optimizer.step()


def update_metalearner(
    gradients: Tensor,
    losses: Tensor,
    metalearner: UpdateRule,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite,
) -> Tensor:
    """Update the meta-learner once, by the mean gradient of M episodes; the paper's M is 1.

    Args:
        gradients: [M, G], summed in this order.
        losses: [M].
        optimizer: of the meta-learner's parameters, cI among them.
        grad_clip: largest norm of the mean gradient.
        step: ``step_if_finite`` or fast/'s equivalent.

    Returns:
        Whether the update was skipped [], bool, because a loss or the gradient was not finite;
        still on the device.
    """
    parameters = trainable_parameters(metalearner)
    mean = reduce(torch.add, gradients) / len(gradients)
    for p, grad in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    finite = torch.isfinite(losses).all() & torch.isfinite(norm)
    step(optimizer, finite)
    return ~finite


def train_episode(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: UpdateRule,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    grad_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the meta-learner by one episode: ``meta_gradient``, then ``update_metalearner``.

    Returns:
        Query loss [], query accuracy [] in percent, and whether the update was skipped [], bool;
        still on the device.
    """
    gradient, loss, percent = meta_gradient(
        episode, learner_w_grad, learner_wo_grad, metalearner, batch_size
    )
    skipped = update_metalearner(
        gradient.unsqueeze(0), loss.unsqueeze(0), metalearner, optimizer, grad_clip
    )
    return loss, percent, skipped


@torch.no_grad()
def evaluate_episode(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: UpdateRule,
    batch_size: int,
    transductive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the same inner loop without the meta-learner's graph, and evaluate on the query set.

    Overwrites both learners: give evaluation a pair of its own.

    Args:
        transductive: transductive batch norm: the query batch's own statistics normalise it, as in
            meta-training. Otherwise the support set's running statistics do.

    Returns:
        Query loss [] and query accuracy [] in percent, still on the device.
    """
    learner_wo_grad.train(transductive)
    c, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, c)
    return loss, accuracy(logits, episode.query_y)
