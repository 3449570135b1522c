"""Several episodes at once, each with learners of its own."""

from __future__ import annotations

import argparse
import copy
import queue
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from engine.backend import Way
from engine.distributed import Ranks
from episode import Episode, meta_gradient, update_metalearner
from learner import FlatModule
from metalearner import MetaLearner


class Lanes:
    """A function of an episode and a pair of learners, applied to one episode after the other.

    With ``fast/`` on a CPU several episodes run side by side, each on one thread: faster than one
    after another on all threads, and the same bits whatever the number of cores.

    Args:
        function: (Episode, learner_w_grad, learner_wo_grad) -> tuple of tensors.
        way: says how many run at once.
        learners: each lane gets copies of them.
        metalearner: which ``function`` reads.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        way: Way,
        learners: tuple[FlatModule, FlatModule],
        metalearner: MetaLearner,
    ):
        self.function, self.map = function, way.map
        self.pairs = [copy.deepcopy(learners) for _ in range(way.lanes)]
        self.free: queue.SimpleQueue = queue.SimpleQueue()
        for pair in self.pairs:
            self.free.put(pair)
        self.one = way.recorded(self._one, (*self.pairs[0], metalearner))

    def _one(self, episode: Episode) -> tuple[Tensor, ...]:
        pair = self.free.get()
        try:
            return self.function(episode, *pair)
        finally:
            self.free.put(pair)

    def __call__(self, episodes: Iterable[Episode]) -> Iterator[tuple[Tensor, ...]]:
        """The function's results in the episodes' order."""
        return self.map(self.one, episodes)


class MetaBatch:
    """Updates of the meta-learner by ``--meta-batch`` episodes, which are divided over the ranks
    and there over the lanes.

    The bits are the same for any number of ranks and, with ``fast/`` on a CPU, of cores.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        way: Way,
        ranks: Ranks,
        learners: tuple[FlatModule, FlatModule],
        metalearner: MetaLearner,
        optimizer: torch.optim.Optimizer,
    ):
        def gradient(episode: Episode, *pair: FlatModule) -> tuple[Tensor, ...]:
            return meta_gradient(episode, *pair, metalearner, args.batch_size)

        def step(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gradients, losses, accuracies = rows[:, :-2], rows[:, -2], rows[:, -1]
            skipped = update_metalearner(
                gradients, losses, metalearner, optimizer, args.grad_clip, way.step
            )
            return losses, accuracies, skipped

        self.ranks, self.lanes, self.step, self.map = (
            ranks,
            Lanes(gradient, way, learners, metalearner),
            step,
            way.map,
        )

    def __call__(self, share: Iterable[Episode]) -> tuple[Tensor, Tensor, Tensor]:
        """One update.

        Args:
            share: this rank's episodes.

        Returns:
            Query losses [M] and query accuracies [M] in percent of all ranks' episodes, in their
            order, and whether the update was skipped [], bool.

        Raises:
            Lost: another rank has ended.
        """
        rows = torch.stack([torch.cat([t.view(-1) for t in found]) for found in self.lanes(share)])
        rows = self.ranks.gather(rows)  # [M, G + 2]
        return next(self.map(self.step, [rows]))  # on one core, too
