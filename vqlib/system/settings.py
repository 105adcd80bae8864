"""Frozen dataclasses whose fields are checked when they are made, and the converters that check them."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from typing import Any

import numpy as np


class Settings:
    """Checked when made: every number is of its field's type and finite; `to_dict` is JSON-safe, `from_dict` its inverse.

    NumPy's numbers are as good as Python's. ValueError names the setting and the value that cannot be it.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or "None" not in str(field.type):
                kind = str(field.type).removesuffix(" | None")
                object.__setattr__(self, field.name, AS[kind](field.name, value))
        self._check()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}")
        return cls(**values)

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def _one_of(self, name: str, allowed: tuple) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}")

    def _positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def as_seed(name: str, value: Any) -> int:
    """A seed as a Python int, 0 … 2³² − 1: torch's CPU generator looks at no more bits, so larger ones would be equal."""
    seed = as_integer(name, value)
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name}={seed} is outside 0 … 2**32 - 1")
    return seed


def as_integer(name: str, value: Any) -> int:
    """An integer, NumPy's too, as Python's. ValueError naming what is none, bools and whole floats among them."""
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):  # NumPy's, torch's
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not an integer") from None


def _real(name: str, value: Any) -> float:
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (numbers.Real, np.number))
        or not math.isfinite(value)
    ):
        raise ValueError(f"{name}={value!r} is not a finite number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} is neither True nor False")
    return bool(value)


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} is not a word")
    return str(value)


def _layer_rules(name: str, value: Any) -> tuple[tuple[str, int, int], ...]:
    """Tuples again, after JSON's lists."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(r, (list, tuple)) and len(r) == 3 for r in value):
        raise ValueError(f"{name}={value!r} is not a list of (pattern, k, d)")
    return tuple(
        (_word(name, p), as_integer(f"{name} {p}: k", k), as_integer(f"{name} {p}: d", d)) for p, k, d in value
    )


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """A tuple again, after JSON's list; one word alone would be taken for its letters."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}={value!r} is not a list of patterns")
    return tuple(_word(name, pattern) for pattern in value)


AS = {"int": as_integer, "float": _real, "bool": _flag, "str": _word, "LayerRules": _layer_rules, "Patterns": _patterns}
