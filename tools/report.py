"""Keeps, prints and draws the results of a test."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from engine.provenance import provenance
from tools import plots, tables
from tools.results import write_results


def record(
    path: Path,
    args: argparse.Namespace,
    checkpoint: dict,
    tests: list[dict],
    device: torch.device,
    n_processes: int,
) -> None:
    """Keep tests of a run's checkpoint in the run's folder, and print and draw them.

    A checkpoint at another place than a run's ``ckpts/`` has no folder for them.
    """
    if path.resolve().parent.name != "ckpts":
        return
    folder = path.resolve().parent.parent
    about = provenance(device, n_processes)
    written = write_results(folder, args, checkpoint, tests, about)
    print(f"written to {written}\n\n{tables.tables([folder])}")
    if args.plots and (folder / "plots").is_dir():
        plots.draw(folder, "histogram")
