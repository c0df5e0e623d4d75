"""Reading and checking a recipe's values: text, YAML or JSON to the types of the fields, mistakes collected.

Fields are described by their type hints alone, so that a new field needs nothing here.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.text import did_you_mean


def convert(value: Any, wanted: Any) -> Any:
    """Bring ``value`` (from YAML, JSON or a command line) to the type of a field; ValueError when it can't be."""
    if get_origin(wanted) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return convert(value, next(kind for kind in get_args(wanted) if kind is not type(None)))
    if get_origin(wanted) is tuple:
        return _convert_tuple(value, get_args(wanted))
    if get_origin(wanted) is dict:
        return _convert_mapping(value, get_args(wanted)[1])
    if get_origin(wanted) is Literal:
        return _convert_choice(value, get_args(wanted))
    if wanted is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return value.lower() in ("true", "yes", "on")
        if not isinstance(value, bool):
            raise ValueError
        return value
    if wanted is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = float(value)  # YAML 1.1 reads 1e-3, without a dot, as text
    if wanted is int:
        if not number.is_integer():
            raise ValueError
        return int(value) if isinstance(value, int) else int(number)
    return number


def settled(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Bring each field's value to its type; returns those that could be, and a mistake for each that could not."""
    values, mistakes = {}, []
    for name, value in fields.items():
        try:
            values[name] = convert(value, wanted[name])
        except (ValueError, OverflowError):
            mistakes.append(mistake(name, value, wanted[name]))
    return values, mistakes


def _convert_choice(value: Any, choices: tuple[str, ...]) -> str:
    if isinstance(value, bool):  # YAML 1.1 reads on and off as true and false
        value = "on" if value else "off"
    if not isinstance(value, str) or value not in choices:
        raise ValueError
    return value


def _convert_mapping(value: Any, kind: Any) -> dict[str, Any]:
    if isinstance(value, str):
        parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): number.strip() for name, _, number in parts}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise ValueError
    return {name: convert(item, kind) for name, item in value.items()}


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[\s,x×]+", value.strip("()[] ")) if part]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if kinds[-1] is Ellipsis:
        return tuple(convert(item, kinds[0]) for item in value)
    if len(value) != len(kinds):
        raise ValueError
    return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def mistake(name: str, value: Any, wanted: Any) -> str:
    """One line about a field's value that :func:`convert` refused."""
    close = did_you_mean(value, get_args(wanted)) if get_origin(wanted) is Literal and isinstance(value, str) else ""
    return f"{name}: expected {describe(wanted)}, got {value!r}{close}"


def describe(wanted: Any) -> str:
    """A field's type in words: ``a whole number or none``."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if get_origin(wanted) in (Union, types.UnionType):
        return f"{describe(next(k for k in get_args(wanted) if k is not type(None)))} or none"
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(get_args(wanted))}"
    if get_origin(wanted) is dict:
        return "names with numbers (lesion=3,liver=0.5)"
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        count = "any number" if kinds[-1] is Ellipsis else str(len(kinds))
        return f"{count} of: {names[kinds[0]]}"
    return names[wanted]


def raise_if_any(mistakes: list[str], where: str) -> None:
    """Raise all mistakes as one ConfigurationError, a line each, whose ``mistakes`` has them one by one."""
    if not mistakes:
        return
    if len(mistakes) == 1:
        raise ConfigurationError(f"{where}: {mistakes[0]}", mistakes=mistakes)
    lines = "".join(f"\n  {mistake}" for mistake in mistakes)
    raise ConfigurationError(f"{where}: {len(mistakes)} mistakes{lines}", mistakes=mistakes)
