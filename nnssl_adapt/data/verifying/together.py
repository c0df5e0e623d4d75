"""How the cases of a dataset go together: orientation, spacing, the same image twice, subjects on both sides of a fold."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nnssl_adapt.data.splits import SPLITS_FILE, read_splits
from nnssl_adapt.data.verifying.findings import Finding
from nnssl_adapt.data.verifying.look import CaseLook
from nnssl_adapt.errors import ConfigurationError, DatasetError
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.text import and_more, dimensions

_BIDS_SUBJECT = r"sub-[A-Za-z0-9]+"
_OUTLIER = 3.0


def compare_cases(
    folder: Path, seen: Mapping[str, CaseLook], identifiers: Sequence[str], owner: Callable[[str], str | None]
) -> list[Finding]:
    """Everything that only shows when cases are compared.

    Args:
        folder: the raw dataset's.
        seen: case → what it looks like.
        identifiers: of all complete cases.
        owner: finds the subject in a case's name, see :func:`owner_function`.
    """
    return [
        *_orientation_mix(seen),
        *_spacing_outliers(seen),
        *_duplicates(seen),
        *_leakage(folder, identifiers, owner),
    ]


def _orientation_mix(seen: Mapping[str, CaseLook]) -> list[Finding]:
    codes = {name: look.orientation for name, look in seen.items() if look.orientation}
    counts = Counter(codes.values())
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    shown = ", ".join(f"{code} {count}×" for code, count in counts.most_common())
    others = sorted(name for name, code in codes.items() if code != usual)
    text = f"images lie in different ways ({shown}; others than {usual}: {and_more(others)})"
    return [
        Finding("warning", "-", "orientation", text, f"nnssl-adapt reorient -d ID {usual} makes a copy of one kind")
    ]


def _spacing_outliers(seen: Mapping[str, CaseLook]) -> list[Finding]:
    spacings = {name: look.spacing for name, look in seen.items() if look.spacing}
    if len(spacings) < 3:
        return []
    median = np.median(np.array(list(spacings.values())), axis=0)
    findings = []
    for name, spacing in sorted(spacings.items()):
        ratio = np.asarray(spacing) / median
        if max(ratio.max(), (1 / ratio).max()) >= _OUTLIER:
            shown, usual = (dimensions(values) for values in (spacing, median))
            text = f"spacing {shown} mm (Z, Y, X), the dataset's median is {usual}"
            findings.append(Finding("warning", name, "spacing", text, "is the header right? Else leave the case out"))
    return findings


def _duplicates(seen: Mapping[str, CaseLook]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, look in seen.items():
        if look.digest is not None:
            groups[look.digest].append(name)
    return [
        Finding("warning", names[0], "duplicates", f"the same image as {and_more(names[1:])}", "keep one of them")
        for names in (sorted(group) for group in groups.values())
        if len(names) > 1
    ]


def _leakage(folder: Path, names: Sequence[str], owner: Callable[[str], str | None]) -> list[Finding]:
    """Subjects on both sides of a fold; and several cases of a subject without folds that keep them together."""
    path = _splits_in_use(folder)
    owners = {name: owner(name) for name in names}
    if path is None:
        repeated = sorted(s for s, count in Counter(o for o in owners.values() if o).items() if count > 1)
        if not repeated:
            return []
        text = f"{len(repeated)} subjects have several cases ({and_more(repeated)}), and there is no {SPLITS_FILE}"
        fix = f"write {folder / SPLITS_FILE} with each subject on one side of every fold"
        return [Finding("warning", "-", "leakage", text, fix)]
    try:
        sides = [(set(split["train"]), set(split["val"])) for split in read_splits(path)]
    except DatasetError as error:
        return [Finding("error", "-", "folds", str(error), "correct it, or remove it to get nnU-Net's own folds")]
    findings = []
    for fold, (train, val) in enumerate(sides):
        unknown = sorted((train | val) - set(names))
        if unknown:
            text = f"{path}: fold {fold} names cases that are missing or incomplete: {and_more(unknown)}"
            findings.append(Finding("error", "-", "folds", text, "correct it, or remove it to get nnU-Net's own folds"))
        if both := sorted(train & val):
            text = f"{path}: fold {fold} validates on training cases: {and_more(both)}"
            findings.append(Finding("warning", "-", "leakage", text, "take them out of 'train'"))
        sided = [{who for name in side if (who := owners.get(name))} for side in (train - val, val)]
        if shared := sorted(sided[0] & sided[1]):
            text = f"{path}: fold {fold} has subjects on both sides: {and_more(shared)}"
            findings.append(Finding("warning", "-", "leakage", text, "move all cases of a subject to one side"))
    unused = sorted(set(names).difference(*(train | val for train, val in sides)))
    if unused:
        text = f"{path}: in no fold, so never trained on or validated: {and_more(unused)}"
        findings.append(Finding("warning", "-", "folds", text, "remove the file to get new folds, or add them to it"))
    return findings


def _splits_in_use(folder: Path) -> Path | None:
    """The folds that training takes: those beside the preprocessed data, else those in the raw dataset."""
    try:
        places = [preprocessed_folder() / folder.name, folder]
    except ConfigurationError:  # nnUNet_preprocessed is not set, which verifying does not need
        places = [folder]
    return next((place / SPLITS_FILE for place in places if (place / SPLITS_FILE).is_file()), None)


def owner_function(expression: str | None) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(expression or _BIDS_SUBJECT)
    except re.error as error:
        raise ConfigurationError(f"--subject {expression!r} is no regular expression: {error}") from None

    def owner(name: str) -> str | None:
        match = compiled.search(name)
        return None if match is None else match.group(1) if match.groups() else match.group()

    return owner
