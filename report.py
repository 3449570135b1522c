"""Results as papers report them: tests of a run into its ``results.json``, and Markdown tables of one or several runs.

    python report.py logs-*
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from utils import UserError, summary, whole_file

NAME = "results.json"
CROSS_SCHEDULE = {"epoch": 5, "batch_size": 5}  # the authors', for a number of shots that the model was not trained on

# accuracy in percent; mini-ImageNet, 5-way (spec: paper's table 1; the port's README)
PUBLISHED = {
    5: [
        ("paper", "", "", "60.60 ± 0.71"),
        ("the older port, seed 719", "41000", "59.08 (std 9.9)", "56.59 / 57.85 / 57.76 (100/250/600 episodes)"),
        ("the older port, seed 53", "44000", "58.04 (std 9.1)", "57.85 / 57.83 / 58.14 (100/250/600 episodes)"),
    ],
    1: [("paper", "", "", "43.44 ± 0.77")],
}


def write_results(folder: Path, content: dict) -> Path:
    """Put a test's outcome into a run folder as ``results.json``, whole or not at all."""
    path = folder / NAME
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    return path


def read_results(folder: Path) -> dict:
    """What ``write_results`` wrote.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for test in content["tests"].values():
            test["counts"], test["accuracies"]
        content["seed"], content["episode"], content["n_class"], content["data"], content["best"]
    except FileNotFoundError as e:
        raise UserError(f"{folder}: no {NAME} there; test the run first (python main.py --mode test)") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a test's results; test the run again") from e
    return content


def cell(accuracies: list[float], count: int) -> str:
    """Mean, 95 % interval and standard deviation of the first ``count`` episodes."""
    s = summary(accuracies[:count])
    return f"{s['mean']:.2f} ± {s['ci95']:.2f} (std {s['std']:.1f})"


def table(runs: list[dict]) -> str:
    """The README's table in Markdown: a row a run and number of shots, the mean over seeds, and what was published.

    Args:
        runs: from ``read_results``.
    """
    blocks = []
    for shots in sorted({int(k) for run in runs for k in run["tests"]}, reverse=True):
        tested = [run for run in runs if str(shots) in run["tests"]]
        counts = sorted({c for run in tested for c in run["tests"][str(shots)]["counts"]})
        lines = [
            f"{tested[0]['n_class']}-way {shots}-shot, accuracy in %, mean ± 95 % interval:",
            "",
            "| seed | data | train episodes | val | " + " | ".join(f"test, {c} episodes" for c in counts) + " |",
            "|-|-|-|-|" + "-|" * len(counts),
        ]
        for run in tested:
            best, test = run["best"], run["tests"][str(shots)]
            val = f"{best['accuracy']:.2f} (std {best['std']:.1f})" if best and "std" in best else ""
            cells = [cell(test["accuracies"], c) if c in test["counts"] else "" for c in counts]
            lines.append(f"| {run['seed']} | {run['data']} | {run['episode']} | {val} | " + " | ".join(cells) + " |")
        if len({run["seed"] for run in tested}) > 1:
            cells = []
            for c in counts:
                with_c = [test for test in (run["tests"][str(shots)] for run in tested) if c in test["counts"]]
                over = summary(summary(test["accuracies"][:c])["mean"] for test in with_c)
                cells.append(f"{over['mean']:.2f} ± {over['ci95']:.2f} ({over['n']} runs)")
            lines.append("| mean over runs | | | | " + " | ".join(cells) + " |")
        for name, episodes, val, test in PUBLISHED.get(shots, []):
            padding = " |" * (len(counts) - 1)
            lines.append(f"| {name} | mini-ImageNet | {episodes} | {val} |{padding} {test} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(folders: list[str]) -> int:
    if not folders or folders[0] in ("-h", "--help"):
        print("usage: python report.py RUN_FOLDER [RUN_FOLDER ...]\nprints the tests of runs as a Markdown table")
        return 0 if folders else 2
    try:
        print(table([read_results(Path(folder)) for folder in folders]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
