"""One episode: the learner is trained on the support set by the meta-learner, then judged on the query set.

``adapt`` is the inner loop that training and evaluation share. ``train_episode`` updates the meta-learner by what the query set
says; ``evaluate_episode`` only reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from learner import Learner
from metalearner import MetaLearner, MetaState
from native import PatchMoments


class Episode(NamedTuple):
    """An n-way k-shot task, class-major: label = position of the class in the episode."""

    support: Tensor  # [n_class * n_shot, 3, H, W], float32
    support_y: Tensor  # [n_class * n_shot], int64
    query: Tensor  # [n_class * n_eval, 3, H, W], float32
    query_y: Tensor  # [n_class * n_eval], int64
    order: Tensor  # [epoch, n_class * n_shot], int64: the order of the support images in each pass over them


def minibatches(episode: Episode, batch_size: int):
    """The support minibatches of all passes: images, labels, and the images' moments where one batch holds the whole set.

    Such a batch keeps its own order; smaller ones are drawn from a shuffled set.
    """
    if batch_size >= episode.support.shape[0]:
        moments = PatchMoments.of(episode.support)
        for _ in episode.order:
            yield episode.support, episode.support_y, moments
    else:
        for pass_order in episode.order:
            for indices in pass_order.split(batch_size):
                yield episode.support[indices], episode.support_y[indices], None


def updates(
    episode: Episode, learner_w_grad: Learner, metalearner: MetaLearner, batch_size: int
) -> Iterator[tuple[Tensor, MetaState]]:
    """Train the learner on the support set, one meta-learner step a minibatch.

    Args:
        episode: see ``Episode``; ``order`` has as many rows as there are passes.
        learner_w_grad: takes each cell state's values and yields loss and gradient; its running statistics end up being those
            of the support images.
        metalearner: makes each cell state from the last one.
        batch_size: images of a minibatch; the last one of a pass may be smaller.

    Yields:
        After each update the loss [] that led to it and the meta-learner's new state, whose ``c`` [P, 1] is the learner's
        new parameters, with their graph unless under ``torch.no_grad()``.
    """
    episode = episode._replace(support=episode.support.to(learner_w_grad.conv_dtype or episode.support.dtype))
    learner_w_grad.train()
    learner_w_grad.reset_batch_stats()
    state = metalearner.initial_state()
    for x, y, moments in minibatches(episode, batch_size):
        learner_w_grad.copy_flat_params(state.c)
        loss, grad = learner_w_grad.loss_and_grad(x, y, moments)
        state = metalearner(loss, grad / x.shape[0], state)
        yield loss, state


def adapt(
    episode: Episode, learner_w_grad: Learner, metalearner: MetaLearner, batch_size: int
) -> tuple[Tensor, list[Tensor]]:
    """All updates of an episode, see ``updates``: the last cell state [P, 1] and the support losses, [] each."""
    losses = []
    for loss, state in updates(episode, learner_w_grad, metalearner, batch_size):
        losses.append(loss)
        cI = state.c
    return cI, losses


def query_loss(
    episode: Episode, learner_w_grad: Learner, learner_wo_grad: Learner, cI: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge a cell state on the query set, in whichever mode (train or eval) learner_wo_grad is.

    Returns:
        The mean cross entropy [] and the logits [n_class * n_eval, n_class].
    """
    learner_wo_grad.transfer_params(learner_w_grad, cI)
    logits = learner_wo_grad(episode.query)
    return F.cross_entropy(logits, episode.query_y), logits


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers in percent, []."""
    return (logits.argmax(dim=1) == y).float().mean() * 100.0


def train_episode(
    episode: Episode,
    learner_w_grad: Learner,
    learner_wo_grad: Learner,
    metalearner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    grad_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of the meta-learner (paper, algorithm 1), which a loss or gradient that is not finite does not reach.

    Args:
        optimizer: an Adam made with ``fused=True``: it skips a step by a flag on the device, so that nothing waits for it.

    Returns:
        Query loss [], query accuracy [] in percent, and whether the update was skipped [], bool; detached and still on
        the device.
    """
    learner_wo_grad.train()
    cI, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, cI)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(metalearner.parameters(), grad_clip)
    skipped = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
    optimizer.found_inf = skipped.float()
    optimizer.step()
    return loss.detach(), accuracy(logits.detach(), episode.query_y), skipped


@torch.no_grad()
def evaluate_episode(
    episode: Episode, learner_w_grad: Learner, learner_wo_grad: Learner, metalearner: MetaLearner, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The same inner loop without the meta-learner's graph; query images are normalised by the support set's statistics.

    Both learners are scratch space here: give evaluation a pair of its own and training notices nothing.

    Returns:
        Query loss [] and query accuracy [] in percent, still on the device.
    """
    learner_wo_grad.eval()
    cI, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, cI)
    return loss, accuracy(logits, episode.query_y)
