"""Accuracies on the same episodes, and their paired differences, as cells of a table."""

from __future__ import annotations

from engine.logger import summary


def interval(accuracies: list[float], sign: str = "") -> str:
    """Mean ± half-width of the 95 % interval over episodes."""
    found = summary(accuracies)
    return f"{found['mean']:{sign}.2f} ± {found['ci95']:.2f}"


def difference(accuracies: list[float], first: list[float]) -> str:
    """The mean difference from ``first``, episode by episode, and its interval."""
    return interval([a - b for a, b in zip(accuracies, first, strict=True)], "+")
