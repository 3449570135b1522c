"""Evaluation of a meta-learner on many episodes."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from data.layout import scan_split
from dataloader import EpisodeDataset
from engine.backend import Backend, dataset
from engine.distributed import SINGLE_PROCESS, Ranks
from engine.flags import ROOT
from engine.logger import result_line
from engine.model import Trainable
from engine.parallel import side_by_side
from engine.stream import episodes
from engine.tta import class_permutations, evaluate_tta
from episode import Episode
from learner import FlatModule
from utils import counted


def schedule(args: Namespace, trained_on: int, n_support: int) -> tuple[int, int]:
    """Choose minibatches and divisor for ``n_support`` images so that the size of the updates
    equals training's, and their number, too, where it can. A note says if it was trained on
    another number of images.

    Args:
        trained_on: images per class.

    Returns:
        The images of a minibatch, and ``MetaLearner.grad_divisor``.
    """
    usual = args.n_class * trained_on
    if n_support == usual:
        return args.batch_size, args.grad_divisor
    n_minibatches = -(-usual // args.batch_size)
    size = -(-n_support // n_minibatches)
    found = -(-n_support // size)
    what = "number and size of the updates stay as in training"
    if found != n_minibatches:
        what = f"{counted(found, 'update')} a pass, {n_minibatches} in training, of the same size"
    print(f"note: {n_support} support images here, {usual} in training; {what}")
    return size, args.grad_divisor or min(args.batch_size, usual)


class Evaluator:
    """Evaluates episodes with learners of its own, with test-time augmentation if the flags ask.

    The episodes are divided over the ranks.
    """

    def __init__(
        self, args: Namespace, backend: Backend, model: Trainable, ranks: Ranks = SINGLE_PROCESS
    ):
        permutations = class_permutations(args.n_class, args.tta_permutations or 1, args.seed)
        permutations = permutations.to(backend.device)  # here: a CUDA graph cannot copy it

        def augmented(episode: Episode, *pair: FlatModule) -> tuple[Tensor, Tensor]:
            how = (args.batch_size, permutations, args.tta_flip, args.transductive)
            return evaluate_tta(episode, *pair, model, *how)

        usual = len(permutations) == 1 and not args.tta_flip
        evaluate = partial(model.evaluate, args) if usual else augmented
        self.args, self.device, self.ranks = args, backend.device, ranks
        self.evaluate = side_by_side(evaluate, backend, model)

    def __call__(
        self, dataset: EpisodeDataset | None, after_each: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[float]]:
        """Evaluate all episodes of a data set; ``after_each`` is called between two of them, and
        every second while the worker processes have none ready.

        Returns:
            Losses and accuracies in percent, one per episode in their order; none for None.
        """
        if dataset is None:
            return [], []
        args, device, rank, size = self.args, self.device, self.ranks.rank, self.ranks.size
        rows = torch.zeros(-(-len(dataset) // size), 2, device=device)
        look = {"unit": "ep", "leave": False, "disable": rank > 0 or None}
        bar = tqdm(total=len(dataset), desc=dataset.split.name, **look)
        how = (args.n_workers, device, args.pin_mem, size, after_each)
        with contextlib.closing(episodes(dataset, rank, *how)) as stream:
            for k, result in enumerate(self.evaluate(stream)):
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
    args: Namespace, backend: Backend, model: Trainable, trained_on: int, ranks: Ranks
) -> list[dict]:
    """Test on each of ``--shots`` (or on ``--n-shot``) and print the accuracy for each count in
    ``--episode-test``.

    All counts are of the same episodes: the first 100 of the 600 are the 100.

    Returns:
        For each number of shots: the episodes' shape and schedule, ``tta`` and ``transductive``,
        the data's ``fingerprint`` and whether it is mini-ImageNet, ``counts``, and ``accuracies``
        in percent and ``losses``, one per episode.
    """
    counts, tests = sorted(set(args.episode_test)), []
    for n_shot in args.shots or [args.n_shot]:
        size, divisor = schedule(args, trained_on, args.n_class * n_shot)
        model.metalearner.grad_divisor = divisor  # type: ignore[assignment]
        these = Namespace(**{**vars(args), "n_shot": n_shot, "batch_size": size})
        test_set = dataset(these, backend, scan_split(args.data_root, "test"), counts[-1])
        ranks.begin({"device": backend.description, "test images": test_set.split.fingerprint})
        losses, accuracies = Evaluator(these, backend, model, ranks)(test_set)
        name = f"test {n_shot}-shot ({args.epoch} x {size})"
        for count in counts:
            print(result_line(name if args.shots else "test", losses[:count], accuracies[:count]))
        names = ("n_class", "n_shot", "n_eval", "epoch", "batch_size")
        test: dict = {name: getattr(these, name) for name in names}
        test["tta"] = {"permutations": args.tta_permutations or 1, "flip": args.tta_flip}
        test["transductive"] = args.transductive
        test["fingerprint"] = test_set.split.fingerprint
        test["mini_imagenet"] = is_mini_imagenet(test_set.split.classes)
        tests.append({**test, "counts": counts, "accuracies": accuracies, "losses": losses})
    return tests
