"""Plain words for classes that are known by their WordNet number only."""

from __future__ import annotations

import functools
import json

from engine.flags import ROOT


@functools.cache
def _known() -> dict[str, str]:
    return json.loads((ROOT / "data" / "splits" / "class-names.json").read_text(encoding="utf-8"))


def plain(name: str) -> str:
    """What a class is called: "house finch" for n01532829, of mini-ImageNet and tiny64; any other
    name stays as it is.
    """
    return _known().get(name, name)
