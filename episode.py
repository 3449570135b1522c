"""Algorithm 1 of the paper: in each episode the meta-learner trains the learner on the support set, and the query set's loss
trains the meta-learner.

``updates`` is the inner loop, which training and evaluation share (lines 4 to 10), ``train_episode`` adds the update of the
meta-learner (lines 11 to 13), and ``evaluate_episode`` only reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner import FlatModule
from metalearner import MetaLearner, MetaState


class Episode(NamedTuple):
    """An n-way k-shot task, class-major: label = position of the class in the episode."""

    support: Tensor  # [n_class * n_shot, 3, H, W], float32
    support_y: Tensor  # [n_class * n_shot], int64
    query: Tensor  # [n_class * n_eval, 3, H, W], float32
    query_y: Tensor  # [n_class * n_eval], int64
    order: Tensor  # [epoch, n_class * n_shot], int64: the order of the support images in each pass over them


def minibatches(episode: Episode, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of all support minibatches of all passes.

    A minibatch that holds the whole support set keeps the set's own order; smaller ones follow ``episode.order``.
    """
    for order in episode.order:
        if batch_size >= len(episode.support):
            yield episode.support, episode.support_y
        else:
            for indices in order.split(batch_size):
                yield episode.support[indices], episode.support_y[indices]


def updates(
    episode: Episode, learner_w_grad: FlatModule, metalearner: MetaLearner, batch_size: int
) -> Iterator[tuple[Tensor, MetaState]]:
    """Train the learner on the support set, one step of the meta-learner per minibatch.

    Args:
        episode: see ``Episode``; ``order`` has one row per pass.
        learner_w_grad: takes each cell state's values and yields loss and gradient; its running statistics end as those of the
            support images.
        metalearner: makes each cell state from the last one.
        batch_size: images of a minibatch; the last one of a pass may be smaller.

    Yields:
        After each update the loss [] that led to it and the meta-learner's new state, whose ``c`` [P, 1] is the learner's new
        parameters, with their graph unless under ``torch.no_grad()``.
    """
    learner_w_grad.train()
    learner_w_grad.reset_batch_stats()
    state = metalearner.initial_state()
    for x, y in minibatches(episode, batch_size):
        learner_w_grad.copy_flat_params(state.c)
        loss, grad = learner_w_grad.loss_and_grad(x, y)
        state = metalearner(loss, grad / len(x), state)
        yield loss, state


def adapt(
    episode: Episode, learner_w_grad: FlatModule, metalearner: MetaLearner, batch_size: int
) -> tuple[Tensor, list[Tensor]]:
    """All updates of an episode, see ``updates``.

    Returns:
        The last cell state [P, 1] and the support losses, [] each.
    """
    losses = []
    for loss, state in updates(episode, learner_w_grad, metalearner, batch_size):
        losses.append(loss)
        cI = state.c
    return cI, losses


def query_loss(
    episode: Episode, learner_w_grad: FlatModule, learner_wo_grad: FlatModule, cI: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge a cell state on the query set, in the mode (train or eval) of learner_wo_grad.

    Returns:
        The mean cross entropy [] and the logits [n_class * n_eval, n_class].
    """
    learner_wo_grad.transfer_params(learner_w_grad, cI)
    logits = learner_wo_grad(episode.query)
    return F.cross_entropy(logits, episode.query_y), logits


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of correct answers in percent, []."""
    return (logits.argmax(dim=1) == y).float().mean() * 100.0


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take the optimiser's step, unless the loss or the gradient is not finite."""
    if finite:
        optimizer.step()


def train_episode(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    grad_clip: float,
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of the meta-learner.

    Args:
        optimizer: of the meta-learner's parameters, cI among them.
        grad_clip: largest norm of their joint gradient.
        step: takes the optimiser's step if its second argument [], bool, is true.

    Returns:
        Query loss [], query accuracy [] in percent, and whether the update was skipped [], bool, because the loss or the
        gradient was not finite; detached and still on the device.
    """
    learner_wo_grad.train()
    cI, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, cI)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(metalearner.parameters(), grad_clip)
    finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
    step(optimizer, finite)
    return loss.detach(), accuracy(logits.detach(), episode.query_y), ~finite


@torch.no_grad()
def evaluate_episode(
    episode: Episode, learner_w_grad: FlatModule, learner_wo_grad: FlatModule, metalearner: MetaLearner, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The same inner loop without the meta-learner's graph; the support set's running statistics normalise the query images.

    Both learners are overwritten: give evaluation a pair of its own.

    Returns:
        Query loss [] and query accuracy [] in percent, still on the device.
    """
    learner_wo_grad.eval()
    cI, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, cI)
    return loss, accuracy(logits, episode.query_y)
