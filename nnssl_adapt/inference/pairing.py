"""Which files make up which image, by their names: ``CASE_0000.nii.gz`` is channel 0 of ``CASE``.

A case whose files don't fit is refused by name, and the others go on.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnssl_adapt.data.dataset import DatasetJson, RawCase
from nnssl_adapt.data.images import SIMPLE_ITK, count_channels
from nnssl_adapt.data.names import channel_key, pair_channels
from nnssl_adapt.data.pictures import PICTURE_READERS
from nnssl_adapt.data.voxels import FLAT_IMAGE_ENDINGS
from nnssl_adapt.errors import CaseError, DatasetJsonError
from nnssl_adapt.inference.task import without_ending
from nnssl_adapt.text import and_more

logger = logging.getLogger(__name__)

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass
class Pairing:
    """What the names say.

    Attributes:
        cases: whole ones, each with a file for every channel, in order, or one 4D file with all of them.
        refused: identifier → what is wrong with its files.
    """

    cases: list[RawCase] = field(default_factory=list)
    refused: dict[str, CaseError] = field(default_factory=dict)

    def refuse(self, identifier: str, problem: str, path: Path) -> None:
        """Note that a case is not predicted, and why."""
        self.refused[identifier] = CaseError(problem, path=path)


def pair_folder(folder: Path, files: Iterable[Path], channel_names: Sequence[str], reader: str = SIMPLE_ITK) -> Pairing:
    """The cases of a folder, sorted by name. Every file must have its channel's number, as in nnU-Net.

    ``reader`` is the model's: pictures are images of a model that was trained on pictures, and else refused.
    """
    found = Pairing()
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(files):
        case, channel = case_and_channel(path)
        if path.name.lower().endswith(FLAT_IMAGE_ENDINGS) and reader not in PICTURE_READERS:
            found.refuse(
                path.name,
                f"{path} is a picture, and the model was trained on 3D images (.nii.gz, .nii, .nrrd, .mha)",
                path,
            )
        elif channel is None:
            found.refuse(path.name, f"{path}: expected a name like CASE_0000 (case, channel in four digits)", path)
        else:
            groups.setdefault(case, []).append((channel, path))
    for identifier, members in groups.items():
        _add(found, identifier, members, channel_names, reader)
    found.cases.sort(key=lambda case: case.identifier)
    return found


def pair_files(
    files: Sequence[Path], channel_names: Sequence[str], keep_folders: bool = False, reader: str = SIMPLE_ITK
) -> Pairing:
    """The cases that given files belong to, in the order in which they first occur.

    Files without a channel's number are taken where nothing is ambiguous: for a model of one channel each is an image; a 4D
    file with all channels is one too; otherwise there must be as many as channels and no other files.

    Args:
        files: the files.
        channel_names: of the model.
        keep_folders: cases of different folders are different ones, and are called ``FOLDER/CASE``.
        reader: of the model's images.
    """
    found = Pairing()
    above = Path(os.path.commonpath([path.absolute().parent for path in files]))
    groups: dict[str, list[tuple[int | None, Path]]] = {}
    for path in files:
        case, channel = case_and_channel(path)
        folder = path.absolute().parent.relative_to(above).as_posix() if keep_folders else "."
        groups.setdefault(case if folder == "." else f"{folder}/{case}", []).append((channel, path))
    bare = [path for members in groups.values() for channel, path in members if channel is None]
    if (
        len(channel_names) > 1
        and len(bare) == len(files) == len(channel_names)
        and not _are_whole(bare, channel_names, reader)
    ):
        pairs = ", ".join(f"{name} = {path.name}" for name, path in zip(channel_names, bare, strict=True))
        logger.warning("the files' names have no channel numbers: taken in the order given, %s", pairs)
        found.cases.append(RawCase(case_and_channel(bare[0])[0], tuple(bare)))
        return found
    for identifier, members in groups.items():
        numbered = [(channel, path) for channel, path in members if channel is not None]
        without = [path for channel, path in members if channel is None]
        if not without:
            _add(found, identifier, numbered, channel_names, reader)
        elif len(members) > 1:
            found.refuse(identifier, _several(identifier, [path for _, path in members]), without[0])
        elif len(channel_names) == 1 or _are_whole(without, channel_names, reader):
            found.cases.append(RawCase(identifier, (without[0],)))
        else:
            found.refuse(
                identifier,
                f"{without[0]}: its name does not say which channel it is: expected {identifier}_0000 to "
                f"{identifier}_{len(channel_names) - 1:04d}",
                without[0],
            )
    return found


@dataclass(frozen=True)
class ChannelOrder:
    """The channels that files are numbered by, where a dataset.json beside them names them.

    Attributes:
        names: of the channels, by the files' numbers.
        order: for each of the model's channels its number in ``names``.
        source: the dataset.json that says so; None: the numbers are the model's own.
    """

    names: tuple[str, ...]
    order: tuple[int, ...]
    source: Path | None = None

    @classmethod
    def of(cls, channel_names: Sequence[str]) -> ChannelOrder:
        """The model's own."""
        return cls(tuple(channel_names), tuple(range(len(channel_names))))

    @property
    def is_the_models(self) -> bool:
        return self.order == tuple(range(len(self.names)))

    def applied(self, found: Pairing) -> Pairing:
        """Each case's files in the model's order."""
        if self.is_the_models:
            return found
        result = Pairing(refused=dict(found.refused))
        for case in found.cases:
            if len(case.images) == len(self.names):
                result.cases.append(replace(case, images=tuple(case.images[number] for number in self.order)))
            else:
                result.refuse(
                    case.identifier,
                    f"{case.images[0]}: all channels are in one file, and {self.source} names them in another order than the "
                    "model: store one channel a file",
                    case.images[0],
                )
        return result


def channel_order(folder: Path, channel_names: Sequence[str]) -> ChannelOrder:
    """How the files of ``folder`` are numbered: as dataset.json in it or above it says, where its names are the model's.

    nnU-Net takes channel ``_0000`` for the model's first one whatever it is. A model of fewer channels takes those that it has.
    """
    own = ChannelOrder.of(channel_names)
    path = next((p for p in (folder / "dataset.json", folder.parent / "dataset.json") if p.is_file()), None)
    if path is None:
        return own
    try:
        names = tuple(DatasetJson.load(path).channel_names.values())
    except DatasetJsonError as error:
        logger.info("not used to tell the images' channels: %s", error)
        return own
    pairs = pair_channels(channel_names, names)
    known = [number for number in pairs if number is not None]
    if len(known) == len(channel_names):
        found = ChannelOrder(names, tuple(known), path)
        if not found.is_the_models:
            told = ", ".join(f"{name} = _{number:04d}" for name, number in zip(channel_names, known, strict=True))
            logger.warning("channels are taken by their names in %s: %s", path, told)
        return found
    if any(map(channel_key, channel_names)) and any(map(channel_key, names)) and names != tuple(channel_names):
        logger.warning(
            "%s names the channels %s, the model's are %s: not all names agree, so they are taken by number",
            path,
            ", ".join(names),
            ", ".join(channel_names),
        )
    return own


def case_and_channel(file: Path) -> tuple[str, int | None]:
    """``("CASE", 1)`` for ``CASE_0001.nii.gz``, ``("CASE", None)`` for ``CASE.nii.gz``."""
    name = without_ending(file.name)
    match = _CHANNEL.fullmatch(name)
    return (match["case"], int(match["channel"])) if match else (name, None)


def _add(
    found: Pairing, identifier: str, members: Sequence[tuple[int, Path]], channel_names: Sequence[str], reader: str
) -> None:
    """Add a case, or refuse it: every channel must be there once, and no other."""
    groups: dict[int, list[Path]] = {}
    for channel, path in members:
        groups.setdefault(channel, []).append(path)
    first = members[0][1]
    if problem := _channel_problem(identifier, groups, channel_names):
        found.refuse(identifier, problem, first)
    elif len(groups) == len(channel_names):
        found.cases.append(RawCase(identifier, tuple(groups[channel][0] for channel in range(len(channel_names)))))
    elif _are_whole([first], channel_names, reader):
        found.cases.append(RawCase(identifier, (first,)))
    else:
        stem = case_and_channel(first)[0]
        ending = first.name.removeprefix(without_ending(first.name))
        missing = [
            f"{first.with_name(f'{stem}_{channel:04d}{ending}')} ({name})"
            for channel, name in enumerate(channel_names)
            if channel not in groups
        ]
        found.refuse(identifier, f"{identifier} lacks a channel: {and_more(missing)} is missing", first)


def _channel_problem(identifier: str, groups: Mapping[int, Sequence[Path]], channel_names: Sequence[str]) -> str | None:
    doubled = next((paths for paths in groups.values() if len(paths) > 1), None)
    if doubled is not None:
        return _several(identifier, doubled)
    foreign = sorted(channel for channel in groups if channel >= len(channel_names))
    if foreign:
        path = groups[foreign[0]][0]
        return (
            f"{path}: the model has no channel _{foreign[0]:04d}, only {len(channel_names)} "
            f"({', '.join(channel_names)}), counted from _0000"
        )
    return None


def _several(identifier: str, paths: Sequence[Path]) -> str:
    listed = and_more([str(path) for path in paths], 4)
    if len({path.parent for path in paths}) > 1:
        return (
            f"{identifier} is the name of files in different folders ({listed}): rename them, or keep them apart with "
            "--keep-folders (keep_folders=True)"
        )
    return f"{identifier}: several files for the same channel ({listed}): leave one"


def _are_whole(paths: Sequence[Path], channel_names: Sequence[str], reader: str) -> bool:
    """Whether each is a file with all of several channels (4D, colours). What can't be read is none, and told when it is read."""
    if len(channel_names) == 1:
        return False
    try:
        return all(count_channels(path, reader) == len(channel_names) for path in paths)
    except CaseError:
        return False
