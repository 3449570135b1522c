"""Compare pre-trained features by simple classifiers of five new classes, on the same validation
episodes.

    python benchmarks/linear_probe.py --data-root data/miniImagenet logs-pretrain-719 other-719

Each validation image is seen once, normalised as for ``--method linear-head``, so that a thousand
episodes take a minute. For each run and each of ``--shifts`` (``--bn-shift``) the table has the
share of features that are not zero, and the accuracy in % of two classifiers: the nearest class
mean by cosine, and a linear head that starts at zero and takes 8 steps of gradient descent. Their
length is 1.3 times the number of shots divided by the mean squared length of the features. The last
column is the paired difference of gradient descent from the first row of the same number of shots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paired import difference, interval

from baselines import linear_head
from baselines.methods import MEASURED, initialise
from dataloader import eval_image, load_image, scan_split, to_input
from engine import checkpoint as checkpoints
from engine.backend import dataset, select_backend
from engine.checkpoint import BEST, LAST, resolve_checkpoint
from engine.flags import DEFAULTS, resolve
from tools.markdown import markdown_table
from utils import Parser, run_main

N_CLASS, N_EVAL, N_STEPS = 5, 15, 8
SEED = DEFAULTS["seed"]


@torch.no_grad()
def features(path: Path, data_root: Path, shift: float) -> list[Tensor]:
    """Compute the features of all validation images: [images, D] for each class."""
    content = checkpoints.load(path)
    flags = {"method": "linear-head", "bn_shift": shift, "n_class": N_CLASS, "cpu": True}
    args = resolve({**flags, "data_root": str(data_root)}, content.get("hyper_parameters"))
    backend = select_backend(args)
    model = linear_head.build(args, backend)
    train_set = dataset(args, backend, scan_split(data_root, "train"), MEASURED)
    initialise(args, model, (path, content), train_set)
    found = []
    for files in scan_split(data_root, "val").files:
        images = [eval_image(load_image(p), args.image_size, args.augment) for p in files]
        x = to_input(images, args.pixels).contiguous(memory_format=torch.channels_last)
        found.append(model.inputs(x).clone())
    return found


def draw_episodes(sizes: list[int], n_shot: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the classes [5] of each of n episodes and their images [5, n_shot + 15]."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(n):
        classes = torch.randperm(len(sizes), generator=generator)[:N_CLASS]
        picks = [torch.randperm(sizes[c], generator=generator)[: n_shot + N_EVAL] for c in classes]
        yield classes, torch.stack(picks)


def nearest_mean(support: Tensor, query: Tensor) -> Tensor:
    """Scores [Q, 5] of queries [Q, D]: the cosine to each class's mean direction.

    Args:
        support: [5, n_shot, D].
    """
    return F.normalize(query) @ F.normalize(F.normalize(support, dim=2).mean(1)).t()


def gradient_descent(support: Tensor, query: Tensor, rate: float) -> Tensor:
    """Scores [Q, 5] of a linear head that starts at zero and takes ``N_STEPS`` steps on the cross
    entropy of the support set.
    """
    x = F.pad(support.flatten(0, 1), (0, 1), value=1.0)  # the bias is the weight of a feature of 1
    targets = torch.eye(N_CLASS).repeat_interleave(support.shape[1], 0)
    weight = torch.zeros(N_CLASS, x.shape[1])
    for _ in range(N_STEPS):
        weight -= rate * ((x @ weight.t()).softmax(1) - targets).t() @ x / len(x)
    return F.pad(query, (0, 1), value=1.0) @ weight.t()


def accuracies(found: list[Tensor], n_shot: int, n: int) -> tuple[list[float], list[float]]:
    """Accuracies in % of the nearest mean and of gradient descent on n episodes."""
    rate = 1.3 * n_shot / float(torch.cat(found).square().sum(1).mean())
    y, by_mean, by_descent = torch.arange(N_CLASS).repeat_interleave(N_EVAL), [], []
    for classes, picks in draw_episodes([len(x) for x in found], n_shot, n):
        x = torch.stack([found[c][p] for c, p in zip(classes, picks, strict=True)])
        support, query = x[:, :n_shot], x[:, n_shot:].flatten(0, 1)
        scores = nearest_mean(support, query), gradient_descent(support, query, rate)
        for results, s in zip((by_mean, by_descent), scores, strict=True):
            results.append(float((s.argmax(1) == y).double().mean() * 100))
    return by_mean, by_descent


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders or checkpoints of a pre-training")
    words = "folder with train/ and val/ of class folders"
    parser.add_argument("--data-root", type=Path, required=True, help=words)
    words = "values of --bn-shift"
    parser.add_argument("--shifts", type=float, nargs="+", default=[0.0, 0.3], help=words)
    parser.add_argument("--episodes", type=int, default=1000, help="validation episodes")
    args = parser.parse_args(argv)
    first: dict[int, list[float]] = {}
    rows = []
    for run in args.runs:
        path = Path(resolve_checkpoint(run, SEED, BEST, LAST, flag="RUN"))
        for shift in args.shifts:
            found = features(path, args.data_root, shift)
            share = float((torch.cat(found) != 0).double().mean() * 100)
            for n_shot in (5, 1):
                mean, descent = accuracies(found, n_shot, args.episodes)
                paired = difference(descent, first[n_shot]) if n_shot in first else ""
                cells = [Path(run).name, n_shot, f"{shift:g}", f"{share:.0f}"]
                rows.append([*cells, interval(mean), interval(descent), paired])
                first.setdefault(n_shot, descent)
    header = ["run", "shots", "shift", "not zero, %", "nearest mean, %", "gradient descent, %"]
    print(markdown_table([*header, "difference"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
