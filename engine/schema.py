"""Checks of what is read from files."""

from __future__ import annotations

import math
from typing import Any


def fits(value: Any, schema: Any) -> bool:
    """Whether a value, read from a file, matches a schema.

    A schema is None; a type, where float admits any number that fits into one; a predicate; a list
    with the schema of all items; a dict with the schemas of some entries, which may be missing if
    their name ends in "?"; {str: schema of all entries}; or a tuple of alternatives.
    """
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(each, schema[0]) for each in value)
    if isinstance(schema, dict) and isinstance(value, dict):
        if schema.keys() == {str}:
            return fits(list(value), [str]) and fits(list(value.values()), [schema[str]])
        return all(
            fits(value[key], each) if (key := name.rstrip("?")) in value else name.endswith("?")
            for name, each in schema.items()
        )
    if schema is None or isinstance(schema, dict):
        return value is schema
    if schema is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)
    return isinstance(value, schema) if isinstance(schema, type) else schema(value)


def finite(value: Any) -> bool:
    """Whether it is a number, and finite."""
    return fits(value, float) and math.isfinite(value)
