"""Which files a raw dataset has, which it should have, and what is said about those that are missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nnssl_adapt.data.dataset import (
    DatasetJson,
    RawCase,
    colour_problems,
    listed_cases,
    read_as_asked,
    refuse_unsupported,
)
from nnssl_adapt.data.endings import files_with, stem_of
from nnssl_adapt.data.images import count_channels
from nnssl_adapt.data.pictures import PICTURE_READERS, reader_for_ending
from nnssl_adapt.data.verifying.findings import Finding
from nnssl_adapt.errors import CaseError
from nnssl_adapt.text import and_more


def find_cases(folder: Path, description: DatasetJson) -> tuple[list[RawCase], list[Finding]]:
    """The cases whose files are all there, and what is missing from the others."""
    channels, path = len(description.channel_names), folder / "dataset.json"
    refuse_unsupported(description, path)
    if description.dataset is not None:
        listed = read_as_asked(listed_cases(description.dataset, folder, path), description)
        findings = [finding for case in listed for finding in _missing_from(case, channels)]
    else:
        listed, findings = _named_cases(folder, description)
    missing = {finding.case for finding in findings if finding.level == "error"}
    findings += [f for case in listed if case.identifier not in missing for f in _other_colours(case, channels)]
    incomplete = {finding.case for finding in findings if finding.level == "error"}
    total = sum(bool(case.images) for case in listed)  # as nnU-Net, which looks at images only
    findings += wrong_count(description, total)
    return [case for case in listed if case.identifier not in incomplete], findings


def wrong_count(description: DatasetJson, total: int) -> list[Finding]:
    """A warning where ``numTraining`` is not ``total``, the number of cases with images."""
    if description.num_training in (None, total):
        return []
    text = f"dataset.json says 'numTraining' {description.num_training}, but there are {total} cases"
    return [Finding("warning", "-", "numTraining", text, "correct dataset.json (nnU-Net refuses it)")]


def _missing_from(case: RawCase, channels: int) -> list[Finding]:
    """Of a case whose files dataset.json names itself."""
    fix = "put it there, or correct 'dataset' in dataset.json"
    found = [
        Finding("error", case.identifier, "present", f"{path} is missing", fix)
        for path in case.files
        if not path.is_file()
    ]
    if case.reader in PICTURE_READERS:
        return found
    if not found and len(case.images) != channels and not _holds_all_channels(case.images, channels):
        text = f"dataset.json names {len(case.images)} image files for {channels} channels"
        found.append(Finding("error", case.identifier, "present", text, "name one file a channel"))
    return found


def _other_colours(case: RawCase, channels: int) -> list[Finding]:
    """Pictures that have other channels than dataset.json; those that can't be read are told of when they are read."""
    try:
        problems = colour_problems(case, channels) if case.reader in PICTURE_READERS else []
    except CaseError:
        return []
    fix = "save all pictures alike, or correct channel_names in dataset.json"
    return [Finding("error", case.identifier, "channels", text, fix) for text in problems]


def _holds_all_channels(images: Sequence[Path], channels: int) -> bool:
    """Whether this is one 4D file, which nnU-Net's reader takes as well."""
    try:
        return len(images) == 1 and count_channels(images[0]) == channels
    except CaseError:
        return False


def _named_cases(folder: Path, description: DatasetJson) -> tuple[tuple[RawCase, ...], list[Finding]]:
    """Every case that a file in imagesTr or labelsTr is named after, with the findings of those that are incomplete."""
    findings: list[Finding] = []
    ending, channels = description.file_ending, len(description.channel_names)
    pattern = re.compile(r"(.+)_(\d{4})(?i:" + re.escape(ending) + ")")
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in _visible(folder / "imagesTr"):
        match = pattern.fullmatch(path.name)
        if match is None and ending.lower() in (".tif", ".tiff") and path.suffix == ".json":
            continue  # the spacing of a stack
        if match is None:
            level = "error" if stem_of(path.name, ending) is not None else "warning"
            fix = f"rename it to CASE_0000{ending}, or move it away"
            findings.append(Finding(level, "-", "names", f"{path} is no image's name, and not used", fix))
        else:
            if (other := groups[match[1]].get(int(match[2]))) is not None:
                text = f"{other} and {path} are the same channel"
                findings.append(Finding("error", match[1], "names", text, "leave one of them"))
            groups[match[1]][int(match[2])] = path
    labels = files_with(folder / "labelsTr", ending)
    findings += _capitals([p for group in groups.values() for p in group.values()] + list(labels.values()), ending)
    cases: list[RawCase] = []
    first = next((path for images in groups.values() for path in images.values()), None)
    are_pictures = (description.image_reader or reader_for_ending(ending, first)) in PICTURE_READERS
    for name in sorted(groups.keys() | labels.keys()):
        images = groups.get(name, {})
        one_file = list(images) == [0] and channels > 1 and _holds_all_channels([images[0]], channels)
        # How many pictures make up the channels depends on their colours, which are looked at later.
        expected = set(images) if one_file or (are_pictures and images) else set(range(channels))
        missing = [f"imagesTr/{name}_{number:04d}{ending}" for number in sorted(expected - set(images))]
        missing += [] if name in labels else [f"labelsTr/{name}{ending}"]
        for file in missing:
            fix = "put it there, or remove the case's other files"
            findings.append(Finding("error", name, "present", f"{folder / file} is missing", fix))
        for number in sorted(set(images) - expected):
            fix = "add the channel to channel_names, or remove the file"
            text = f"{images[number]} is not one of the {channels} channels in dataset.json"
            findings.append(Finding("error", name, "present", text, fix))
        cases.append(RawCase(name, tuple(images[n] for n in sorted(images)), labels.get(name)))
    if not cases:
        text = f"{folder / 'imagesTr'} has no images"
        findings.append(Finding("error", "-", "present", text, f"expected names like CASE_0000{ending}"))
    return read_as_asked(cases, description), findings


def _capitals(paths: Sequence[Path], ending: str) -> list[Finding]:
    """A warning for files whose ending is that of dataset.json but for its case: only nnU-Net's own listing minds."""
    found = [path for path in paths if not path.name.endswith(ending)]
    if not found:
        return []
    text = f"{len(found)} files end in {ending} in other letters ({and_more(found, 2)})"
    return [Finding("warning", "-", "names", text, "fine here; nnU-Net does not find them: rename them for it")]


def _visible(folder: Path) -> list[Path]:
    """Files, and links that lead nowhere: those are complained about when they are read."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if (p.is_file() or p.is_symlink()) and p.name[0] != ".")
