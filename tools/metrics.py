"""A run's ``metrics.jsonl``, which ``engine/logger.py`` writes."""

from __future__ import annotations

import json
from pathlib import Path

from utils import UserError

NAME = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict]:
    """Read a run's events in order, without a last line that was cut off.

    Raises:
        UserError: the file cannot be read, or no training is logged there.
    """
    path, events = folder / NAME, []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); name a run folder") from e
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    try:
        sound = all(map(_is_sound, events))
    except (KeyError, TypeError, AttributeError):  # a part is missing
        sound = False
    if not sound:
        raise UserError(f"{path}: holds what no training logs; name another run")
    if not any(e["event"] == "train" for e in events):
        raise UserError(f"{path}: no episode of training is logged there yet")
    return events


def _is_sound(event: dict) -> bool:
    """Whether an event has what it is read for; missing parts may raise."""
    if event["event"] == "train":
        numbers = [event["mean_loss"], event["mean_accuracy"], event["time"]["seconds"]]
        sound = event["time"]["episodes_per_second"] > 0
    elif event["event"] == "val":
        numbers = [event[name][k] for name in ("loss", "accuracy") for k in ("mean", "ci95")]
        numbers, sound = numbers + event.get("accuracies", []), True
    else:
        return True
    sound = sound and all(isinstance(x, (int, float)) for x in numbers)
    return sound and isinstance(event["episode"], int)
