"""Filters of a trained cI that no image activates: their ReLU gives 0 everywhere.

    python benchmarks/dead_filters.py results/miniImagenet-5s5c-* --episode-val 20

The table counts them in each block of Conv4, over the support images of the validation episodes,
before the first update. A dead filter has no gradient, so neither the meta-learner nor its own
training revives it. Other flags are main.py's, such as ``--data-root``; they follow the runs.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from runs import load_run, runs_parser
from torch import Tensor, nn

from data.layout import scan_split
from engine.backend import dataset
from engine.checkpoint import short_name
from engine.flags import parse
from engine.model import Model
from engine.process import run_main
from engine.stream import episodes
from learner import N_BLOCKS
from tools.words import markdown_table
from utils import UserError


def dead_filters(run: str, flags: dict[str, object]) -> list[str]:
    """A run's row of the table.

    Raises:
        UserError: there is no checkpoint, or its learner is not Conv4 that reads images.
    """
    args, checkpoint, backend, model = load_run(run, {**flags, "plain": True})
    if not isinstance(model, Model) or model.backbone is not None or args.learner != "conv4":
        raise UserError(f"{run}: its learner is not a trained Conv4; name other runs")
    net = model.learners[0]
    net.copy_flat_params(model.metalearner.initial_state().c)
    norms = [net.get_submodule(f"norm{b}") for b in range(1, N_BLOCKS + 1)]
    largest = [torch.full([args.filters], -torch.inf) for _ in norms]  # before ReLU
    for b, norm in enumerate(norms):
        norm.register_forward_hook(partial(_keep_largest, largest[b]))
    val_set = dataset(args, backend, scan_split(args.data_root, "val"), args.episode_val)
    with torch.no_grad():
        for episode in episodes(val_set, 0, args.n_workers, backend.device, False):
            net(episode.support)
    counts = [str(int((values <= 0).sum())) for values in largest]
    return [short_name(Path(args.resume)), f"{checkpoint['episode']:,}", args.bn_scale, *counts]


def _keep_largest(largest: Tensor, _norm: nn.Module, _inputs: tuple, output: Tensor) -> None:
    torch.maximum(largest, output.amax((0, 2, 3)).cpu(), out=largest)


def main(argv: list[str]) -> int:
    parser = runs_parser(__doc__)
    args, others = parser.parse_known_args(argv)
    flags = parse(others)
    blocks = [f"dead in block {b}" for b in range(1, N_BLOCKS + 1)]
    rows = [dead_filters(run, flags) for run in args.runs]
    print(markdown_table(["checkpoint", "episode", "bn-scale", *blocks], rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
