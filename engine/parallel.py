"""Training steps, and parallel episodes, each with its own pair of learners."""

from __future__ import annotations

import copy
import queue
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from engine.backend import Backend
from engine.distributed import Ranks
from engine.ema import update_average
from engine.model import Trainable
from episode import Episode, update_metalearner
from learner import FlatModule

TrainStep = Callable[[int, list[Episode]], tuple[Tensor, Tensor, Tensor]]


def side_by_side(
    function: Callable[..., tuple[Tensor, ...]], backend: Backend, model: Trainable
) -> Callable[[Iterable[Episode]], Iterator[tuple[Tensor, ...]]]:
    """Make the function that yields ``function(episode, *learners)`` of many episodes, in order.

    With ``fast/`` on a CPU, several episodes run side by side on one thread each, with copies of
    the model's learners: faster than one after another on all threads, and the same bits for any
    number of cores.
    """
    pairs = [copy.deepcopy(model.learners) for _ in range(backend.n_parallel)]
    free: queue.SimpleQueue[tuple[FlatModule, ...]] = queue.SimpleQueue()
    for pair in pairs:
        free.put(pair)

    def run_one(episode: Episode) -> tuple[Tensor, ...]:
        pair = free.get()
        try:
            return function(episode, *pair)
        finally:
            free.put(pair)

    return partial(backend.map, backend.capture(run_one, (*pairs[0], *model.saved.values())))


def make_train_step(
    args: Namespace,
    backend: Backend,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    averaged: Trainable | None = None,
) -> TrainStep:
    """Make the function that trains on one batch: train_step(n, batch).

    Args:
        averaged: ``ema.averaged_copy(args, model)``, which follows the model.

    Returns:
        train_step. Its ``n`` is the number of episodes seen after the update; ``batch`` is this
        rank's share of the update's ``--meta-batch`` M episodes. It returns losses, accuracies in
        percent and whether the update was skipped: [], or for M > 1 losses and accuracies [M] of
        all ranks' episodes. With M > 1 the bits are the same for any number of ranks and, with
        ``fast/`` on a CPU, of cores.
    """

    def update(gradients: Tensor, losses: Tensor) -> Tensor:
        how = (model.metalearner, optimizer, args.grad_clip, backend.step)
        return update_metalearner(gradients, losses, *how)

    def single(episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        gradient, loss, percent = model.gradient(args, episode, *model.learners)
        return loss, percent, update(gradient.unsqueeze(0), loss.unsqueeze(0))

    def several(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, accuracies = rows[:, -2], rows[:, -1]
        return losses, accuracies, update(rows[:, :-2], losses)

    if args.meta_batch == 1:
        captured = backend.capture(single, (*model.learners, *model.saved.values()), optimizer)
    else:
        gradients = side_by_side(partial(model.gradient, args), backend, model)

    def train_step(n: int, batch: list[Episode]) -> tuple[Tensor, Tensor, Tensor]:
        set_learning_rate(args, optimizer, n - args.meta_batch)
        torch.manual_seed(args.seed + n)  # the same dropout in a resumed run
        if args.meta_batch == 1:
            results = captured(*batch)
        else:
            own = torch.stack([torch.cat([t.view(-1) for t in each]) for each in gradients(batch)])
            # [M, G + 2], on one core, for the same bits
            results = next(backend.map(several, [ranks.gather(own)]))
        if averaged is not None and averaged is not model:
            update_average(averaged.metalearner, model.metalearner, args.ema, n // args.meta_batch)
        return results

    return train_step


def set_learning_rate(args: Namespace, optimizer: torch.optim.Optimizer, seen: int) -> None:
    """Set the rate after ``seen`` episodes: ``--lr``, which falls linearly to 0 at the end."""
    if args.lr_decay:
        rate = args.lr * min(1.0, (args.episode - seen) / (args.lr_decay * args.episode))
        optimizer.param_groups[0]["lr"].fill_(rate)
