"""Pickles of NumPy arrays and plain containers, and of nothing else.

A pickle is a program. This reader runs it with every global replaced by a stand-in of ours: `numpy.ndarray` and
`numpy.dtype` become records that are turned into arrays by `as_array`, so that neither a foreign function nor NumPy's
own unpickling code is ever called.
"""

import collections
import pickle
import re

import numpy as np
from sources import DataError


class _DType:
    """Stand-in of numpy.dtype: the type's code and byte order."""

    def __init__(self, code, *_):
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "|"

    def __setstate__(self, state):
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else order

    def numpy(self):
        if not (isinstance(self.code, str) and re.fullmatch(r"[|<>=]?[biufSU]\d+", self.code)):
            raise pickle.UnpicklingError(f"an array of type {str(self.code)[:40]!r}")
        code = self.code.lstrip("|<>=")
        return np.dtype(code if self.order not in ("<", ">") else self.order + code)


class _Array:
    """Stand-in of numpy.ndarray: shape, type, memory order and the bytes."""

    shape, dtype, fortran, raw = (0,), None, False, b""

    def __setstate__(self, state):
        self.shape, self.dtype, self.fortran, self.raw = state[-4:]


def _reconstruct(*_):
    return _Array()


def _frombuffer(raw, dtype, shape, order):
    array = _Array()
    array.__setstate__((shape, dtype, order in ("F", b"F"), raw))
    return array


def _scalar(dtype, raw):
    return _frombuffer(raw, dtype, (), "C")


def _encode(text, encoding):
    """Python 3 writes bytes in this way when it is asked for protocol 2 or less."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text encoded as {str(encoding)[:40]!r}")
    return text.encode("latin1")


_CONTAINERS = {name: getattr(__import__("builtins"), name) for name in ("list", "dict", "set", "tuple", "bytearray")}
_ADMITTED = {
    **{("builtins", name): kind for name, kind in _CONTAINERS.items()},
    **{("__builtin__", name): kind for name, kind in _CONTAINERS.items()},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 2 moved its core
    _ADMITTED[_core + ".multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[_core + ".multiarray", "scalar"] = _scalar
    _ADMITTED[_core + ".numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def load(file, shown):
    """Read one pickle, written by Python 2 or 3.

    Args:
        file: binary file, at the pickle's first byte.
        shown: what to call it in an error.

    Returns:
        Plain containers; arrays in them are stand-ins for `as_array`; text from Python 2 is bytes.

    Raises:
        DataError: the file is no pickle, is truncated, or holds anything but arrays and plain containers.
    """
    try:
        # encoding="bytes": as latin1 text, Python 2's array would be held twice
        return _Unpickler(file, encoding="bytes").load()
    except MemoryError:
        raise DataError(f"{shown}: does not fit into memory") from None
    except Exception as error:  # a hostile pickle can raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = str(error)[:200] or type(error).__name__
        raise DataError(
            f"{shown}: refused, not a pickle of NumPy arrays and plain containers ({what}): get another copy"
        ) from None


def as_text(value):
    """bytes (Python 2's str) -> str; other values unchanged."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def as_dict(value, shown):
    """A dict with its keys as text.

    Raises:
        DataError: `value` is no dict.
    """
    if not isinstance(value, dict):
        raise DataError(f"{shown}: holds a {type(value).__name__.strip('_').lower()} where a dict was expected")
    return {as_text(key): item for key, item in value.items()}


def as_array(value, shown):
    """A pickled array, list or tuple of numbers or names as an ndarray (a view of the pickle's bytes where possible).

    Raises:
        DataError: it is none, or its bytes do not fill its shape.
    """
    try:
        if isinstance(value, _Array):
            if isinstance(value.raw, list):  # an array of Python objects
                return np.array([_item(item) for item in value.raw])
            order = "F" if value.fortran else "C"
            return np.frombuffer(value.raw, value.dtype.numpy()).reshape(value.shape, order=order)
        if isinstance(value, list | tuple | set):
            return np.array([_item(item) for item in value])
    except Exception as error:  # a forged shape, type or byte count
        raise DataError(f"{shown}: its array is damaged ({str(error)[:100]})") from None
    raise DataError(f"{shown}: holds a {type(value).__name__.strip('_').lower()} where an array was expected")


def _item(value):
    return as_array(value, "an item").item() if isinstance(value, _Array) else as_text(value)
