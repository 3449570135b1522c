"""Training steps, and parallel episodes, each with its own pair of learners."""

from __future__ import annotations

import argparse
import copy
import queue
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from engine.backend import Backend
from engine.distributed import Ranks
from engine.ema import follow
from engine.model import Trainable
from episode import Episode, update_metalearner
from learner import FlatModule

TrainStep = Callable[[int, list[Episode]], tuple[Tensor, Tensor, Tensor]]


class EpisodePool:
    """Applies a function of an episode and its learners to many episodes, in order.

    With ``fast/`` on a CPU, several episodes run side by side on one thread each: faster than one
    after another on all threads, and the same bits for any number of cores.

    Args:
        function: (episode, *learners) -> tuple of tensors.
        backend: says how many run at once.
        model: whose learners are copied for each of them.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], backend: Backend, model: Trainable
    ):
        self.function, self.map = function, backend.map
        pairs = [copy.deepcopy(model.learners) for _ in range(backend.n_parallel)]
        self.free: queue.SimpleQueue = queue.SimpleQueue()
        for pair in pairs:
            self.free.put(pair)
        self.run_one = backend.capture(self._run_one, (*pairs[0], *model.saved.values()))

    def _run_one(self, episode: Episode) -> tuple[Tensor, ...]:
        pair: tuple[FlatModule, ...] = self.free.get()
        try:
            return self.function(episode, *pair)
        finally:
            self.free.put(pair)

    def __call__(self, episodes: Iterable[Episode]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the function's results in the episodes' order."""
        return self.map(self.run_one, episodes)


def make_train_step(
    args: argparse.Namespace,
    backend: Backend,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    averaged: Trainable | None = None,
) -> TrainStep:
    """Make the function (n, batch) -> losses, accuracies, skipped that trains on one batch.

    ``n`` is the number of episodes seen after the update; ``batch`` is this rank's share of its
    ``--meta-batch`` episodes. Losses and accuracies are [] or [M], of all ranks' episodes.

    Args:
        averaged: ``ema.averaged_copy(args, model)``, which follows the model.
    """
    if args.meta_batch == 1:
        update = _single_step(args, backend, model, optimizer)
    else:
        update = _meta_batch_step(args, backend, model, optimizer, ranks)

    def train_step(n: int, batch: list[Episode]) -> tuple[Tensor, Tensor, Tensor]:
        if args.lr_decay:
            rate = learning_rate(args, n - args.meta_batch)
            optimizer.param_groups[0]["lr"].fill_(rate)
        torch.manual_seed(args.seed + n)  # of dropout: the same in a resumed run
        results = update(batch)
        if averaged is not None and averaged is not model:
            follow(averaged.metalearner, model.metalearner, args.ema, n // args.meta_batch)
        return results

    return train_step


def learning_rate(args: argparse.Namespace, seen: int) -> float:
    """The rate after ``seen`` episodes: ``--lr``, which falls linearly to 0 at the end."""
    return args.lr * min(1.0, (args.episode - seen) / (args.lr_decay * args.episode))


def _single_step(
    args: argparse.Namespace, backend: Backend, model: Trainable, optimizer: torch.optim.Optimizer
) -> Callable[[list[Episode]], tuple[Tensor, Tensor, Tensor]]:
    """One episode an update, as in the paper."""

    def step(episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        gradient, loss, percent = model.gradient(args, episode, *model.learners)
        how = (model.metalearner, optimizer, args.grad_clip, backend.step)
        skipped = update_metalearner(gradient.unsqueeze(0), loss.unsqueeze(0), *how)
        return loss, percent, skipped

    modules = (*model.learners, *model.saved.values())
    captured = backend.capture(step, modules, optimizer)
    return lambda batch: captured(*batch)


def _meta_batch_step(
    args: argparse.Namespace,
    backend: Backend,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> Callable[[list[Episode]], tuple[Tensor, Tensor, Tensor]]:
    """M episodes an update, divided over the ranks and side by side on each.

    The bits are the same for any number of ranks and, with ``fast/`` on a CPU, of cores.
    """

    def update(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients, losses, accuracies = rows[:, :-2], rows[:, -2], rows[:, -1]
        how = (model.metalearner, optimizer, args.grad_clip, backend.step)
        return losses, accuracies, update_metalearner(gradients, losses, *how)

    pool = EpisodePool(partial(model.gradient, args), backend, model)

    def step(batch: list[Episode]) -> tuple[Tensor, Tensor, Tensor]:
        own = [torch.cat([t.view(-1) for t in results]) for results in pool(batch)]
        rows = ranks.gather(torch.stack(own))  # [M, G + 2]
        return next(backend.map(update, [rows]))  # on one core, for the same bits

    return step
