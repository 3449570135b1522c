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
    if not any(e["event"] == "train" for e in events):
        raise UserError(f"{path}: no episode of training is logged there yet")
    return events
