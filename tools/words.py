"""Texts for consoles, tables and pictures."""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

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
    """Words that a picture can hold: printable, and if too long, without their middle.

    Args:
        width: the most characters; wide ones, such as Chinese, count twice.
    """
    text = "".join(c if c.isprintable() else "?" for c in printable(text))
    sizes = [1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(sizes) <= width:
        return text
    left, right = np.cumsum(sizes), np.cumsum(sizes[::-1])
    head, tail = (left <= width // 2).sum(), (right <= width - width // 2 - 1).sum()
    return text[:head] + "…" + text[len(text) - tail :]


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Format a table, one line per row; a cell is written as ``str`` does."""
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "-|" * len(header), *lines[1:]])
