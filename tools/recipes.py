"""The recipes, as ``scripts/train_*.sh`` define them, and a name for what any run did."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable

from engine.flags import DEFAULTS, HYPER_PARAMETERS, ROOT, parse, spelled
from utils import UserError

_SCRIPT = re.compile(r"train_(\d+)s_5c(?:_(\w+))?\.sh")


@functools.cache
def scripts() -> dict[tuple[str, int], dict[str, object]]:
    """The flags that each recipe's script gives, by the recipe's name and its number of shots.

    Raises:
        UserError: a script has flags that cannot be parsed; it is named.
    """
    found = {}
    for path in sorted((ROOT / "scripts").glob("train_*.sh")):
        if match := _SCRIPT.fullmatch(path.name):
            command = path.read_text(encoding="utf-8").partition('main.py"')[2]
            try:
                words = shlex.split(command.replace("\\\n", " "), comments=True)
                flags = parse([word for word in words if not word.startswith("$")])
            except (UserError, ValueError) as e:
                raise UserError(f"{path}: {e}") from e
            found[match[2] or "port", int(match[1])] = flags
    return found


def recipes() -> dict[tuple[str, int], dict[str, object]]:
    """Each recipe's hyper-parameters, by its name and its number of shots."""
    given = {key: {**DEFAULTS, **flags} for key, flags in scripts().items()}
    return {key: {k: flags[k] for k in HYPER_PARAMETERS} for key, flags in given.items()}


def recipe_name(
    hyper_parameters: dict[str, object], late: Iterable[str] = (), since: int = 0
) -> str:
    """Name the nearest recipe, with the differences from it.

    Args:
        hyper_parameters: of a run.
        late: names of those that it has only had after ``since`` episodes.
    """
    if not hyper_parameters or not scripts():
        return "unknown"
    own, late = {k: DEFAULTS[k] for k in HYPER_PARAMETERS} | hyper_parameters, set(late)
    apart = set(HYPER_PARAMETERS) - {"seed", "n_class", "n_shot", "input_size"}
    shots = 1 if own["n_shot"] == 1 else 5
    differ = {
        name: {k for k in apart if own[k] != values[k]}
        for (name, of), values in recipes().items()
        if of == shots
    }
    name = min(differ, key=lambda name: len(differ[name]))
    changes = [
        f"{spelled(k)[2:]} {text(own[k])}" + f" only after {since:,} episodes" * (k in late)
        for k in HYPER_PARAMETERS
        if k in differ[name] | late
    ]
    return name + (", but " + ", ".join(changes) if changes else "")


def starts_from(name: str, shots: int) -> str:
    """The ``--init-from`` of a recipe's script, or nothing."""
    return str(scripts().get((name, 1 if shots == 1 else 5), {}).get("init_from", ""))


def text(value: object) -> str:
    """A hyper-parameter's value as one types it after its flag."""
    return " ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
