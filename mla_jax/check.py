"""What every config asks of a value, and the words in which it says no."""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ValueError with the key, its value and what may be, unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}={value!r}: {key} must be {allowed}.")


def check_choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Raises ValueError unless the value is one of those allowed; it proposes the nearest."""
    if not isinstance(value, str) or value not in allowed:  # an array would compare by element
        hint = nearest(value, allowed)
        raise ValueError(f"{key}={value!r:.80}: {key} must be one of {', '.join(allowed)}.{hint}")


def check_counts(**counts: object) -> None:
    """Raises ValueError unless every value is a positive whole number."""
    for key, value in counts.items():
        positive = isinstance(value, int) and is_int(value) and value > 0
        check(positive, key, value, "a positive whole number")


def check_keys(given: Mapping[str, Any], cls: type, where: str) -> None:
    """Raises ValueError for a key that is no field of the dataclass; `where` it was found."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            hint = nearest(key, known)
            raise ValueError(f"{where} has the unknown key {key!r}.{hint} Known: {known}.")


def nearest(word: object, known: Collection[str]) -> str:
    """A sentence that proposes the known word nearest to one that is not; empty where none is.

    >>> nearest("absorbd", ("absorbed", "expanded"))
    " Did you mean 'absorbed'?"
    """
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
