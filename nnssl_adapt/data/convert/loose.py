"""BIDS folders, and any other files that patterns can pair."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from nnssl_adapt.data.convert.cases import (
    ENDINGS,
    SourceCase,
    Target,
    all_cases,
    common_ending,
    existing_files,
    refuse_pictures,
    some,
    training_case,
)
from nnssl_adapt.data.convert.conversion import convert_cases, finish
from nnssl_adapt.data.convert.label_names import named_labels, numbered
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.endings import stem_of
from nnssl_adapt.data.splits import SPLITS_FILE, Split, crossval_splits, read_splits
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetError, DatasetNotFound
from nnssl_adapt.files import write_json

logger = logging.getLogger(__name__)

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
UNLABELLED = ("error", "skip", "test")


def convert_bids(
    folder: str | Path,
    target: Target,
    suffixes: Sequence[str],
    label_suffix: str,
    derivatives: str | Path = "derivatives/labels",
    unlabelled: str = "error",
    label_names: Mapping[str, int] | None = None,
    workers: int = 1,
    progress: bool | None = None,
) -> RawDataset:
    """Convert a BIDS folder: subjects and sessions become cases, and no subject stands on both sides of a fold.

    ``sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz`` becomes case ``sub-01_ses-1``; its label is looked for below
    ``derivatives`` in the same folder, as ``sub-01_ses-1_T2w_<label_suffix>`` or ``sub-01_ses-1_<label_suffix>``. With several
    channels, each one's name is tried in their order.

    Args:
        folder: with ``sub-*`` folders.
        target: where to.
        suffixes: one a channel, e.g. ``["T2w"]``.
        label_suffix: e.g. ``seg`` or ``label-SC_seg``.
        derivatives: folder of the labels, relative to ``folder`` or absolute.
        unlabelled: images without label are an ``error``, left out (``skip``), or test images (``test``).
        label_names: name → value in the files, renumbered if these have gaps; default: ``label_1``, … for the values found.
        workers: processes.
        progress: whether to draw a bar.

    Raises:
        DatasetNotFound, ConfigurationError, CaseError, DatasetError: what is missing or does not fit.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise DatasetNotFound(f"{root}: no such folder")
    labels_root = (root / Path(derivatives).expanduser()).resolve()
    if not labels_root.is_dir():
        raise DatasetNotFound(f"{labels_root}: no such folder; say with --derivatives where the labels are")
    if unlabelled not in UNLABELLED:
        raise ConfigurationError(f"unlabelled {unlabelled!r}: expected one of {', '.join(UNLABELLED)}")
    channels = [_channel(root, suffix) for suffix in suffixes]
    _refuse_uneven(channels, suffixes)
    images_of = {key: [found[key] for found in channels] for key in channels[0]}
    wanted = {key: _label_places(root, labels_root, images, key, label_suffix) for key, images in images_of.items()}
    there = set(existing_files(place for places in wanted.values() for place in places))
    label_of = {key: next((place for place in places if place in there), None) for key, places in wanted.items()}
    without = sorted(key for key, label in label_of.items() if label is None)
    if len(without) == len(label_of):
        raise CaseError(
            f"no image has a label ending in _{label_suffix} below {labels_root} (looked for e.g. {wanted[without[0]][0]}): "
            "are --label-suffix and --derivatives right?"
        )
    if without and unlabelled == "error":
        raise CaseError(
            f"{len(without)} of {len(label_of)} images have no label ending in _{label_suffix} below {labels_root}: "
            f"{some(without)}; leave them out with --unlabelled skip, or make them test images with --unlabelled test"
        )
    ending = common_ending([*(p for found in channels for p in found.values()), *(p for p in label_of.values() if p)])
    _, renumbered = numbered(label_names or {})
    makers = []
    for key in sorted(label_of):
        label = label_of[key]
        if label is None and unlabelled == "skip":
            continue
        subject = _SUBJECT.match(key)
        owner = subject.group() if subject else None
        part = "Tr" if label else "Ts"
        makers.append(partial(training_case, key, images_of[key], label, ending, owner, part, renumbered))
    cases = all_cases(makers)
    return _finished("bids", str(root), target, cases, list(suffixes), ending, label_names, True, workers, progress)


def convert_pairs(
    images: Sequence[str],
    labels: str,
    target: Target,
    channel_names: Sequence[str] | None = None,
    label_names: Mapping[str, int] | None = None,
    subject: str | None = None,
    workers: int = 1,
    progress: bool | None = None,
) -> RawDataset:
    """Convert files that patterns pair: what the wildcards of an image and of a label stand for must be the same.

    Args:
        images: one pattern a channel, e.g. ``["scans/*_t1.nii.gz", "scans/*_t2.nii.gz"]``.
        labels: e.g. ``masks/*_mask.nii.gz``.
        target: where to.
        channel_names: one a pattern, or one a volume of 4D images; default ``image`` (or ``image_0``, …). nnU-Net
            normalises a channel called CT in its own way.
        label_names: name → value in the files, renumbered if these have gaps; default: ``label_1``, … for the values found.
        subject: regular expression searched in a case's name; what it (or its first group) matches is the subject, and
            folds keep subjects together.
        workers: processes.
        progress: whether to draw a bar.

    Raises:
        ConfigurationError: a pattern without wildcard, or a wrong number of names.
        CaseError: patterns match nothing, or files have no partner (lists them).
    """
    names = list(channel_names or (["image"] if len(images) == 1 else [f"image_{n}" for n in range(len(images))]))
    if len(names) != len(images) > 1:
        raise ConfigurationError(f"{len(names)} channel names for {len(images)} image patterns: give one for each")
    label_of = _matched(labels)
    excluded = set(label_of.values())
    channels = [{k: p for k, p in _matched(pattern).items() if p not in excluded} for pattern in images]
    _refuse_unpaired(channels, images, label_of, labels)
    ending = common_ending([*(p for found in channels for p in found.values()), *label_of.values()])
    _, renumbered = numbered(label_names or {})
    owners = {key: _owner(subject, key) for key in label_of}
    cases = all_cases(
        partial(
            training_case, key, [found[key] for found in channels], label, ending, owners[key], renumbered=renumbered
        )
        for key, label in sorted(label_of.items())
    )
    source = " ".join(map(_absolute, [*images, labels]))
    return _finished("pairs", source, target, cases, names, ending, label_names, bool(subject), workers, progress)


def subject_splits(cases: Sequence[SourceCase], target: Target, folds: int = 5) -> Path | None:
    """Write folds in which all cases of a subject stand on one side; None (and a warning) for a single subject."""
    owners = {case.identifier: case.subject or case.identifier for case in cases if case.part == "Tr"}
    subjects = sorted(set(owners.values()))
    if len(subjects) < 2:
        logger.warning("one subject can't be split into training and validation: no %s written", SPLITS_FILE)
        return None
    splits = [
        {part: sorted(case for case, owner in owners.items() if owner in set(split[part])) for part in ("train", "val")}
        for split in crossval_splits(subjects, folds=min(folds, len(subjects)))
    ]
    path = target.folder / SPLITS_FILE
    if path.is_file() and not _is_of(path, splits):
        logger.warning("%s is replaced: the cases or subjects have changed", path)
    write_json(path, splits)
    return path


def _is_of(path: Path, splits: list[Split]) -> bool:
    try:
        return read_splits(path) == splits
    except DatasetError:
        return False


def _finished(
    kind: str,
    source: str,
    target: Target,
    cases: Sequence[SourceCase],
    channel_names: list[str],
    ending: str,
    label_names: Mapping[str, int] | None,
    split: bool,
    workers: int,
    progress: bool | None,
) -> RawDataset:
    volumes = {len(case.image_targets) for case in cases}
    if len(volumes) > 1:
        raise DatasetError(f"cases have different numbers of channels: {', '.join(map(str, sorted(volumes)))}")
    count = volumes.pop()
    if count != len(channel_names):
        if len(channel_names) > 1:
            raise ConfigurationError(f"{len(channel_names)} channel names for {count} channels: give one for each")
        channel_names = [f"{channel_names[0]}_{number}" for number in range(count)]  # one 4D file a case
    values = convert_cases(kind, source, target, cases, workers, progress)
    table = named_labels(values, label_names)
    if split:
        subject_splits(cases, target)
    return finish(target, channel_names, table, ending)


# -- BIDS -----------------------------------------------------------------------------------------------------------


def _channel(root: Path, suffix: str) -> dict[str, Path]:
    """Case → image with this suffix. Only raw images: derivatives have folders of their own."""
    found: dict[str, Path] = {}
    # Path.glob would not look into folders that are links.
    everything = map(Path, sorted(glob.glob(f"{glob.escape(str(root))}/sub-*/**/*", recursive=True)))  # noqa: PTH207
    named = [path for path in everything if (_stem(path) or "").endswith(f"_{suffix}")]
    for path in existing_files(named):
        key = str(_stem(path)).removesuffix(f"_{suffix}")
        if key in found:
            raise CaseError(f"{found[key]} and {path} are the same image in two files: remove one")
        found[key] = path
    if not found:
        refuse_pictures(root.glob(f"sub-*/**/*_{suffix}.*"))
        raise CaseError(f"{root} has no images sub-*/…/*_{suffix}.nii.gz: is --suffix {suffix} right?")
    return found


def _stem(path: Path) -> str | None:
    """A file's name without its image ending; None for other files."""
    return next((stem for ending in ENDINGS if (stem := stem_of(path.name, ending)) is not None), None)


def _refuse_uneven(channels: Sequence[Mapping[str, Path]], suffixes: Sequence[str]) -> None:
    everyone = {key for found in channels for key in found}
    problems = [
        f"{key} has no _{suffix} image"
        for key in sorted(everyone)
        for found, suffix in zip(channels, suffixes, strict=True)
        if key not in found
    ]
    if problems:
        raise CaseError(f"all channels are needed for every case: {some(problems, 20)}")


def _label_places(root: Path, labels_root: Path, images: Sequence[Path], key: str, label_suffix: str) -> list[Path]:
    """Where a case's label may lie, in the order of preference."""
    folders = {image: labels_root / image.relative_to(root).parent for image in images}
    stems = [(folders[image], f"{_stem(image)}_{label_suffix}") for image in images]
    stems += [(folders[image], f"{key}_{label_suffix}") for image in images]
    return [folder / f"{stem}{ending}" for folder, stem in stems for ending in ENDINGS]


# -- patterns -------------------------------------------------------------------------------------------------------


def _matched(pattern: str) -> dict[str, Path]:
    """What the wildcards stand for → file. Raises CaseError when nothing matches or two files mean the same case."""
    pattern = _absolute(pattern)
    if not any(mark in pattern for mark in "*?"):
        raise ConfigurationError(
            f"pattern {pattern!r} has no wildcard: quote it, e.g. 'scans/*.nii.gz', or the shell fills it in itself"
        )
    expression = re.compile(_as_expression(pattern))
    found: dict[str, Path] = {}
    names = sorted(glob.glob(pattern.replace("[", "[[]"), recursive=True))  # noqa: PTH207 (a pattern is absolute)
    for path in existing_files(map(Path, names)):
        match = expression.fullmatch(str(path))
        if match is None:
            continue
        key = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(part for part in match.groups() if part)).strip("_.")
        if not key or key in found:
            raise CaseError(
                f"{path} and {found.get(key)} would both be case {key!r}: use a pattern that tells them apart"
            )
        found[key] = path
    if not found:
        raise CaseError(f"no file matches {pattern!r} (wildcards are *, ? and **)")
    return found


def _absolute(pattern: str) -> str:
    """Where it starts, whatever the working directory; links stay, since their names count and not those they lead to."""
    return os.path.abspath(os.path.expanduser(pattern))  # noqa: PTH100, PTH111 (resolve() would follow links)


def _as_expression(pattern: str) -> str:
    """A glob as a regular expression with a group for every wildcard."""
    tokens = {"**/": r"(?:(.*)/)?", "**": r"(.*)", "*": r"([^/]*)", "?": r"([^/])"}
    return "".join(tokens.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _refuse_unpaired(
    channels: Sequence[Mapping[str, Path]], images: Sequence[str], label_of: Mapping[str, Path], labels: str
) -> None:
    problems = []
    for found, pattern in zip(channels, images, strict=True):
        problems += [
            f"{label_of[key]} (case {key}) has no image by {pattern!r}" for key in sorted(label_of.keys() - found)
        ]
        problems += [f"{found[key]} (case {key}) has no label by {labels!r}" for key in sorted(found.keys() - label_of)]
    if problems:
        raise CaseError(
            f"{len(problems)} files have no partner (what the wildcards stand for must be the same):\n  "
            + "\n  ".join(problems[:20])
            + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        )


def _owner(expression: str | None, key: str) -> str | None:
    if expression is None:
        return None
    try:
        match = re.search(expression, key)
    except re.error as error:
        raise ConfigurationError(f"--subject {expression!r} is no regular expression: {error}") from None
    if match is None:
        raise ConfigurationError(f"--subject {expression!r} is not found in case {key!r}")
    return match.group(1) if match.groups() else match.group()
