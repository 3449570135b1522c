"""Evaluation of a meta-learner on many episodes."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from dataloader import EpisodeDataset, episodes, scan_split
from engine.backend import Backend, dataset
from engine.distributed import SINGLE_PROCESS, Ranks
from engine.flags import ROOT
from engine.logger import result_line
from engine.model import Trainable
from engine.parallel import EpisodePool
from engine.process import begin_worker
from engine.tta import class_permutations, evaluate_tta
from episode import Episode
from learner import FlatModule

# the authors', for a number of shots that the model was not trained on
CROSS_SCHEDULE = {"epoch": 5, "batch_size": 5}


class Evaluator:
    """Evaluates episodes with learners of its own, with test-time augmentation if the flags ask.

    The episodes are divided over the ranks.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        backend: Backend,
        model: Trainable,
        ranks: Ranks = SINGLE_PROCESS,
    ):
        permutations = class_permutations(args.n_class, args.tta_permutations or 1, args.seed)
        permutations = permutations.to(backend.device)  # here: a CUDA graph cannot copy it
        augmented = len(permutations) > 1 or args.tta_flip

        def evaluate(episode: Episode, *pair: FlatModule) -> tuple[Tensor, Tensor]:
            if augmented:
                how = (args.batch_size, permutations, args.tta_flip, args.transductive)
                return evaluate_tta(episode, *pair, model, *how)
            return model.evaluate(args, episode, *pair)

        self.args, self.device, self.ranks = args, backend.device, ranks
        self.pool = EpisodePool(evaluate, backend, model)

    def __call__(
        self, dataset: EpisodeDataset | None, after_each: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[float]]:
        """Evaluate all episodes of a data set; ``after_each`` is called between two of them.

        Returns:
            Losses and accuracies in percent, one per episode in their order; none for None.
        """
        if dataset is None:
            return [], []
        args, device, rank, size = self.args, self.device, self.ranks.rank, self.ranks.size
        rows = torch.zeros(-(-len(dataset) // size), 2, device=device)
        look = {"unit": "ep", "leave": False, "disable": rank > 0 or None}
        bar = tqdm(total=len(dataset), desc=dataset.split.name, **look)
        how = (args.n_workers, device, args.pin_mem, begin_worker)
        with contextlib.closing(episodes(dataset, rank, *how, step=size)) as stream:
            for k, result in enumerate(self.pool(stream)):
                rows[k] = torch.stack(result)
                bar.update(size)
                after_each()
        bar.close()
        losses, accuracies = self.ranks.gather(rows)[: len(dataset)].t().tolist()
        return losses, accuracies


def is_mini_imagenet(classes: list[str]) -> bool:
    """Whether these are mini-ImageNet's 20 test classes."""
    path = ROOT / "data" / "splits" / "mini-imagenet.json"
    return sorted(classes) == sorted(json.loads(path.read_text(encoding="utf-8"))["test"])


def run_test(
    args: argparse.Namespace,
    backend: Backend,
    model: Trainable,
    trained_on: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[dict]:
    """Test on each of ``--shots`` (or on ``--n-shot``) and print the accuracy for each count in
    ``--episode-test``.

    All counts are of the same episodes: the first 100 of the 600 are the 100. A number of shots
    other than ``trained_on`` is tested with ``CROSS_SCHEDULE``.

    Returns:
        For each number of shots: the episodes' shape and schedule, ``tta`` and ``transductive``,
        the data's ``fingerprint`` and whether it is mini-ImageNet, ``counts``, and ``accuracies``
        in percent and ``losses``, one per episode.
    """
    counts, tests = sorted(set(args.episode_test)), []
    for n_shot in args.shots or [args.n_shot]:
        schedule = {"epoch": args.epoch, "batch_size": args.batch_size}
        if args.shots and n_shot != trained_on:
            schedule = CROSS_SCHEDULE
        these = argparse.Namespace(**{**vars(args), "n_shot": n_shot, **schedule})
        test_set = dataset(these, backend, scan_split(args.data_root, "test"), counts[-1])
        ranks.begin({"device": backend.description, "test images": test_set.fingerprint})
        losses, accuracies = Evaluator(these, backend, model, ranks)(test_set)
        name = f"test {n_shot}-shot ({schedule['epoch']} x {schedule['batch_size']})"
        for count in counts:
            print(result_line(name if args.shots else "test", losses[:count], accuracies[:count]))
        test = {"n_class": args.n_class, "n_shot": n_shot, "n_eval": args.n_eval, **schedule}
        test["tta"] = {"permutations": args.tta_permutations or 1, "flip": args.tta_flip}
        test["transductive"] = args.transductive
        test["fingerprint"] = test_set.fingerprint
        test["mini_imagenet"] = is_mini_imagenet(test_set.split.classes)
        tests.append({**test, "counts": counts, "accuracies": accuracies, "losses": losses})
    return tests
