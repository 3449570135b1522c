"""Texts for consoles, tables and pictures."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence

from engine.flags import ROOT


@functools.cache
def _names() -> dict[str, str]:
    return json.loads((ROOT / "data" / "splits" / "class-names.json").read_text(encoding="utf-8"))


def display_name(name: str) -> str:
    """Name a class of mini-ImageNet or tiny64 ("house finch" for n01532829); others stay."""
    return _names().get(name, name)


def printable(text: str) -> str:
    """A text with escapes for what cannot be encoded: file names may hold bytes of any kind."""
    return text.encode("utf-8", "backslashreplace").decode()


def shorten(text: str, width: int) -> str:
    """Words that a picture can hold: printable, and ``width`` characters without their middle."""
    text = "".join(c if c.isprintable() else "?" for c in printable(text))
    half = width // 2
    return text if len(text) <= width else f"{text[:half]}…{text[half + 1 - width :]}"


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Format a table, one line per row; a cell is written as ``str`` does."""
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "-|" * len(header), *lines[1:]])
