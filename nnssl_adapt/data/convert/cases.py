"""What is converted, and where to: source files, the cases they make, and the dataset that is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.data.images import count_channels
from nnssl_adapt.data.voxels import FLAT_IMAGE_ENDINGS
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetNotFound
from nnssl_adapt.paths import find_dataset_name, raw_folder

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
LINKS = ("symbolic", "hard")


@dataclass(frozen=True)
class SourceFile:
    """One source file and what it becomes.

    Attributes:
        source: where it is.
        targets: one file, or one for each volume of a 4D image (paths in the dataset).
        renumbered: of labels: (value in the source, value in the dataset) of all values; empty: they stay.
    """

    source: Path
    targets: tuple[str, ...]
    renumbered: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SourceCase:
    """One case: its image files in channel order, its label, and whose it is (for folds that keep subjects together)."""

    identifier: str
    part: str
    images: tuple[SourceFile, ...]
    label: SourceFile | None = None
    subject: str | None = None

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All of them."""
        return self.images if self.label is None else (*self.images, self.label)

    @property
    def image_targets(self) -> tuple[str, ...]:
        """The image files it becomes, one a channel."""
        return tuple(name for file in self.images for name in file.targets)


@dataclass(frozen=True)
class Target:
    """The dataset to write.

    Attributes:
        folder: ``nnUNet_raw/DatasetNNN_Name``.
        link: None to copy; ``symbolic`` or ``hard`` to link files that need no rewriting.
    """

    folder: Path
    link: str | None = None

    @classmethod
    def named(cls, number: int, name: str, link: str | None = None) -> Target:
        """Dataset ``number`` called ``name`` in ``nnUNet_raw``. Raises ConfigurationError when either is no good or taken."""
        if not 1 <= number <= 999:
            raise ConfigurationError(f"dataset id {number}: expected a number from 1 to 999")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigurationError(
                f"dataset name {name!r}: expected letters, digits, '_', '-' and '.', e.g. SpinalCord"
            )
        if link is not None and link not in LINKS:
            raise ConfigurationError(f"link {link!r}: expected one of {', '.join(LINKS)}")
        folder = raw_folder() / f"Dataset{number:03d}_{name}"
        try:
            taken = find_dataset_name(number)
        except DatasetNotFound as error:
            if "several names" in str(error):
                raise ConfigurationError(str(error)) from None
            taken = folder.name
        if taken != folder.name:
            raise ConfigurationError(f"dataset id {number} is taken by {taken}: choose another with -d")
        return cls(folder, link)


def training_case(
    identifier: str,
    images: Sequence[Path],
    label: Path | None,
    ending: str,
    subject: str | None = None,
    part: str = "Tr",
    renumbered: tuple[tuple[int, int], ...] = (),
) -> SourceCase:
    """A case under nnU-Net's names. A single 4D image becomes a file for each of its volumes. Raises CaseError."""
    if len(images) == 1 and (volumes := count_channels(images[0])) > 1:
        names = tuple(f"images{part}/{identifier}_{number:04d}{ending}" for number in range(volumes))
        sources: tuple[SourceFile, ...] = (SourceFile(images[0], names),)
    else:
        sources = tuple(
            SourceFile(path, (f"images{part}/{identifier}_{number:04d}{ending}",)) for number, path in enumerate(images)
        )
    labelled = None if label is None else SourceFile(label, (f"labels{part}/{identifier}{ending}",), renumbered)
    return SourceCase(identifier, part, sources, labelled, subject)


def all_cases(makers: Iterable[Callable[[], SourceCase]]) -> list[SourceCase]:
    """Call all of them (they read headers). Raises one CaseError about all files that can't be read."""
    cases, problems = [], []
    for make in makers:
        try:
            cases.append(make())
        except CaseError as error:
            problems.append(str(error))
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CaseError(f"{len(problems)} images can't be used:\n  " + "\n  ".join(problems[:20]) + more)
    return cases


def existing_files(paths: Iterable[Path]) -> list[Path]:
    """The files among these. Raises CaseError for links to files that are not there: such a case would be left out unseen."""
    listed = list(paths)
    broken = [path for path in listed if path.is_symlink() and not path.exists()]
    if broken:
        raise CaseError(
            f"{len(broken)} link(s) lead to files that are not there: {some(list(map(str, broken)), 3)}; get the files (in a "
            "git-annex or DataLad folder: git annex get PATH), or remove the links"
        )
    return [path for path in listed if path.is_file()]


def ending_of(path: Path) -> str:
    """The image ending of a file. Raises CaseError for formats we don't read."""
    name = path.name.lower()
    for ending in ENDINGS:
        if name.endswith(ending):
            return ending
    kind = "2D pictures are not supported" if name.endswith(FLAT_IMAGE_ENDINGS) else "not a supported format"
    raise CaseError(f"{path}: {kind}; convert them to one of {', '.join(ENDINGS)}")


def refuse_pictures(paths: Iterable[Path]) -> None:
    """Raise CaseError for the first 2D picture: what is missing may be there in a format that we don't read."""
    for path in paths:
        if path.name.lower().endswith(FLAT_IMAGE_ENDINGS):
            ending_of(path)


def common_ending(paths: Iterable[Path]) -> str:
    """The one that all files have, else ``.nii.gz``, into which the others will be rewritten. Raises CaseError."""
    endings = {ending_of(path) for path in paths}
    return endings.pop() if len(endings) == 1 else ".nii.gz"


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
