"""Pictures of a run, from its folder alone: ``plots/*.png`` and ``*.svg``.

Colours are Okabe & Ito's, which colour-blind readers can tell apart; line styles differ as well, for print.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from around.recording import LAYERS, QUANTILES, read_trace
from around.results import NAME as RESULTS
from around.results import read_results
from utils import UserError, summary

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "meta-lstm",
    "figure.constrained_layout.use": True,
}


def read_metrics(folder: Path) -> list[dict]:
    """The events of a run, in order, without a last line that was cut off.

    Raises:
        UserError: there are none.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); name a run by --save and --seed") from e
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    if not any(e.get("event") == "train" for e in events):
        raise UserError(f"{path}: no episode of training is logged there yet")
    return events


def smooth(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each value and its neighbours, ``width`` in all, fewer at the ends.

    Args:
        values: [N], NaN where nothing finite was logged.
    """
    half = width // 2
    windows = [values[max(0, k - half) : k + half + 1] for k in range(len(values))]
    with np.errstate(all="ignore"):
        return np.array([np.nanmean(w) if np.isfinite(w).any() else math.nan for w in windows]), np.array(
            [np.nanstd(w) if np.isfinite(w).any() else math.nan for w in windows]
        )


def curves(folder: Path) -> Figure:
    """Loss and accuracy over episodes and over hours of training."""
    events = read_metrics(folder)
    train = [e for e in events if e["event"] == "train"]
    val = [e for e in events if e["event"] == "val"]
    episode = np.array([e["episode"] for e in train])
    hours = np.cumsum([e["time"]["seconds"] for e in train]) / 3600
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.2), sharey="row")
    for row, (key, mean_key, name) in enumerate(
        (("loss", "mean_loss", "loss"), ("accuracy", "mean_accuracy", "accuracy, %"))
    ):
        values = np.array([e[mean_key] for e in train], dtype=float)
        mean, std = smooth(values, max(3, len(values) // 20))
        for column, x in enumerate((episode, hours)):
            axis = axes[row, column]
            marker = "o" if len(x) == 1 else None
            axis.fill_between(x, mean - std, mean + std, color=BLUE, alpha=0.2, linewidth=0)
            axis.plot(x, mean, color=BLUE, marker=marker, label="training, smoothed, ± std of the log's means")
            if val:
                at = np.interp([e["episode"] for e in val], episode, x)
                centre = [e[key]["mean"] for e in val]
                half = [e[key]["ci95"] for e in val]
                axis.errorbar(
                    at, centre, half, color=ORANGE, fmt="s--", markersize=4, linewidth=1, capsize=2, label="validation, ± 95 %"
                )
            if row == 1:
                axis.set_xlabel(("episodes", "hours of training")[column])
        axes[row, 0].set_ylabel(name)
    axes[0, 0].legend(loc="best", fontsize=8)
    figure.suptitle(f"{folder.name}: training and validation")
    return figure


def gates(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """Forget and input gates over the updates, layer by layer (compare the paper's figure 2)."""
    figure, axes = plt.subplots(2, len(LAYERS), figsize=(11, 4.8), sharex=True, sharey="row")
    for row, (key, colour) in enumerate((("forget", BLUE), ("input", ORANGE))):
        gate = trace[key]  # [E, T, L, 6]
        t = np.arange(1, gate.shape[1] + 1)
        for k, layer in enumerate(LAYERS):
            axis = axes[row, k]
            spread = gate[:, :, k, 1:].mean(0)
            axis.fill_between(t, spread[:, 0], spread[:, 4], color=colour, alpha=0.15, linewidth=0)
            axis.fill_between(t, spread[:, 1], spread[:, 3], color=colour, alpha=0.3, linewidth=0)
            axis.plot(t, gate[:, :, k, 0].T, color=GREY, linewidth=0.5, alpha=0.4)
            axis.plot(t, gate[:, :, k, 0].mean(0), color=colour, marker="o", markersize=3)
            if row == 0:
                axis.set_title(layer, fontsize=9)
            else:
                axis.set_xlabel("update")
        axes[row, 0].set_ylabel(f"{key} gate")
    low, high = f"{QUANTILES[0]:.0%}", f"{QUANTILES[-1]:.0%}"
    words = f"mean, quartiles and {low} to {high} of a layer's coordinates; grey: one episode each"
    figure.suptitle(f"{name}: gates; {words}")
    return figure


def movement(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """How far each layer has moved from cI."""
    moved = trace["moved"]
    figure, axis = plt.subplots(figsize=(5, 3.6))
    t = np.arange(1, moved.shape[1] + 1)
    for k, (layer, colour, style) in enumerate(
        zip(LAYERS, (BLUE, ORANGE, GREEN, "#CC79A7", "#000000"), ("-", "--", "-.", ":", (0, (5, 1, 1, 1))), strict=True)
    ):
        axis.plot(t, 100 * moved[:, :, k].mean(0), color=colour, linestyle=style, marker="o", markersize=3, label=layer)
    axis.set(xlabel="update", ylabel="|c_t − cI| / |cI|, %", title=f"{name}: distance from cI")
    axis.legend(fontsize=8)
    return figure


def adaptation(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """The learner's accuracy after each update."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for key, colour, style in (("support", GREEN, "--"), ("query", BLUE, "-")):
        values = trace[key]
        t = np.arange(1, values.shape[1] + 1)
        half = 1.96 * values.std(0) / math.sqrt(len(values))
        mean = values.mean(0)
        axis.fill_between(t, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        axis.plot(t, mean, color=colour, linestyle=style, marker="o", markersize=3, label=f"{key} set")
    title = f"{name}: accuracy of the learner, {len(trace['query'])} validation episodes, ± 95 %"
    axis.set(xlabel="update", ylabel="accuracy, %", ylim=(0, 102), title=title)
    axis.title.set_fontsize(9)
    axis.legend(loc="best", fontsize=8)
    return figure


def histogram(folder: Path) -> Figure:
    """Test accuracies, one per episode."""
    tests = read_results(folder)["tests"]
    figure, axis = plt.subplots(figsize=(5, 3.6))
    looks = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (GREY, "xx"))
    for test, (colour, hatch) in zip(tests, looks, strict=False):
        s = summary(test["accuracies"])
        label = f"{test['n_shot']}-shot, episode {test['episode']}: {s['mean']:.2f} ± {s['ci95']:.2f} %"
        values = np.array(test["accuracies"])
        axis.hist(values, bins=_bins(values), color=colour, alpha=0.6, hatch=hatch, label=label)
        axis.axvline(s["mean"], color=colour, linestyle="--", linewidth=1)
    axis.set(xlabel="accuracy of an episode, %", ylabel="test episodes", title=f"{folder.name}: test accuracies")
    axis.legend(fontsize=8)
    return figure


def _bins(values: np.ndarray) -> np.ndarray:
    """Edges some 4 % apart, each bin with the same number of the values that an episode's accuracy can take."""
    steps = np.diff(np.unique(values.round(3)))
    step = steps.min() if len(steps) else 4.0
    return np.arange(-step / 2, 100 + 4 + step, step * max(1, round(4 / step)))


def confusion(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """One episode's query images by true and predicted class."""
    images, pairs = trace["images"], trace["confusion"]
    n = int(pairs.max()) + 1
    figure, axes = plt.subplots(n, n, figsize=(1.5 * n + 0.8, 1.5 * n + 0.9), squeeze=False)
    for right in range(n):
        for given in range(n):
            axis: Axes = axes[right, given]
            these = images[(pairs[:, 0] == right) & (pairs[:, 1] == given)]
            if len(these):
                side = math.ceil(math.sqrt(len(these)))
                size = these.shape[1]
                sheet = np.full((side * size, side * size, 3), 255, dtype=np.uint8)
                for k, image in enumerate(these):
                    y, x = divmod(k, side)
                    sheet[y * size : (y + 1) * size, x * size : (x + 1) * size] = image
                axis.imshow(sheet, interpolation="nearest")
            axis.set(xticks=[], yticks=[], box_aspect=1)
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set(visible=True, color=GREEN if right == given else "#bbbbbb", linewidth=2.5 if right == given else 0.8)
            axis.set_title(str(len(these)), fontsize=8, pad=2)
            if given == 0:
                axis.set_ylabel(f"is class {right + 1}", fontsize=8)
            if right == n - 1:
                axis.set_xlabel(f"taken for {given + 1}", fontsize=8)
    share = (pairs[:, 0] == pairs[:, 1]).mean()
    figure.suptitle(f"{name}: query images of one validation episode, {share:.0%} right (on the diagonal)", fontsize=10)
    return figure


def plot(folder: Path) -> list[Path]:
    """Draw everything that a run folder has the numbers for.

    Returns:
        The PNG files written; an SVG stands beside each.

    Raises:
        UserError: there is no run in the folder, or it cannot be written.
    """
    written = []
    with plt.rc_context(STYLE):
        for name, figure in _figures(folder):
            try:
                (folder / "plots").mkdir(exist_ok=True)
                for ending in ("png", "svg"):
                    path = folder / "plots" / f"{name}.{ending}"
                    figure.savefig(path, dpi=150, metadata={"Date": None} if ending == "svg" else None)
            except OSError as e:
                raise UserError(f"{folder / 'plots'}: cannot be written ({e.strerror}); free some space") from e
            finally:
                plt.close(figure)
            written.append(folder / "plots" / f"{name}.png")
    return written


def _figures(folder: Path) -> Iterator[tuple[str, Figure]]:
    yield "curves", curves(folder)
    trace = read_trace(folder)
    if trace is not None:
        for picture in (gates, movement, adaptation, confusion):
            yield picture.__name__, picture(folder.name, trace)
    if (folder / RESULTS).exists():
        yield "histogram", histogram(folder)
