"""What the LSTM adds: its trained cI with other rules in its place, on the same test episodes.

    python benchmarks/gates.py logs-719 logs-1shot-719 --out what-the-lstm-adds --episode-test 300

For each run: the LSTM as trained; its gates frozen to their mean over validation episodes and the
coordinates of each parameter tensor, for each update or over all of them; and gradient descent,
with the one step size, then with the step size of each layer, that is most accurate on the
validation episodes. Step sizes are multiplied or divided by 2 as long as that helps, layers one
after the other. The differences from the LSTM are paired, with 95 % intervals over episodes. Writes
OUT.md and OUT.png. Other flags are main.py's, such as ``--data-root``; they follow the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from runs import difference, interval, load_run, runs_parser
from torch import Tensor

from data.layout import scan_split
from dataloader import EpisodeDataset
from engine.backend import Backend, dataset
from engine.evaluation import Evaluator
from engine.flags import parse, path
from engine.logger import summary
from engine.model import Model
from engine.process import run_main
from engine.stream import episodes
from episode import updates
from metalearner import UpdateRule
from tools.plots import load_figures
from tools.trace import layers
from tools.words import markdown_table
from utils import UserError


class FixedState(NamedTuple):
    """The state between two updates."""

    c: Tensor  # [P, 1], the learner's parameters
    t: int  # updates so far


class FixedGates(UpdateRule):
    """c_t = f_t * c_{t-1} - i_t * grad_t; the gates are given, [T, P, 1] or for all [1, P, 1]."""

    def __init__(self, trained: UpdateRule, f: Tensor, i: Tensor):
        super().__init__()
        self.cI, self.f, self.i = trained.initial_state().c.detach(), f, i
        self.grad_divisor, self.final_stats = trained.grad_divisor, trained.final_stats

    def initial_state(self) -> FixedState:
        """See ``UpdateRule.initial_state``."""
        return FixedState(self.cI, 0)

    def forward(self, loss: Tensor, grad: Tensor, state: FixedState) -> FixedState:
        """See ``UpdateRule.forward``."""
        f, i = (gate[min(state.t, len(gate) - 1)] for gate in (self.f, self.i))
        return FixedState(f * state.c - i * grad, state.t + 1)


@torch.no_grad()
def mean_gates(model: Model, val_set: EpisodeDataset, batch_size: int, device) -> Tensor:
    """Average f and i over a data set's episodes and each parameter tensor: [2, T, P, 1]."""
    learner, rule = model.learners[0], model.metalearner
    sizes = [shape.numel() for _, _, shape in learner.slots]
    total: Any = 0
    for episode in episodes(val_set, 0, 0, device, False):
        steps = [s for _, s in updates(model.embed(episode), learner, rule, batch_size)]
        total = total + torch.stack([torch.stack([s.f, s.i]).sigmoid() for s in steps], dim=1)
    parts = (total / len(val_set)).split(sizes, dim=2)  # [2, T, size, 1] each
    return torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in parts], dim=2)


def climb(
    score: Callable[[list[float]], float], steps: list[float], groups: list[list[int]]
) -> list[float]:
    """Multiply or divide by 2 the steps of each group in turn, as long as the score rises."""
    best = score(steps)
    for group in groups:
        start = steps
        for factor in (2.0, 0.5):
            while True:
                tried = [s * factor if k in group else s for k, s in enumerate(steps)]
                if (found := score(tried)) <= best:
                    break
                best, steps = found, tried
            if steps is not start:
                break
    return steps


def rules(
    model: Model, args: argparse.Namespace, backend: Backend, val_set: EpisodeDataset
) -> Iterator[tuple[str, UpdateRule]]:
    """Yield each rule's name and the rule, one after another, for they take time to find."""
    trained = model.metalearner
    yield "the LSTM as trained", trained
    f, i = mean_gates(model, val_set, args.batch_size, backend.device)
    frozen = "its gates frozen to their mean over each tensor"
    yield f"{frozen}, by update", FixedGates(trained, f, i)
    f, i = (gate.mean(0, keepdim=True) for gate in (f, i))
    yield f"{frozen} and all updates", FixedGates(trained, f, i)
    places, one = layers(model.learners[0]), torch.ones_like(i)

    def descent(steps: list[float]) -> FixedGates:
        sizes = torch.tensor([place.stop - place.start for place in places.values()])
        values = torch.tensor(steps).repeat_interleave(sizes).to(i).view(1, -1, 1)
        return FixedGates(trained, one, values)

    def score(steps: list[float]) -> float:
        rule = replace(model, metalearner=descent(steps))
        return summary(Evaluator(args, backend, rule)(val_set)[1])["mean"]

    everything = list(range(len(places)))
    steps = climb(score, [float(i.mean())] * len(places), [everything])
    yield f"gradient descent, one step size ({steps[0]:.3g})", descent(steps)
    steps = climb(score, steps, [[k] for k in everything])
    shown = ", ".join(f"{name} {s:.3g}" for name, s in zip(places, steps, strict=True))
    yield f"gradient descent, a step size per layer ({shown})", descent(steps)


def compare(run: str, flags: dict) -> tuple[str, list[tuple[str, list[float]]]]:
    """Test all rules on a run's cI; its title, and each rule's name and accuracies in %.

    Raises:
        UserError: there is no checkpoint, or it is not one of the paper's method.
    """
    args, _, backend, model = load_run(run, flags)
    if args.method not in ("lstm", "linear-head"):
        raise UserError(f"{run}: is of --method {args.method}, which has no gates to freeze")
    val_set, test_set = (
        dataset(args, backend, scan_split(args.data_root, split), n)
        for split, n in (("val", args.episode_val), ("test", max(args.episode_test)))
    )
    found = []
    for name, rule in rules(model, args, backend, val_set):
        tested = Evaluator(args, backend, replace(model, metalearner=rule))(test_set)[1]
        found.append((name, tested))
        print(f"{args.n_shot}-shot: {name}: {interval(tested)}", file=sys.stderr)
    title = f"{Path(run).name}, {args.n_class}-way {args.n_shot}-shot, {len(tested)} test episodes"
    return f"{title}, chosen on {len(val_set)} validation episodes", found


def table(title: str, found: list[tuple[str, list[float]]]) -> str:
    """The title of one run and its table, a row for each rule."""
    (name, first), *others = found
    rows = [(name, interval(first), "")]
    rows += [(name, interval(a), difference(a, first)) for name, a in others]
    header = ("rule, from the same cI", "accuracy, %", "difference from the LSTM")
    return f"{title}:\n\n{markdown_table(header, rows)}\n"


def draw(runs: list[tuple[str, list[tuple[str, list[float]]]]], out: Path) -> None:
    """Draw the differences from the LSTM with their intervals, a colour for each run."""
    figures = load_figures()
    with figures.style([]):
        figure, axis = figures.plt.subplots(figsize=(7, 4))
        for k, (title, ((_, first), *others)) in enumerate(runs):
            names = [fill(name.partition(" (")[0], 30) for name, _ in others]
            spans = [summary([a - b for a, b in zip(v, first, strict=True)]) for _, v in others]
            means, halves = ([s[key] for s in spans] for key in ("mean", "ci95"))
            heights = [row + 0.15 * (k - (len(runs) - 1) / 2) for row in range(len(names))]
            look = {"fmt": "o", "color": f"C{k}", "markersize": 4, "capsize": 3}
            axis.errorbar(means, heights, xerr=halves, **look, label=title.partition(",")[0])
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.axvline(0, color=figures.GREY, linewidth=1)
        axis.set_xlabel("difference from the LSTM, percentage points, ± 95 %")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        figure.savefig(out, dpi=150)


def main(argv: list[str]) -> int:
    parser = runs_parser(__doc__)
    words = "writes OUT.md and OUT.png"
    parser.add_argument("--out", default="gates", type=path, metavar="PATH", help=words)
    args, others = parser.parse_known_args(argv)
    done, flags, out = [], parse(others), Path(args.out)
    if not out.name or not out.parent.is_dir():
        raise UserError(f"--out {args.out}: give a name in a folder that exists")
    load_figures()  # to fail now, not after the tests
    for run in args.runs:
        done.append(compare(run, flags))
        tables = [table(*each) for each in done]
        print(tables[-1], flush=True)
        Path(f"{out}.md").write_text("\n".join(tables), encoding="utf-8")
        draw(done, Path(f"{out}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
