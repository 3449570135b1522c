"""A meta-learner judged on many episodes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from dataloader import EpisodeDataset, episodes, scan_split
from engine.backend import Way, dataset
from engine.distributed import ALONE, Ranks
from engine.logger import result_line
from engine.parallel import Lanes
from engine.run import begin_worker
from engine.tta import class_orders, evaluate_averaged
from episode import evaluate_episode
from learner import FlatModule
from metalearner import MetaLearner
from tools.results import is_mini_imagenet

CROSS_SCHEDULE = {
    "epoch": 5,
    "batch_size": 5,
}  # the authors', for a number of shots that the model was not trained on


class Evaluator:
    """Adapts the meta-learner to episodes and reports on their query images. It has learners of its
    own, see ``Lanes``.

    Answers are averaged if ``--orders`` or ``--mirror`` asks for it. The episodes are divided over
    the ranks.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        way: Way,
        learners: tuple[FlatModule, FlatModule],
        metalearner: MetaLearner,
        ranks: Ranks = ALONE,
    ):
        how = {
            "metalearner": metalearner,
            "batch_size": args.batch_size,
            "transductive": args.transductive,
        }
        one = partial(evaluate_episode, **how)
        orders = class_orders(args.n_class, args.orders or 1, args.seed)
        if len(orders) > 1 or args.mirror:
            one = partial(evaluate_averaged, **how, orders=orders, mirror=args.mirror)
        self.args, self.way, self.ranks, self.lanes = (
            args,
            way,
            ranks,
            Lanes(one, way, learners, metalearner),
        )

    def __call__(
        self, dataset: EpisodeDataset, after_each: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[float]]:
        """Evaluate all episodes of a data set; ``after_each`` is called between two of them.

        Returns:
            The losses and the accuracies in percent, one per episode in their order.
        """
        args, device, rank, size = self.args, self.way.device, self.ranks.rank, self.ranks.size
        rows = torch.zeros(-(-len(dataset) // size), 2, device=device)
        bar = tqdm(
            total=len(dataset),
            desc=dataset.split.name,
            unit="ep",
            leave=False,
            disable=rank > 0 or None,
        )
        found = episodes(
            dataset, rank, args.n_workers, device, args.pin_mem, begin_worker, step=size
        )
        with contextlib.closing(found) as stream:
            for k, result in enumerate(self.lanes(stream)):
                rows[k] = torch.stack(result)
                bar.update(size)
                after_each()
        bar.close()
        losses, accuracies = self.ranks.gather(rows)[: len(dataset)].t().tolist()
        return losses, accuracies


def judge(
    args: argparse.Namespace,
    way: Way,
    learners: tuple[FlatModule, FlatModule],
    metalearner: MetaLearner,
    trained_on: int,
    ranks: Ranks = ALONE,
) -> list[dict]:
    """Test on each of ``--shots`` (or on ``--n-shot``) and print the accuracy for each count in
    ``--episode-test``.

    The episodes are the same for every count: the first 100 of the 600 are the 100. A number of
    shots other than ``trained_on`` is tested with the authors' schedule for that case.

    Returns:
        For each number of shots: the episodes' shape and schedule, the data's ``fingerprint``,
        whether it is mini-ImageNet, ``counts``, ``accuracies`` in percent and ``losses``, one per
        episode.
    """
    counts, tests = sorted(set(args.episode_test)), []
    for n_shot in args.shots or [args.n_shot]:
        schedule = {"epoch": args.epoch, "batch_size": args.batch_size}
        if args.shots and n_shot != trained_on:
            schedule = CROSS_SCHEDULE
        these = argparse.Namespace(**{**vars(args), "n_shot": n_shot, **schedule})
        test_set = dataset(these, way, scan_split(args.data_root, "test"), counts[-1])
        ranks.begin({"device": way.description, "test images": test_set.fingerprint})
        losses, accuracies = Evaluator(these, way, learners, metalearner, ranks)(test_set)
        name = (
            f"test {n_shot}-shot ({schedule['epoch']} x {schedule['batch_size']})"
            if args.shots
            else "test"
        )
        for count in counts:
            print(result_line(name, losses[:count], accuracies[:count]))
        shape = {"n_class": args.n_class, "n_shot": n_shot, "n_eval": args.n_eval, **schedule}
        shape["averaged"] = {"orders": args.orders or 1, "mirror": args.mirror}
        shape["transductive"] = args.transductive
        known = {
            "fingerprint": test_set.fingerprint,
            "mini_imagenet": is_mini_imagenet(test_set.split.classes),
        }
        tests.append(
            {**shape, **known, "counts": counts, "accuracies": accuracies, "losses": losses}
        )
    return tests
