"""Settings of the algorithms: frozen records, made once from a recipe's JSON options and checked as they are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeAlias, TypeVar

from ..errors import RequestError, did_you_mean

JsonOptions: TypeAlias = Mapping[str, Any]  # {option: JSON value}, as a user gives them

T = TypeVar("T")
S = TypeVar("S", bound="Settings")


def setting(
    default: T,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    option: str | None = None,
) -> T:
    """A field of Settings: dataclasses.field, with what values it takes. Its type is that of the default.

    low, high: both included. option: what JSON calls it, where that is not the field's own name.
    """
    return field(default=default, metadata={"low": low, "high": high, "choices": tuple(choices), "option": option})


@dataclass(frozen=True, slots=True)
class Settings:
    """A record whose fields are options. RequestError names the option, what was found and what it takes."""

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))

    def options(self) -> Iterator[tuple[str, Any, Any]]:
        """(option, value, default) of every setting."""
        for one in fields(self):
            yield option_name(one), getattr(self, one.name), one.default


def option_name(one: Field[Any]) -> str:
    return one.metadata.get("option") or one.name


def parse_settings(kind: type[S], options: JsonOptions) -> S:
    """`kind` with the settings that `options` names; options of other algorithms are left to them."""
    return kind(**{one.name: options[option_name(one)] for one in fields(kind) if option_name(one) in options})


def check_options(options: JsonOptions, kinds: Sequence[type[Settings]]) -> None:
    """RequestError for an option that none of `kinds` has, or for a value that one of them does not take."""
    known = {option_name(one) for kind in kinds for one in fields(kind)}
    strangers = [name for name in options if name not in known]
    if strangers:
        raise RequestError(
            f": there is no option {strangers[0]!r}.{did_you_mean(strangers[0], known)} Known options: "
            f"{', '.join(sorted(known))}.",
            "options",
        )
    for kind in kinds:
        parse_settings(kind, options)


def _checked(one: Field[Any], value: Any) -> Any:
    name, default, wanted = option_name(one), one.default, type(one.default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is bool and not isinstance(value, bool):
        raise RequestError(f"{name}: found {value!r}, needs true or false, in small letters.", "options")
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise RequestError(
            f"{name}: found {value!r}, needs a value of type {wanted.__name__} like {default!r}.", "options"
        )
    choices, low, high = (one.metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise RequestError(f"{name}: found {value!r}. Choose one of {', '.join(choices)}.", "options")
    if (low is not None and value < low) or (high is not None and value > high):
        raise RequestError(f"{name}: found {value}, needs {_span(low, high)}.", "options")
    return value


def _span(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"{low} to {high}"
