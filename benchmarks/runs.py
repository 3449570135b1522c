"""The runs that a benchmark compares: their names on the command line, loading, and differences."""

from __future__ import annotations

from argparse import Namespace

from data.layout import check_splits
from engine.backend import Backend
from engine.checkpoint import trained_shots
from engine.evaluation import schedule
from engine.flags import Parser, flag_name, flag_value
from engine.logger import summary
from engine.model import Trainable
from main import load_model
from utils import UserError


def runs_parser(doc: str) -> Parser:
    """A parser of RUN...; the flags that it does not know are main.py's.

    Args:
        doc: the script's docstring, whose first line is the description.
    """
    parser = Parser(description=doc.partition("\n")[0], epilog="other flags: as main.py's")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or checkpoint")
    return parser


def load_run(run: str, flags: dict[str, object]) -> tuple[Namespace, dict, Backend, Trainable]:
    """Load a run as ``main.load_model`` does, with the schedule of its tests.

    Raises:
        UserError: a flag is not for comparisons; there is no checkpoint; or it was trained on
            classes of the validation or test split.
    """
    for name in ("mode", "resume", "save", "shots"):
        if name in flags:
            flag = f"{flag_name(name)} {flag_value(flags[name])}"
            raise UserError(f"{flag}: is not for comparisons; leave it out, and name runs alone")
    args, checkpoint, backend, model = load_model({**flags, "resume": run})
    check_splits(args.data_root, checkpoint.get("classes", ()), ("val", "test"))
    how = schedule(args, trained_shots(checkpoint, args), args.n_class * args.n_shot)
    args.batch_size, model.metalearner.grad_divisor = how
    return args, checkpoint, backend, model


def interval(accuracies: list[float], sign: str = "") -> str:
    """Mean ± half-width of the 95 % interval over episodes."""
    found = summary(accuracies)
    return f"{found['mean']:{sign}.2f} ± {found['ci95']:.2f}"


def difference(accuracies: list[float], first: list[float]) -> str:
    """The mean difference from ``first``, episode by episode, and its interval."""
    return interval([a - b for a, b in zip(accuracies, first, strict=True)], "+")
