"""Draw the validation accuracy of several runs, from their logs, over training episodes.

    python benchmarks/curves.py RUN... --out FILE.svg

Runs that differ in their seed alone share a colour.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.flags import Parser
from engine.logger import read_metrics
from engine.process import run_main
from tools.plots import load_figures
from utils import UserError, explained


def draw(folders: list[Path], path: Path) -> None:
    """Draw the runs' validations.

    Args:
        path: of the picture; its suffix is the format.

    Raises:
        UserError: a folder is no run or has no validation, or the picture cannot be written.
    """
    figures = load_figures()
    seeds: dict[str, list[Path]] = {}  # by the name without the seed
    for folder in folders:
        seeds.setdefault(re.sub(r"-\d+$", "", folder.name), []).append(folder)
    with figures.style(folder.name for folder in folders):
        figure, axis = figures.plt.subplots(figsize=(7, 3.6 + 0.12 * len(folders)))
        for k, of_recipe in enumerate(seeds.values()):
            for folder, line in zip(of_recipe, cycle(("-", "--", ":"))):
                val = [event for event in read_metrics(folder) if event["event"] == "val"]
                if not val:
                    raise UserError(f"{folder}: no validation is logged there yet")
                accuracies = [event["accuracy"]["mean"] for event in val]
                look = {"color": f"C{k}", "linestyle": line, "linewidth": 1.2, "label": folder.name}
                axis.plot([event["episode"] for event in val], accuracies, **look)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="training episodes", ylabel="validation accuracy, %")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        with explained(path, advice="choose another --out"):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


def picture(text: str) -> Path:
    """A file name with a suffix that Matplotlib knows."""
    if Path(text).suffix not in (".svg", ".png", ".pdf"):
        raise ArgumentTypeError(f"is {text!r}, but must end in .svg, .png or .pdf")
    return Path(text)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", required=True, type=picture, metavar="FILE", help="the picture")
    args = parser.parse_args(argv)
    draw(args.runs, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
