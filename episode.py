"""Algorithm 1 of the paper: in each episode the meta-learner trains the learner on the support set,
and the query set's loss trains the meta-learner.

``updates`` is the inner loop, which training and evaluation share (lines 4 to 10),
``meta_gradient`` goes on to the query set (lines 11 and 12), ``update_metalearner`` is line 13, and
``train_episode`` all of it. ``evaluate_episode`` only reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
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

    A minibatch that holds the whole support set keeps the set's own order; smaller ones follow
    ``episode.order``."""
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
        learner_w_grad: takes each cell state's values and yields loss and gradient; its running
            statistics end as those of the support images.
        metalearner: makes each cell state from the last one.
        batch_size: images of a minibatch; the last one of a pass may be smaller.

    Yields:
        After each update the loss [] that led to it and the meta-learner's new state, whose ``c``
        [P, 1] is the learner's new parameters, with their graph unless under ``torch.no_grad()``.
        Of a learner that adapts its classifier only, it is the classifier's, see
        ``MetaLearner.complete``.
    """
    learner_w_grad.train()
    learner_w_grad.reset_batch_stats()
    learner_w_grad.copy_flat_params(metalearner.metalstm.cI)
    adapted, inputs = learner_w_grad.to_adapt(episode.support)
    state = metalearner.initial_state(adapted.size())
    for x, y in minibatches(episode._replace(support=inputs), batch_size):
        adapted.copy_flat_params(state.c)
        loss, grad = adapted.loss_and_grad(x, y)
        state = metalearner(loss, grad / (metalearner.grad_divisor or len(x)), state)
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
        c = state.c
    return metalearner.complete(c), losses


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


def meta_gradient(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: MetaLearner,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of an episode's query loss with respect to the meta-learner's parameters.

    Both learners are overwritten; the meta-learner is left alone.

    Returns:
        The gradient [G], of one learned parameter after the other; query loss [] and query accuracy
        [] in percent. They are detached and still on the device.
    """
    learner_wo_grad.train()
    cI, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, cI)
    grads = torch.autograd.grad(loss, learned(metalearner))
    return (
        torch.cat([g.reshape(-1) for g in grads]),
        loss.detach(),
        accuracy(logits.detach(), episode.query_y),
    )


def learned(metalearner: MetaLearner) -> list[Tensor]:
    """The meta-learner's parameters that training changes, in the order of its gradient."""
    return [p for p in metalearner.parameters() if p.requires_grad]


def update_metalearner(
    gradients: Tensor,
    losses: Tensor,
    metalearner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite,
) -> Tensor:
    """One update of the meta-learner, by the mean over M episodes of the gradient; the paper's M is
    1.

    Args:
        gradients: [M, G], summed in this order; losses: [M].
        optimizer: of the meta-learner's parameters, cI among them.
        grad_clip: largest norm of the mean.
        step: takes the optimiser's step if its second argument [], bool, is true.

    Returns:
        Whether the update was skipped [], bool, because a loss or the gradient was not finite;
        still on the device.
    """
    parameters = learned(metalearner)
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
    metalearner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    grad_clip: float,
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of the meta-learner by one episode; arguments as for ``meta_gradient`` and
    ``update_metalearner``.

    Returns:
        Query loss [], query accuracy [] in percent, and whether the update was skipped [], bool;
        still on the device.
    """
    gradient, loss, percent = meta_gradient(
        episode, learner_w_grad, learner_wo_grad, metalearner, batch_size
    )
    skipped = update_metalearner(
        gradient.unsqueeze(0), loss.unsqueeze(0), metalearner, optimizer, grad_clip, step
    )
    return loss, percent, skipped


@torch.no_grad()
def evaluate_episode(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: MetaLearner,
    batch_size: int,
    transductive: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same inner loop without the meta-learner's graph; the support set's running statistics
    normalise the query images.

    Both learners are overwritten: give evaluation a pair of its own.

    Args:
        transductive: normalise the query images by their own statistics instead, as meta-training
            does; the answer to one then depends on the others.

    Returns:
        Query loss [] and query accuracy [] in percent, still on the device.
    """
    learner_wo_grad.train(transductive)
    cI, _ = adapt(episode, learner_w_grad, metalearner, batch_size)
    loss, logits = query_loss(episode, learner_w_grad, learner_wo_grad, cI)
    return loss, accuracy(logits, episode.query_y)
