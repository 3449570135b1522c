"""Several episodes at once, each with learners of its own."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from around.way import Way
from episode import Episode
from learner import FlatModule
from metalearner import MetaLearner


class Lanes:
    """A function of an episode and a pair of learners, applied to one episode after the other.

    With ``fast/`` on a CPU several episodes run side by side, each on one thread: faster than one after another on all threads,
    and the same bits whatever the number of cores.

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
