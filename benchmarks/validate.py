"""Compare trained runs on the same validation episodes, to choose between recipes.

    python benchmarks/validate.py logs-719 other-719 --episode-val 300 --transductive true

The table holds the accuracy of each run's best checkpoint in %, its 95 % interval over episodes,
and the paired difference from the first run. ``--transductive true`` adds both with transductive
batch norm. Other flags are main.py's, such as ``--data-root``, ``--seed`` (of the episodes) and
``--tta-permutations``; they follow the runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paired import difference, interval

from dataloader import scan_split
from engine.backend import dataset, select_backend
from engine.checkpoint import BEST, LAST, load_for_test, load_weights, resolve_checkpoint
from engine.distributed import SINGLE_PROCESS
from engine.evaluation import Evaluator
from engine.flags import DEFAULTS, boolean, parse
from main import build
from tools.markdown import markdown_table
from utils import Parser, UserError, run_main

EPISODES = ("n_class", "n_shot", "n_eval", "image_size")  # with the seed, what episodes are


def evaluate(args: argparse.Namespace, checkpoint: dict) -> list[float]:
    """Evaluate a checkpoint on the validation episodes: accuracies in %."""
    backend = select_backend(args)
    model = build(args, backend)
    load_weights(model.saved, checkpoint, Path(args.resume))
    val_set = dataset(args, backend, scan_split(args.data_root, "val"), args.episode_val)
    return Evaluator(args, backend, model, SINGLE_PROCESS)(val_set)[1]


def compare(runs: list[str], names: list[str], transductive: bool, flags: dict) -> str:
    """The table: a row for each run.

    Args:
        runs: run folders or checkpoints.
        names: of the checkpoint in a run folder, the first that is there.
        transductive: whether to add the columns with transductive batch norm.
        flags: the flags of main.py that are given.

    Raises:
        UserError: there is no checkpoint, or its episodes differ from the first run's.
    """
    flags = {"seed": DEFAULTS["seed"], **flags}
    settings = [{}, {"transductive": True}] if transductive else [{}]
    rows, first, first_args = [], {}, None
    for run in runs:
        path = resolve_checkpoint(run, flags["seed"], *names, flag="RUN")
        args, checkpoint = load_for_test({**flags, "resume": path})
        first_args = first_args or args
        for name in EPISODES:
            if getattr(args, name) != getattr(first_args, name):
                values = f"{getattr(args, name)}, {runs[0]} {getattr(first_args, name)}"
                raise UserError(f"{run}: its {name} is {values}; compare runs of one kind")
        cells = []
        for k, setting in enumerate(settings):
            if setting and args.method != "lstm":  # a linear head has no batch norm
                cells += ["", ""]
                continue
            found = evaluate(argparse.Namespace(**{**vars(args), **setting}), checkpoint)
            cells += [interval(found), difference(found, first[k]) if k in first else ""]
            first.setdefault(k, found)
        rows.append([Path(run).name, f"{checkpoint['episode']:,}", *cells])
    header = ["run", "episode", f"validation, {flags.get('episode_val', 100)} episodes, %"]
    header += ["difference", "transductive, %", "transductive difference"]
    return markdown_table(header[: 2 + 2 * len(settings)], rows)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.partition("\n")[0], epilog="other flags: as main.py's")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or checkpoint")
    parser.add_argument("--last", action="store_true", help="the last checkpoint, not the best")
    words = "true: also with transductive batch norm"
    parser.add_argument("--transductive", type=boolean, default=False, metavar="BOOL", help=words)
    args, others = parser.parse_known_args(argv)
    names = [LAST] if args.last else [BEST, LAST]
    print(compare(args.runs, names, args.transductive, parse(others)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
