"""The recipes that the scripts define, and a name for any run after the nearest of them."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable

from engine.flags import (
    DEFAULTS,
    HYPER_PARAMETERS,
    ROOT,
    comparable,
    completed,
    flag_name,
    flag_value,
    parse,
)
from utils import UserError

_SCRIPT = re.compile(r"(?:train|baseline)_(\d+)s_5c(?:_(\w+))?\.sh")


@functools.cache
def scripts() -> dict[tuple[str, int], dict[str, object]]:
    """The flags that each recipe's script gives, by the recipe's name and its number of shots.

    Raises:
        UserError: a script has flags that cannot be parsed; it is named.
    """
    found = {}
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        if match := _SCRIPT.fullmatch(path.name):
            command = path.read_text(encoding="utf-8").partition("run_main ")[2]
            try:
                words = shlex.split(command.replace("\\\n", " "), comments=True)
                flags = parse([word for word in words if not word.startswith("$")])
            except (UserError, ValueError) as e:
                raise UserError(f"{path}: {e}") from e
            found[(match[2] or "port").replace("_", "-"), int(match[1])] = flags
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
        late: names of those that changed after ``since`` episodes.
    """
    if not hyper_parameters or not scripts():
        return "unknown"
    own, late = completed(hyper_parameters), set(late)
    apart = set(HYPER_PARAMETERS) - {"seed", "n_class", "n_shot", "input_size"}
    found = recipes()
    differ = {
        name: {k for k in apart if own[k] != found[_key(name, own["n_shot"])][k]}
        for name, _ in found
    }
    name = min(differ, key=lambda name: ("method" in differ[name], len(differ[name])))
    changes = [
        f"{flag_name(k)[2:]} {text(own[k])}" + f" only after {since:,} episodes" * (k in late)
        for k in HYPER_PARAMETERS
        if k in differ[name] | late
    ]
    return name + (", but " + ", ".join(changes) if changes else "")


def starts_from(name: str, shots: int) -> str:
    """The ``--init-from`` of a recipe's script, or nothing."""
    return str(scripts().get(_key(name, shots), {}).get("init_from", ""))


def _key(name: str, shots: object) -> tuple[str, int] | None:
    """The key of recipe ``name``: for 1-shot or several shots as asked, else for the other."""
    keys = [key for key in scripts() if key[0] == name]
    return min(keys, key=lambda key: (key[1] == 1) != (shots == 1), default=None)


def text(value: object) -> str:
    """A hyper-parameter's value as one types it after its flag; a learner's without its file."""
    if isinstance(value, list):
        return " ".join(f"{v:g}" for v in value)
    return flag_value(comparable(value))
