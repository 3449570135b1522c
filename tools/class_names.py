"""Names for classes that are known by their WordNet number only."""

from __future__ import annotations

import functools
import json

from engine.flags import ROOT


@functools.cache
def _names() -> dict[str, str]:
    return json.loads((ROOT / "data" / "splits" / "class-names.json").read_text(encoding="utf-8"))


def display_name(name: str) -> str:
    """Name a class of mini-ImageNet or tiny64 ("house finch" for n01532829); others stay."""
    return _names().get(name, name)
