"""What label values are called, and which numbers they get: nnU-Net needs 0 for the background, then 1, 2, … without a gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnssl_adapt.data.convert.cases import some
from nnssl_adapt.errors import ConfigurationError, DatasetError


def numbered(names: Mapping[str, int]) -> tuple[dict[str, int], tuple[tuple[int, int], ...]]:
    """Number labels without a gap, in the order of their values: the background 0 (added where it is missing), ``ignore`` last.

    Args:
        names: name → value in the source's files, e.g. ``{"lesion": 255}``.

    Returns:
        The table for dataset.json, and (value in the source, value in the dataset) of all; empty when all stay as they are.

    Raises:
        ConfigurationError: two names for a value, or another name than background for 0.
    """
    given = dict(names) if "background" in names else {"background": 0, **names}
    owner: dict[int, str] = {}
    for name, value in given.items():
        if value in owner and {name, owner[value]} & {"background"}:
            raise ConfigurationError(f"label names: value 0 must be called background, not {name!r}")
        if value in owner:
            raise ConfigurationError(f"label names: {owner[value]!r} and {name!r} have the same value {value}")
        owner[value] = name
    ordered = sorted(given, key=lambda name: (name != "background", name == "ignore", given[name]))
    table = {name: number for number, name in enumerate(ordered)}
    if table == given:
        return table, ()
    return table, tuple((given[name], table[name]) for name in ordered)


def named_labels(values: Mapping[str, Sequence[int]], names: Mapping[str, int] | None) -> dict[str, int]:
    """The label table: the names given (see :func:`numbered`), or ``label_1``, … for what the files hold.

    Args:
        values: case → label values in the source's files.
        names: name → value there.

    Raises DatasetError when values are not consecutive from 0, or files hold values without a name (lists the cases).
    """
    if names is None:
        return _named_by_number(values)
    table, renumbered = numbered(names)
    known = {old for old, _ in renumbered} or set(table.values())
    strange = {case: lacking for case, held in values.items() if (lacking := sorted(set(held) - known))}
    if strange:
        listed = "; ".join(f"{case}: {', '.join(map(str, lacking))}" for case, lacking in sorted(strange.items())[:10])
        raise DatasetError(f"label values without a name ({listed}): name them all with --label-names NAME=VALUE")
    return table


def _named_by_number(values: Mapping[str, Sequence[int]]) -> dict[str, int]:
    found = sorted({0}.union(*values.values()))
    if found != list(range(len(found))):
        example = " ".join(f"label_{number}={value}" for number, value in enumerate(found[1:4], 1))
        raise DatasetError(
            f"the labels hold the values {some(list(map(str, found)), 20)}; nnU-Net needs 0 (background), 1, 2, … without a gap: "
            f"name all values, e.g. --label-names {example}{' …' if len(found) > 4 else ''}, and the copies are renumbered"
        )
    return {"background" if value == 0 else f"label_{value}": value for value in found}
