"""Plots of a run, from its folder alone: ``plots/*.png`` and ``*.svg``.

Importing this module does not need Matplotlib; ``tools/figures.py`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from data.layout import scan_split
from engine.backend import dataset
from engine.checkpoint import BEST, LAST, load, resolve_checkpoint
from engine.flags import resolve, run_folder
from tools.results import NAME as RESULTS
from tools.trace import N_EPISODES, read_trace, write_trace
from tools.trace import NAME as TRACE
from tools.words import display_name
from utils import UserError, load_package


def load_figures() -> ModuleType:
    """Import ``tools.figures``, which takes a second.

    Raises:
        UserError: Matplotlib is missing or broken.
    """
    return load_package("tools.figures", "matplotlib")


def plot_mode(cli_args: dict[str, object], load_model: Callable[..., tuple]) -> None:
    """Draw the run that ``--resume``, or else ``--save`` and ``--seed``, names. Given the data,
    first record its trace, if that is missing or older than its last checkpoint.

    Args:
        load_model: ``main.load_model``.
    """
    args = resolve(cli_args)
    folder = run_folder(args)
    if args.resume not in (None, "auto"):
        place = Path(resolve_checkpoint(args.resume, args.seed, LAST)).resolve()
        folder = place if place.is_dir() else place.parent
        folder = folder.parent if folder.name == "ckpts" else folder
    trace, newest = folder / TRACE, folder / "ckpts" / LAST
    stale = trace.exists() and newest.exists() and trace.stat().st_mtime < newest.stat().st_mtime
    if {"data", "data_root"} & cli_args.keys() and (stale or not trace.exists()):
        last = resolve_checkpoint(str(folder), args.seed, LAST, BEST)  # as at the training's end
        if load(Path(last)).get("mode") != "pretrain":  # which has no updates to trace
            args, _, backend, model = load_model({**cli_args, "resume": last})
            val_set = dataset(args, backend, scan_split(args.data_root, "val"), N_EPISODES)
            write_trace(folder, val_set, model, args.batch_size, backend.device)
    plot(folder)


@contextmanager
def optional() -> Iterator[None]:
    """Draw if that is possible: a broken Matplotlib costs pictures only, and a note says so."""
    try:
        yield
    except Exception as e:  # a broken package raises nearly anything
        why = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        print(f"note: pictures are left out: {why}")


def draw(folder: Path, name: str | None = None) -> None:
    """Draw a run, if it can be drawn."""
    with optional():
        plot(folder, name)


def plot(folder: Path, wanted: str | None = None) -> list[Path]:
    """Draw everything that a run folder has the numbers for, and print what.

    Args:
        wanted: draw only the picture of this name.

    Returns:
        The PNG files written; an SVG stands beside each.

    Raises:
        UserError: there is no run in the folder, or it cannot be written.
    """
    figures = load_figures()
    pictures: dict[str, tuple] = {"curves": (figures.curves, folder)}
    run, trace = folder.resolve().name, read_trace(folder)
    if trace is not None:
        drawn = [figures.gates, figures.movement, figures.adaptation]
        drawn += [figures.confusion] * ("images" in trace)  # exported runs have no photographs
        pictures |= {function.__name__: (function, run, trace) for function in drawn}
    if (folder / RESULTS).exists():
        pictures["histogram"] = (figures.histogram, folder)
    written = []
    with figures.style([run] + [display_name(str(c)) for c in (trace or {}).get("classes", [])]):
        for name, (function, *numbers) in pictures.items():
            if wanted in (None, name):
                written.append(folder / "plots" / f"{name}.png")
                figures.save(function(*numbers), written[-1])
    print(f"drawn: {folder / 'plots'}: {' '.join(path.name for path in written)}")
    return written
