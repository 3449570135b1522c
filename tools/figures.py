"""Figures of a run, drawn by Matplotlib.

Colours are Okabe & Ito's, which colour-blind readers can tell apart; line styles differ, too, for
print.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may not exist here

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from engine import checkpoint as checkpoints
from engine.checkpoint import LAST
from engine.logger import read_metrics, summary
from tools.results import NAME as RESULTS
from tools.results import read_results, variant
from tools.trace import QUANTILES
from tools.words import display_name, shorten
from utils import UserError, atomic_write

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "meta-lstm",
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a $ in a file's name is a dollar
    "axes.formatter.useoffset": False,
}
GUESSING = {"color": GREY, "linestyle": ":", "linewidth": 1}


# ---- Words ----


def fonts_for(texts: Iterable[str]) -> list[str]:
    """Families to draw these texts with: Matplotlib's own, then installed ones for the characters
    that it lacks.

    A character that no installed font has is drawn as a box (Matplotlib's "Last Resort" has one for
    each), and a note says so.
    """
    families = ["DejaVu Sans"]
    missing = {ord(c) for c in "".join(texts)} - _characters(font_manager.findfont(families[0]))
    for font in font_manager.fontManager.ttflist if missing else ():
        if not font.name.startswith("Last Resort") and (has := missing & _characters(font.fname)):
            families.append(font.name)
            missing -= has
    if missing:
        characters = " ".join(map(chr, sorted(missing)))
        print(f"note: no font here has {characters}; boxes stand for them in pictures")
    return families


def _characters(path: str) -> set[int]:
    try:
        font = font_manager.get_font(path)
        font.set_size(9, 100)
        return set(font.get_charmap())
    except Exception:  # fonts that Matplotlib cannot draw, such as coloured emoji
        return set()


@contextmanager
def style(texts: Iterable[str]) -> Iterator[None]:
    """Draw in this file's style, with fonts for these texts."""
    with warnings.catch_warnings(), plt.rc_context():
        matplotlib.rcdefaults()  # a user's own style may need LaTeX
        plt.rcParams.update({**STYLE, "font.family": fonts_for(texts)})
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # fonts_for has said so
        yield


def layer_name(layer: str) -> str:
    """The name of a layer of ``Conv4`` in words; others as in the user's network."""
    name = "classifier" if layer == "cls" else layer.removeprefix("network.")
    return re.sub(r"^conv(?=\d+$)", "convolution ", name)


# ---- Numbers ----


def smooth(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Centred moving mean and standard deviation over ``width`` values.

    The window shrinks symmetrically at the start, where curves are steep; at the end only its right
    half is cut.

    Args:
        values: [N], NaN where nothing finite was logged.

    Returns:
        Two arrays [N].
    """
    reach = [min(width // 2, k) for k in range(len(values))]
    windows = [values[k - r : k + r + 1] for k, r in enumerate(reach)]
    finite = [w[np.isfinite(w)] if np.isfinite(w).any() else np.array([math.nan]) for w in windows]
    return np.array([w.mean() for w in finite]), np.array([w.std() for w in finite])


def settings(folder: Path) -> dict[str, object]:
    """A run's hyper-parameters, its mode and ``--transductive``, from its checkpoint or else the
    hyper-parameters from its tests; empty if it has neither.
    """
    with suppress(UserError):  # there is none, or it is not readable any more
        content = checkpoints.load(checkpoints.find_checkpoint(folder, LAST) or folder)
        found = {"mode": content.get("mode", "train"), **content.get("hyper_parameters", {})}
        return found | {"transductive": content.get("run_flags", {}).get("transductive", False)}
    known = (folder / RESULTS).exists()
    return read_results(folder)["training"]["hyper_parameters"] if known else {}


# ---- Pictures ----


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, with an SVG beside it, and close it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=150, metadata=metadata)
            with atomic_write(path.with_suffix(f".{kind}")) as file:
                file.write(drawn.getvalue())
    finally:
        plt.close(figure)


def curves(folder: Path) -> Figure:
    """Loss and accuracy over episodes."""
    events = read_metrics(folder)
    train = [e for e in events if e["event"] == "train"]
    val = [e for e in events if e["event"] == "val"]
    episode, validated = ([e["episode"] for e in of_kind] for of_kind in (train, val))
    known = settings(folder)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    for axis, key, label in zip(axes, ("loss", "accuracy"), ("loss", "accuracy, %"), strict=True):
        if n := known.get("n_class"):
            chance = math.log(n) if key == "loss" else 100 / n
            axis.axhline(chance, **GUESSING, label=f"guessing among {n} classes")
        values = np.array([e[f"mean_{key}"] for e in train], dtype=float)
        mean, std = smooth(values, max(3, len(values) // 20))
        axis.fill_between(episode, mean - std, mean + std, color=BLUE, alpha=0.2, linewidth=0)
        words = "training, smoothed, ± std of the log's means"
        axis.plot(episode, mean, color=BLUE, marker="o" if len(mean) == 1 else None, label=words)
        if val:
            pairs = np.array([[e[key][k] for e in val] for k in ("mean", "ci95")], dtype=float)
            look = {"color": ORANGE, "fmt": "s--", "markersize": 3, "linewidth": 1, "capsize": 2}
            axis.errorbar(validated, *pairs, **look, label="validation, ± 95 %")
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        axis.xaxis.set_major_locator(ticks)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="batches" if known.get("mode") == "pretrain" else "episodes", ylabel=label)
    name = shorten(folder.resolve().name, 50)
    figure.suptitle(f"{name}: training{' and validation' if val else ''}")
    look = {"ncols": 3, "fontsize": 8, "title_fontsize": 8}
    inner_loop = known.get("method", "lstm") in ("lstm", "sgd", "meta-sgd")
    if val and inner_loop and not known.get("transductive"):
        look["title"] = (
            "Two measures: training normalises query images by their own batch's statistics, "
            "validation by the support set's."
        )
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", **look)
    return figure


def gates(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """Forget and input gates over the updates, layer by layer (compare the paper's figure 2)."""
    layers = trace["layers"]
    how = {"figsize": (max(7, 1 + 2 * len(layers)), 4.8), "sharex": True, "sharey": "row"}
    figure, axes = plt.subplots(2, len(layers), **how, squeeze=False)
    for row, (key, colour) in enumerate((("forget", BLUE), ("input", ORANGE))):
        gate = trace[key]  # [E, T, L, 6]
        t = np.arange(1, gate.shape[1] + 1)
        for k, layer in enumerate(layers):
            axis = axes[row, k]
            spread = gate[:, :, k, 1:].mean(0)
            for reach, alpha in ((0, 0.15), (1, 0.3)):
                band = spread[:, reach], spread[:, 4 - reach]
                axis.fill_between(t, *band, color=colour, alpha=alpha, linewidth=0)
            axis.plot(t, gate[:, :, k, 0].T, color=GREY, linewidth=0.5, alpha=0.4)
            axis.plot(t, gate[:, :, k, 0].mean(0), color=colour, marker="o", markersize=3)
            if row == 0:
                axis.set_title(shorten(layer_name(layer), 24))
            else:
                axis.set_xlabel("update")
                axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[row, 0].set_ylabel(f"{key} gate")
    figure.suptitle(f"{shorten(name, 30)}: gates, layer by layer")
    words = "line: mean of a layer's coordinates; bands: their quartiles and "
    words += f"{QUANTILES[0]:.0%} to {QUANTILES[-1]:.0%}; thin: one episode each"
    figure.supxlabel(words, fontsize=8, color=GREY)
    return figure


def movement(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """How far each layer has moved from cI."""
    moved = trace["moved"].mean(0)
    figure, axis = plt.subplots(figsize=(7, 3.6))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(trace["layers"])))
    for k, (layer, colour) in enumerate(zip(trace["layers"], colours, strict=True)):
        look = {"color": colour, "linestyle": ("-", "--", "-.", ":")[k % 4]}
        look |= {"marker": "os^Dv"[k % 5], "markersize": 4, "label": shorten(layer_name(layer), 24)}
        axis.plot(np.arange(1, len(moved) + 1), 100 * moved[:, k], **look)
    axis.set(xlabel="update", title=f"{shorten(name, 36)}: movement, layer by layer", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(r"$|\mathit{c_t} - \mathit{cI}|\ /\ |\mathit{cI}|$, %", parse_math=True)
    axis.yaxis.set_major_formatter("{x:g}")
    # the usual one writes formulas, which STYLE forbids
    axis.yaxis.set_minor_formatter(LogFormatter())
    figure.legend(loc="outside right upper", fontsize=8, handlelength=3)
    return figure


def adaptation(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """The learner's accuracy before the first update and after each."""
    n = len(trace["classes"])
    figure, axis = plt.subplots(figsize=(6, 3.8))
    axis.axhline(100 / n, **GUESSING, label=f"guessing among {n} classes")
    for key, colour, look in (("support", GREEN, "s--"), ("query", BLUE, "o-")):
        mean, half = trace[key].mean(0), 1.96 * trace[key].std(0) / math.sqrt(len(trace[key]))
        t = np.arange(len(mean))
        axis.fill_between(t, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        axis.plot(t, mean, look, color=colour, markersize=3, label=f"{key} set")
    axis.set(ylabel="accuracy, %", ylim=(0, 102))
    axis.set_xlabel(r"update (0: the learner at $\mathit{cI}$)", parse_math=True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    words = f"the learner in {len(trace['query'])} validation episodes, ± 95 %"
    axis.set_title(f"{shorten(name, 30)}: {words}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def histogram(folder: Path) -> Figure:
    """Test accuracies, one per episode; a row for each test."""
    content = read_results(folder)
    tests, trained_on = content["tests"], content["training"]["hyper_parameters"].get("n_shot")
    size = (6, 1.6 + 1.4 * len(tests))
    figure, axes = plt.subplots(len(tests), figsize=size, sharex=True, squeeze=False)
    for axis, test in zip(axes[:, 0], tests, strict=True):
        s, values = summary(test["accuracies"]), np.array(test["accuracies"])
        axis.hist(values, bins=_bins(values), color=BLUE, alpha=0.6)
        axis.axvline(s["mean"], color="black", linestyle="--", linewidth=1, label="mean")
        n = test["n_class"]
        axis.axvline(100 / n, **{**GUESSING, "linewidth": 1.5}, label=f"guessing among {n} classes")
        title = f"{test['n_shot']}-shot, {shorten(test['data'], 20)}, after {test['episode']:,} "
        title += f"episodes: {s['mean']:.2f} ± {s['ci95']:.2f} %"
        axis.set_title("\n".join(filter(None, (title, variant(test)))), loc="left")
        axis.set_ylabel("test episodes")
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes[-1, 0].set(xlabel="accuracy of an episode, %", xlim=(-2, 102))
    shots = f" (trained on {trained_on}-shot)" if trained_on else ""
    figure.suptitle(f"{shorten(folder.resolve().name, 34)}{shots}: test accuracies")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _bins(values: np.ndarray) -> np.ndarray:
    """Edges some 4 % apart, each bin with the same number of the values that an episode's accuracy
    can take.
    """
    steps = np.diff(np.unique(values.round(3)))
    step = steps.min() if len(steps) else 4.0
    return np.arange(-step / 2, 100 + 4 + step, step * max(1, round(4 / step)))


def confusion(name: str, trace: dict[str, np.ndarray]) -> Figure:
    """One episode's query images by true and predicted class."""
    images, pairs = trace["images"], trace["confusion"]
    names = [shorten(display_name(str(c)), 18) for c in trace["classes"]]
    n, size = len(names), images.shape[1]
    # room for all images of a class in one cell
    side = math.ceil(math.sqrt(np.bincount(pairs[:, 0]).max()))
    figure, axes = plt.subplots(n, n, figsize=(1.5 * n + 0.8, 1.5 * n + 1.1), squeeze=False)
    for right in range(n):
        for given in range(n):
            axis = axes[right, given]
            these = images[(pairs[:, 0] == right) & (pairs[:, 1] == given)]
            if len(these):
                sheet = np.full((side * side, size, size, 3), 255, dtype=np.uint8)
                sheet[: len(these)] = these
                rows = [np.hstack(sheet[k : k + side]) for k in range(0, len(sheet), side)]
                axis.imshow(np.vstack(rows), interpolation="nearest")
            axis.set(xticks=[], yticks=[], box_aspect=1)
            axis.grid(False)
            colour, width = (GREEN, 2.5) if right == given else ("#bbbbbb", 0.8)
            for spine in axis.spines.values():
                spine.set(visible=True, color=colour, linewidth=width)
            axis.set_title(str(len(these)), fontsize=8, pad=2)
            if given == 0:
                axis.set_ylabel(names[right], fontsize=8)
            if right == n - 1:
                axis.set_xlabel(names[given], fontsize=8)
    share = (pairs[:, 0] == pairs[:, 1]).mean()
    words = f"query images of one validation episode, {share:.0%} right"
    figure.suptitle(f"{shorten(name, 14 * n - 18)}\n{words}", fontsize=10)
    figure.supylabel("true class", fontsize=9)
    figure.supxlabel("the learner's answer", fontsize=9)
    return figure
