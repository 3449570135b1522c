"""Judging a meta-learner on many episodes."""

from __future__ import annotations

import argparse
import contextlib
import copy
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from capture import Captured
from dataloader import EpisodeDataset, episodes
from episode import Episode, evaluate_episode
from learner import Learner
from metalearner import MetaLearner
from runfolder import begin_worker
from utils import summary


class Evaluator:
    """Adapts the meta-learner to episodes and reports on their query images, with learners of its own as scratch space.

    On a CPU several episodes go side by side, each on one thread: faster than one after another on all threads, and the same
    bits whatever the number of cores.
    """

    def __init__(
        self, args: argparse.Namespace, device: torch.device, learners: tuple[Learner, Learner], metalearner: MetaLearner
    ):
        self.args, self.device, self.metalearner = args, device, metalearner
        self.n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.pairs = [copy.deepcopy(learners) for _ in range(self.n_threads)]
        self.free: queue.SimpleQueue = queue.SimpleQueue()
        for pair in self.pairs:
            self.free.put(pair)
        self.one = Captured(self._one) if device.type == "cuda" else self._one

    def _one(self, episode: Episode) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.free.get()
        try:
            return evaluate_episode(episode, *pair, self.metalearner, self.args.batch_size)
        finally:
            self.free.put(pair)

    def __call__(
        self, dataset: EpisodeDataset, after_each: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[float]]:
        """Evaluate all episodes of a data set, calling ``after_each`` in between.

        Returns:
            The losses and the accuracies in percent, one an episode in their order.
        """
        args, results = self.args, []
        bar = tqdm(total=len(dataset), desc=dataset.split.name, unit="ep", leave=False, disable=None)
        with contextlib.closing(episodes(dataset, 0, args.n_workers, self.device, args.pin_mem, begin_worker)) as stream:
            on_cpu = self.device.type == "cpu"
            for result in side_by_side(self.one, stream, self.n_threads) if on_cpu else map(self.one, stream):
                results.append(result)
                bar.update()
                after_each()
        bar.close()
        losses, accuracies = (torch.stack(values).tolist() for values in zip(*results, strict=True))
        return losses, accuracies


def side_by_side(function: Callable, items: Iterable, n_threads: int) -> Iterator:
    """``map(function, items)`` on threads to which PyTorch gives one core each, taking items only as they are needed."""
    with ThreadPoolExecutor(n_threads, initializer=_one_core) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _one_core() -> None:
    # At its first operation a thread takes the number that any thread set last, unless it has asked before: ask, then set.
    torch.get_num_threads()
    torch.set_num_threads(1)


def result_line(what: str, losses: list[float], accuracies: list[float]) -> str:
    """Mean, 95 % interval and standard deviation of what an ``Evaluator`` found, in words."""
    loss, accuracy = summary(losses), summary(accuracies)
    return (
        f"{what}, {accuracy['n']} episodes: accuracy {accuracy['mean']:.2f} ± {accuracy['ci95']:.2f} % "
        f"(std {accuracy['std']:.2f}), loss {loss['mean']:.4f}"
    )
