"""Reads pickles of NumPy arrays and plain containers, and refuses all others.

A pickle is a program. This reader replaces every global in it by a stand-in, so neither a foreign
function nor NumPy's own unpickling code is called."""

from __future__ import annotations

import collections
import pickle
import re
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from utils import UserError


class _DType:
    """Stand-in for numpy.dtype: the type's code and byte order."""

    order = "|"

    def __init__(self, code: str | bytes, *_: Any):
        self.code = _as_text(code)

    def __setstate__(self, state: tuple) -> None:
        self.order = _as_text(state[1])

    def numpy(self) -> np.dtype:
        if not re.fullmatch(r"[|<>=]?[biufSU]\d+", self.code):
            raise pickle.UnpicklingError(f"an array of type {self.code[:40]!r}")
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass
class _Array:
    """Stand-in for numpy.ndarray: shape, type, memory order and the bytes."""

    shape: Any = (0,)
    dtype: Any = None
    fortran: Any = False
    raw: Any = b""

    def __setstate__(self, state: tuple) -> None:
        self.shape, self.dtype, self.fortran, self.raw = state[-4:]


def _encode(text: str, encoding: str | bytes) -> bytes:
    """Stand-in for codecs.encode, with which Python 3 writes bytes in protocol 2 or less."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text encoded as {str(encoding)[:40]!r}")
    return text.encode("latin1")


_ADMITTED = {
    **{f"{m}.{t.__name__}": t for m in ("builtins", "__builtin__") for t in (list, dict, tuple)},
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.bytearray": bytearray,
    "_codecs.encode": _encode,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 2 moved its core
    _ADMITTED |= {
        f"{_core}.multiarray._reconstruct": lambda *_: _Array(),
        f"{_core}.multiarray.scalar": lambda dtype, raw: _Array((), dtype, False, raw),
        f"{_core}.numeric._frombuffer": lambda raw, dtype, shape, order: _Array(
            shape, dtype, order in ("F", b"F"), raw
        ),
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ADMITTED[f"{module}.{name}"]


def load(file: IO[bytes], shown: str) -> dict[str, Any]:
    """Read a pickled dict, written by Python 2 or 3, from its first byte on.

    Returns:
        The dict, with keys as text. Arrays in it are stand-ins for `as_array`.

    Raises:
        UserError: the file, called ``shown``, is not a pickle, is truncated, or holds anything but
            arrays and plain containers.
    """
    try:
        # encoding="bytes": as latin1 text, Python 2's array would be in memory twice
        return as_dict(_Unpickler(file, encoding="bytes").load(), shown)
    except (MemoryError, OSError, UserError):
        raise
    except Exception as error:  # a hostile pickle can raise nearly anything
        what = str(error)[:200] or type(error).__name__
        refused = "refused, not a pickle of NumPy arrays and plain containers"
        raise UserError(f"{shown}: {refused} ({what})") from None


def as_dict(value: Any, shown: str) -> dict[str, Any]:
    """A pickled dict with its keys as text. Raises UserError if ``value`` is not a dict."""
    if not isinstance(value, dict):
        raise UserError(f"{shown}: is a {type(value).__name__.strip('_').lower()}, not a dict")
    return {_as_text(key): item for key, item in value.items()}


def as_array(value: Any, shown: str) -> np.ndarray:
    """A pickled array, list or tuple of numbers or names as an ndarray, without a copy where
    possible. Raises UserError if it is none of these, or its bytes do not fill its shape.
    """
    if isinstance(value, _Array) and isinstance(value.raw, list):
        value = value.raw  # an array of Python objects
    try:
        if isinstance(value, _Array):
            order = "F" if value.fortran else "C"
            return np.frombuffer(value.raw, value.dtype.numpy()).reshape(value.shape, order=order)
        if isinstance(value, list | tuple):
            scalars = (as_array(x, shown).item() if isinstance(x, _Array) else x for x in value)
            return np.array(list(map(_as_text, scalars)))
    except Exception as error:  # a forged shape, type or byte count
        raise UserError(f"{shown}: its array is damaged ({str(error)[:100]})") from None
    raise UserError(f"{shown}: is a {type(value).__name__.strip('_').lower()}, not an array")


def _as_text(value: Any) -> Any:
    """Python 2's str, which is bytes here, as str; other values unchanged."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
