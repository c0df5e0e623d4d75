"""Names of model repositories by the ivadomed convention: strict when writing, lenient with reasons when reading.

``model_task_anatomy_animal_pathology_condition_contrast_architecture``: ``_`` between fields, ``-`` between the values of
one field, and what is the default is left out. Source: ivadomed's guide to packaging deep learning models.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nnssl_adapt.errors import ConfigurationError

PREFIX = "model"
_VALUE = re.compile(r"[A-Za-z0-9]+")
_LEGAL = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class NameField:
    """One field of a name.

    Attributes:
        known: the values that the convention or its examples use.
        default: left out when writing; None where nothing stands for nothing.
        is_open: whether the convention's list ends in "…", so that other values are fine.
        several: whether it may have more than one value (``sc-gm``, ``t1-t2``).
    """

    known: tuple[str, ...]
    default: str | None
    is_open: bool
    several: bool = False


FIELDS: dict[str, NameField] = {
    "task": NameField(("seg", "label", "find"), None, is_open=False),
    "anatomy": NameField(
        ("sc", "gm", "csf", "brainstem", "axon", "myelin", "lesion"), "sc", is_open=True, several=True
    ),
    "animal": NameField(("human", "dog", "cat", "rat", "mouse", "monkey"), "human", is_open=True, several=True),
    "pathology": NameField(("hc", "ms", "sci"), "hc", is_open=False, several=True),
    "condition": NameField(("invivo", "exvivo"), "invivo", is_open=False),
    "contrast": NameField(
        ("t1", "t2", "t2star", "dwi", "sem", "tem", "oi", "t1w", "t2w", "mp2rage", "psir", "stir"),
        None,
        is_open=True,
        several=True,
    ),
    "architecture": NameField(("unet2d", "unet3d", "filmCharley", "hemisAndreanne"), "unet2d", is_open=False),
}
"""In the order of the convention."""


@dataclass(frozen=True)
class ModelName:
    """What a name says.

    Attributes:
        values: field → its values, defaults filled in; empty where there is none.
        notes: where the name that was read departs from the convention, and what it was taken for.
    """

    values: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """The name, written by the convention."""
        parts = [PREFIX]
        for key, rule in FIELDS.items():
            values = self.values.get(key, ())
            if values and values != (rule.default,):
                parts.append("-".join(values))
        return "_".join(parts)


def build_name(new_values: bool = False, **given: str | Sequence[str] | None) -> ModelName:
    """Make a name; ``str()`` of it is the text.

    Args:
        new_values: allow values that the convention's closed lists (task, pathology, condition, architecture) don't have.
        given: field → value, values, or several in one text with ``-`` or ``,`` between them; None: the default.

    Raises ConfigurationError, with all problems at once: unknown fields, illegal characters, unknown or too many values.
    """
    problems = [f"no field {key!r}: there are {', '.join(FIELDS)}" for key in given.keys() - FIELDS.keys()]
    values: dict[str, tuple[str, ...]] = {}
    for key, rule in FIELDS.items():
        requested = given.get(key)
        values[key] = (rule.default,) if not requested and rule.default else _split(requested)
        problems += _problems(key, rule, values[key], new_values)
    if list(values.values()) == [(rule.default,) if rule.default else () for rule in FIELDS.values()]:
        problems.append("nothing but defaults, which is no name: give at least the task or the contrast")
    problems += _twice(values)
    if problems:
        raise ConfigurationError("this is no model name by the convention: " + "; ".join(problems))
    return ModelName(values)


def _split(requested: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = [requested] if isinstance(requested, str) else list(requested or ())
    return tuple(value for text in texts for value in re.split(r"[-,]", text))


def _problems(key: str, rule: NameField, values: Sequence[str], new_values: bool) -> list[str]:
    found = []
    for value in values:
        usual = next((known for known in rule.known if known.lower() == value.lower()), value)
        if not _VALUE.fullmatch(value):
            found.append(f"{key} {value!r} has characters other than letters and digits")
        elif usual != value:
            found.append(f"{key} {value!r} is written {usual!r}")
        elif not rule.is_open and value not in rule.known and not new_values:
            found.append(f"{key} {value!r} is none of {', '.join(rule.known)} (--new-values allows it)")
        elif (other := _field_of(value, but=key)) and value not in rule.known:
            found.append(f"{key} {value!r} is a value of the field {other}")
    if len(values) > 1 and not rule.several:
        found.append(f"{key} has several values ({', '.join(values)}), and takes one")
    if len(set(values)) < len(values):
        found.append(f"{key} names a value twice: {', '.join(values)}")
    return found


def _field_of(value: str, but: str = "") -> str | None:
    return next((key for key, rule in FIELDS.items() if key != but and value in rule.known), None)


def _twice(values: Mapping[str, Sequence[str]]) -> list[str]:
    """A new value in two fields could not be told apart when the name is read."""
    seen: dict[str, str] = {}
    problems = []
    for key, its in values.items():
        for value in set(its):
            if value in seen:
                problems.append(f"{value!r} stands in {seen[value]} and in {key}")
            seen[value] = key
    return problems


# -- reading ---------------------------------------------------------------------------------------------------------


def read_name(text: str) -> ModelName:
    """What a name says, as far as it can be told; real repositories follow the convention loosely.

    Returns the values, defaults filled in, and ``notes`` on every departure. Raises ConfigurationError for illegal
    characters only: anything but letters, digits, ``_`` and ``-``.
    """
    name = text.strip()
    if not _LEGAL.fullmatch(name):
        wrong = sorted(set(re.sub(_LEGAL, "", name))) or ["nothing"]
        shown = " ".join("a blank" if letter == " " else letter for letter in wrong)
        raise ConfigurationError(f"model name {text!r} has {shown}: only letters, digits, _ and - are allowed")
    notes: list[str] = []
    parts = [part for part in name.split("_") if part]
    if parts and parts[0] == PREFIX:
        parts = parts[1:]
    else:
        notes.append(f"it does not begin with {PREFIX}_")
    placed = _placed(parts, notes)
    values: dict[str, tuple[str, ...]] = {}
    for key, rule in FIELDS.items():
        values[key] = placed.get(key, (rule.default,) if rule.default else ())
    for key in ("task", "contrast"):
        if not values[key]:
            notes.append(f"no {key}")
    return ModelName(values, tuple(notes))


def _placed(parts: Sequence[str], notes: list[str]) -> dict[str, tuple[str, ...]]:
    """Which field each part is, known values first: what is left is told by where it stands."""
    order = list(FIELDS)
    keys: list[str | None] = [
        next((key for key in map(_field_of, part.split("-")) if key is not None), None) for part in parts
    ]
    placed: dict[str, tuple[str, ...]] = {}
    for index, (part, key) in enumerate(zip(parts, keys, strict=True)):
        if key is None:
            key = _by_place(index, keys, placed)
            meaning = f"taken for the {key}" if key else "left out"
            notes.append(f"{part!r} is no value the convention knows: {meaning}")
        if key is None:
            continue
        its = tuple(value for value in part.split("-") if value)
        if key in placed:
            notes.append(f"{part!r} is a second part about the {key}")
        placed[key] = placed.get(key, ()) + its
        keys[index] = key
        notes += _notes_on(key, its, part)
    ranks = [order.index(key) for key in keys if key is not None]
    if ranks != sorted(ranks):
        wanted = ", ".join(key for key in order if key in keys)
        notes.append(f"its fields stand in another order than {wanted}")
    return placed


def _notes_on(key: str, its: Sequence[str], part: str) -> list[str]:
    rule = FIELDS[key]
    notes = []
    if tuple(its) == (rule.default,) and key != "anatomy":
        notes.append(f"{part!r} is the default of {key} and could be left out")
    unknown = [value for value in its if value not in rule.known]
    if unknown and len(unknown) < len(its):
        notes.append(f"{', '.join(map(repr, unknown))} is new among the values of {key}")
    if len(its) > 1 and not rule.several:
        notes.append(f"{part!r} gives {key} several values")
    return notes


def _by_place(index: int, keys: Sequence[str | None], placed: Mapping[str, object]) -> str | None:
    """The first open field, not yet taken, after those before it and before those after it."""
    order = list(FIELDS)
    before = [order.index(key) for key in keys[:index] if key is not None]
    after = [order.index(key) for key in keys[index + 1 :] if key is not None]
    free = [key for key in order if FIELDS[key].is_open and key not in placed and key not in keys]
    fitting = [
        key
        for key in free
        if order.index(key) > max(before, default=-1) and order.index(key) < min(after, default=len(order))
    ]
    return next(iter(fitting or free), None)


# -- releases --------------------------------------------------------------------------------------------------------


def release_tag(date: str | datetime.date | None = None) -> str:
    """Tag (and title) of a release, ``rYYYYMMDD``.

    ``date``: a date, ``YYYYMMDD``, ``YYYY-MM-DD`` or the tag itself; None: today. Raises ConfigurationError for others.
    """
    if date is None:
        date = datetime.date.today()
    if isinstance(date, datetime.date):
        return f"r{date:%Y%m%d}"
    digits = date.strip().removeprefix("r").replace("-", "")
    try:
        if not re.fullmatch(r"\d{8}", digits):
            raise ValueError
        day = datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
        if not 1980 <= day.year < 2108:  # what a zip can say
            raise ValueError
    except ValueError:
        raise ConfigurationError(f"date {date!r}: expected a day like 20240915 or 2024-09-15") from None
    return f"r{day:%Y%m%d}"
