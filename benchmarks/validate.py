"""Compare trained runs on the same validation episodes, to choose between recipes.

    python benchmarks/validate.py logs-719 other-719 --episode-val 300

The table holds the accuracy of each run's best checkpoint, or of a checkpoint, in %, its 95 %
interval over episodes, and the paired difference from the first run. Other flags are main.py's,
such as ``--data-root``, ``--seed`` (of the episodes) and ``--transductive``; they follow the runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import difference, interval, load_run, runs_parser

from data.layout import scan_split
from engine.backend import dataset
from engine.checkpoint import short_name
from engine.evaluation import Evaluator
from engine.flags import DEFAULTS, flag_name, parse
from engine.process import run_main
from tools.words import markdown_table
from utils import UserError

EPISODES = ("n_class", "n_shot", "n_eval", "image_size")  # with the seed, what episodes are


def compare(runs: list[str], flags: dict[str, object]) -> str:
    """The table: a row for each run.

    Args:
        runs: run folders or checkpoints.
        flags: the flags of main.py that are given.

    Raises:
        UserError: there is no checkpoint, or its episodes differ from the first run's.
    """
    flags, rows, first, first_kind = {"seed": DEFAULTS["seed"], **flags}, [], [], None
    for run in runs:
        args, checkpoint, backend, model = load_run(run, flags)
        split = scan_split(args.data_root, "val")
        kind = {flag_name(name): getattr(args, name) for name in EPISODES}
        kind["hash of the validation images"] = split.fingerprint
        first_kind = first_kind or kind
        for name, value in kind.items():
            if value != first_kind[name]:
                what = f"its {name} is {value}, but that of {runs[0]} is {first_kind[name]}"
                raise UserError(f"{run}: {what}; compare runs of one kind")
        val_set = dataset(args, backend, split, args.episode_val)
        found = Evaluator(args, backend, model)(val_set)[1]
        apart = difference(found, first) if first else ""
        first = first or found
        name = short_name(Path(args.resume))
        rows.append([name, f"{checkpoint['episode']:,}", interval(found), apart])
    title = f"validation, {len(first)} episodes, %"
    return markdown_table(["checkpoint", "episode", title, "difference"], rows)


def main(argv: list[str]) -> int:
    parser = runs_parser(__doc__)
    args, others = parser.parse_known_args(argv)
    print(compare(args.runs, parse(others)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
