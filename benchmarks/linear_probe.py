"""What a pre-trained learner's features are worth to classifiers of five new classes, on the same
validation episodes for all.

    python benchmarks/features.py --data-root data/miniImagenet logs-pretrain-719 other-run-719 ...

Each validation image is seen once, normalised as ``--adapt classifier`` has it, so that a thousand
episodes take a minute. The table has, for each run and ``--shifts`` (``--bn-shift``), the share of
features that are not zero, the accuracy in % of the nearest class mean by cosine, and of a
classifier that starts empty and takes 8 steps of gradient descent, as long as the features allow:
1.3 times the number of shots, divided by their mean squared length. In brackets, the descent's
paired difference from the first row of the same number of shots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines.pretrain import MEASURED, fold_statistics
from dataloader import scan_split
from engine import checkpoint as checkpoints
from engine.backend import choose, dataset
from engine.flags import parse, settle
from engine.run import checkpoint_of
from main import build
from tools.predict import prepare
from tools.results import BEST, LAST
from utils import run_main, summary

N_CLASS, N_EVAL, N_STEPS = 5, 15, 8
SEED = 719


@torch.no_grad()
def features(path: Path, data_root: Path, shift: float) -> list[Tensor]:
    """The features of all validation images, by class: [images, D] each."""
    content = checkpoints.load(path)
    given = {
        "data_root": str(data_root),
        "n_class": N_CLASS,
        "adapt": "classifier",
        "bn_shift": shift,
        "cpu": True,
    }
    args = settle(given, parse([])[1], content.get("hyper_parameters"))
    way = choose(args)
    (learner, _), metalearner = build(args, way)
    checkpoints.load_start(metalearner, content, path, args)
    fold_statistics(args, metalearner, dataset(args, way, scan_split(data_root, "train"), MEASURED))
    learner.eval().copy_flat_params(metalearner.metalstm.cI)
    learner.reset_batch_stats()
    classes = scan_split(data_root, "val").files
    images = (
        torch.stack([prepare(p, args) for p in files]).contiguous(memory_format=torch.channels_last)
        for files in classes
    )
    return [learner.features(x).clone() for x in images]


def drawn(sizes: list[int], n_shot: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Which classes, [5], and which of their images, [5, n_shot + 15], make up each of n episodes."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(n):
        chosen = torch.randperm(len(sizes), generator=generator)[:N_CLASS]
        picks = [torch.randperm(sizes[c], generator=generator)[: n_shot + N_EVAL] for c in chosen]
        yield chosen, torch.stack(picks)


def nearest_mean(support: Tensor, query: Tensor) -> Tensor:
    """Scores [Q, 5] of queries [Q, D] by the cosine to each class's mean direction; support [5,
    n_shot, D].
    """
    return F.normalize(query) @ F.normalize(F.normalize(support, dim=2).mean(1)).t()


def descent(support: Tensor, query: Tensor, step: float) -> Tensor:
    """Scores [Q, 5] of an empty linear classifier after ``N_STEPS`` steps on the cross entropy of
    the support set.
    """
    x = F.pad(support.flatten(0, 1), (0, 1), value=1.0)  # the bias is the weight of a feature of 1
    answers = torch.eye(N_CLASS).repeat_interleave(support.shape[1], 0)
    weight = torch.zeros(N_CLASS, x.shape[1])
    for _ in range(N_STEPS):
        weight -= step * ((x @ weight.t()).softmax(1) - answers).t() @ x / len(x)
    return F.pad(query, (0, 1), value=1.0) @ weight.t()


def accuracies(found: list[Tensor], n_shot: int, n: int) -> tuple[list[float], list[float]]:
    """In percent, by the nearest mean and by descent, of each of n episodes."""
    step = 1.3 * n_shot / float(torch.cat(found).square().sum(1).mean())
    y, rows = torch.arange(N_CLASS).repeat_interleave(N_EVAL), ([], [])
    for chosen, picks in drawn([len(x) for x in found], n_shot, n):
        x = torch.stack([found[c][p] for c, p in zip(chosen, picks, strict=True)])
        support, query = x[:, :n_shot], x[:, n_shot:].flatten(0, 1)
        for row, scores in zip(
            rows, (nearest_mean(support, query), descent(support, query, step)), strict=True
        ):
            row.append(float((scores.argmax(1) == y).double().mean() * 100))
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="pre-training's run folders or checkpoints")
    parser.add_argument(
        "--data-root", type=Path, required=True, help="folder with train/ and val/ of class folders"
    )
    parser.add_argument(
        "--shifts", type=float, nargs="+", default=[0.0, 0.3], help="values of --bn-shift"
    )
    parser.add_argument("--episodes", type=int, default=1000, help="validation episodes")
    args = parser.parse_args(argv)
    print("| run | shots | shift | not zero, % | nearest mean, % | descent, % |\n|-|-|-|-|-|-|")
    first: dict[int, list[float]] = {}
    for run in args.runs:
        for shift in args.shifts:
            found = features(Path(checkpoint_of(run, SEED, BEST, LAST)), args.data_root, shift)
            share = float((torch.cat(found) != 0).double().mean() * 100)
            for n_shot in (5, 1):
                mean, descended = accuracies(found, n_shot, args.episodes)
                cells = [
                    f"{s['mean']:.1f} ± {s['ci95']:.1f}" for s in map(summary, (mean, descended))
                ]
                if n_shot in first:
                    by = summary([a - b for a, b in zip(descended, first[n_shot], strict=True)])
                    cells[-1] += f" ({by['mean']:+.1f} ± {by['ci95']:.1f})"
                first.setdefault(n_shot, descended)
                print(
                    f"| {Path(run).name} | {n_shot} | {shift:g} | {share:.0f} | {' | '.join(cells)} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
