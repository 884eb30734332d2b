"""Settings of the algorithms: JSON values in `Recipe.options`, read into each algorithm's own frozen dataclass."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ..errors import RequestError, did_you_mean

T = TypeVar("T")


def read_options(kind: type[T], options: dict[str, Any]) -> T:
    """The dataclass `kind` filled from `options`; keys of other algorithms are left to them.

    A field's metadata may hold `choices` (a tuple), or `low` and `high` (bounds, both included).
    RequestError names the option, what was found and what it takes.
    """
    found = {field.name: _checked(field, options[field.name]) for field in fields(kind) if field.name in options}
    return kind(**found)


def _checked(field: Any, value: Any) -> Any:
    default = field.default_factory() if field.default is MISSING else field.default
    wanted = type(default) if default is not None else str
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    choices, low, high = (field.metadata.get(key) for key in ("choices", "low", "high"))
    if value is None and default is None:
        return None
    if wanted is bool and not isinstance(value, bool):
        raise RequestError(f"option {field.name}: found {value!r}, needs true or false, in small letters.")
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise RequestError(
            f"option {field.name}: found {value!r}, needs a value of type {wanted.__name__} like {default!r}."
        )
    if choices and value not in choices:
        raise RequestError(f"option {field.name}: found {value!r}. Choose one of {', '.join(map(str, choices))}.")
    if (low is not None and value < low) or (high is not None and value > high):
        raise RequestError(f"option {field.name}: found {value}, needs {_span(low, high)}.")
    return value


def _span(low: Any, high: Any) -> str:
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"{low} to {high}"


def check_known(options: dict[str, Any], kinds: tuple[type, ...]) -> None:
    """RequestError for an option that no algorithm has; values are checked against every dataclass that has the key."""
    known = {field.name for kind in kinds for field in fields(kind)}
    strangers = [name for name in options if name not in known]
    if strangers:
        raise RequestError(
            f"there is no option {strangers[0]!r}.{did_you_mean(strangers[0], known)} Known options: "
            f"{', '.join(sorted(known))}."
        )
    for kind in kinds:
        read_options(kind, options)
