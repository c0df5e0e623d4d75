"""Raw datasets in nnU-Net's format: ``DatasetNNN_Name/{dataset.json, imagesTr, labelsTr}``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from nnssl_adapt.data.endings import files_with, stem_of
from nnssl_adapt.data.images import READERS, SIMPLE_ITK, count_channels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.pictures import LOSSY_ENDINGS, PICTURE_READERS, check_packages, reader_for_ending
from nnssl_adapt.errors import CaseError, DatasetError, DatasetJsonError, DatasetNotFound
from nnssl_adapt.paths import find_dataset_name, raw_folder
from nnssl_adapt.text import and_more, lines_and_more, read_json

_OTHER_PICTURES = (".gif", ".webp")

MAX_LISTED = 20
"""How many bad files one error message names."""


class DatasetJson(BaseModel):
    """``dataset.json``, checked; keys that we don't know are kept.

    Attributes:
        channel_names: channel number (as text) → name, by number; files before nnU-Net 2 call this ``modality``.
        labels: see :class:`LabelScheme`.
        file_ending: of images and labels, e.g. ``.nii.gz``.
        num_training: how many training cases there should be (``numTraining``).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    channel_names: dict[str, str] = Field(validation_alias=AliasChoices("channel_names", "modality"), min_length=1)
    labels: dict[str, Any]
    file_ending: str = Field(pattern=r"^\..+")
    num_training: int | None = Field(default=None, validation_alias="numTraining")
    regions_class_order: list[int] | None = None
    overwrite_image_reader_writer: str | None = None
    dataset: dict[str, Any] | None = None

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("channel_names")
    @classmethod
    def _by_number(cls, names: dict[str, str]) -> dict[str, str]:
        """In the order of the channels' numbers, whatever order the file has: the names of images say numbers."""
        if not all(key.isascii() and key.isdecimal() for key in names):
            raise ValueError("keys must be numbers")
        return dict(sorted(names.items(), key=lambda item: int(item[0])))

    @property
    def image_reader(self) -> str | None:
        """The reader that the file asks for; None where it leaves the choice."""
        asked = self.overwrite_image_reader_writer
        return None if asked in (None, "None") else asked

    @property
    def raw(self) -> dict[str, Any]:
        """The file's exact content."""
        return self._raw

    @classmethod
    def load(cls, path: str | Path) -> DatasetJson:
        """Read and check a file. Raises DatasetJsonError naming the file, every wrong key, and what was expected."""
        path = Path(path)
        if not path.is_file():
            raise DatasetJsonError(
                f"{path} is missing: every dataset needs it, with channel_names, labels, numTraining and file_ending",
                path=path,
            )
        content = read_json(path, DatasetJsonError, "dataset.json")
        return cls.from_content(content, path)

    @classmethod
    def from_content(cls, content: dict[str, Any], where: str | Path = "dataset.json") -> DatasetJson:
        """Check what was read from a file called ``where``."""
        try:
            result = cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(_explained(detail) for detail in error.errors())
            raise DatasetJsonError(f"{where}: {problems}") from None
        LabelScheme.from_dataset_json(content, where)
        result._raw = content
        return result


def _explained(detail: Mapping[str, Any]) -> str:
    """One pydantic complaint in dataset.json's words."""
    key = str(detail["loc"][0])
    inside = "".join(f"[{part!r}]" for part in detail["loc"][1:])
    expected = {
        "channel_names": "channel numbers with names, e.g. {'0': 'T1'}",
        "labels": "names with numbers, e.g. {'background': 0, 'tumour': 1}",
        "file_ending": "an ending with its dot, e.g. '.nii.gz'",
        "numTraining": "the number of training cases",
        "regions_class_order": "a list of whole numbers",
        "dataset": "cases with their 'images' and 'label'",
    }.get(key, "another kind of value")
    if detail["type"] == "missing":
        return f"key {key!r} is missing: {expected}"
    return f"key {key!r}{inside} must be {expected}; got {detail.get('input')!r}"


@dataclass(frozen=True)
class RawCase:
    """The files of one case.

    Attributes:
        identifier: its name.
        images: a file for each channel, in order, or one 4D file.
        label: None when predicting.
        reader: nnU-Net's name of the reader for all of them, one of :data:`nnssl_adapt.data.images.READERS`.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None = None
    reader: str = SIMPLE_ITK

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset: its files exist, its ``dataset.json`` is right; the images' content is :func:`verify_dataset`'s."""

    folder: Path
    json: DatasetJson
    labels: LabelScheme
    cases: tuple[RawCase, ...]

    @classmethod
    def open(cls, dataset: int | str | Path) -> RawDataset:
        """Open a dataset given by id (41), name (``Dataset041_DeepGrey``) or folder.

        Training cases come sorted by name as in nnU-Net; a ``dataset`` entry in dataset.json lists them explicitly.

        Raises:
            DatasetNotFound: no such dataset; names those that exist.
            DatasetJsonError: dataset.json is missing or wrong.
            CaseError: channel or label files are missing (lists them).
            DatasetError: a kind of dataset that is not supported (labels in a lossy format, other image readers).
        """
        folder = _dataset_folder(dataset)
        path = folder / "dataset.json"
        description = DatasetJson.load(path)
        refuse_unsupported(description, path)
        labels = LabelScheme.from_dataset_json(description.raw, path)
        channels = len(description.channel_names)
        listed = description.dataset is not None
        if description.dataset is not None:
            cases = listed_cases(description.dataset, folder, path)
        else:
            cases = _training_cases(folder, description.file_ending)
        cases = read_as_asked(cases, description)
        _refuse_incomplete(cases, channels, folder, None if listed else description.file_ending)
        return cls(folder=folder, json=description, labels=labels, cases=cases)

    def read_with(self, reader: str) -> RawDataset:
        """The same dataset, its images read as nnU-Net's ``reader`` does. Raises DatasetError for readers that are not here."""
        if reader not in READERS:
            raise DatasetError(f"images can't be read as nnU-Net's {reader!r}; expected one of {', '.join(READERS)}")
        return replace(self, cases=tuple(replace(case, reader=reader) for case in self.cases))

    @property
    def image_reader(self) -> str | None:
        """The reader that its images need; None where nothing says so and any that reads their format will do."""
        reader = self.cases[0].reader if self.cases else SIMPLE_ITK
        return self.json.image_reader or (reader if reader in PICTURE_READERS else None)

    @property
    def name(self) -> str:
        """``DatasetNNN_Name``."""
        return self.folder.name

    @property
    def num_channels(self) -> int:
        """Image channels of a case."""
        return len(self.json.channel_names)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels, in order."""
        return tuple(self.json.channel_names.values())

    @property
    def file_ending(self) -> str:
        """Ending of images and labels, e.g. ``.nii.gz``."""
        return self.json.file_ending

    def __str__(self) -> str:
        return f"{self.name}: {len(self.cases)} cases, {self.num_channels} channel(s), {len(self.labels.foreground)} classes"


def read_as_asked(cases: Sequence[RawCase], description: DatasetJson) -> tuple[RawCase, ...]:
    """The cases with the reader that dataset.json asks for, or that their ending needs."""
    example = next((path for case in cases for path in case.images if path.is_file()), None)
    reader = description.image_reader or reader_for_ending(description.file_ending, example)
    return tuple(cases) if reader is None else tuple(replace(case, reader=reader) for case in cases)


def find_images(folder: str | Path, file_ending: str, num_channels: int) -> tuple[RawCase, ...]:
    """Find the images to predict in a folder: ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, ... for each case.

    Raises CaseError when the folder is missing or empty, and listing every case that lacks a channel.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CaseError(f"{folder}: no such folder")
    groups = _grouped_images(folder, file_ending)
    if not groups:
        raise CaseError(f"{folder} has no images: expected names like CASE_0000{file_ending}")
    cases = tuple(RawCase(identifier, images) for identifier, images in groups.items())
    _refuse_incomplete(cases, num_channels, folder, file_ending)
    return cases


def _dataset_folder(dataset: int | str | Path) -> Path:
    if not isinstance(dataset, int):
        folder = Path(dataset).expanduser()
        if folder.is_dir() and ((folder / "dataset.json").is_file() or len(folder.parts) > 1):
            return folder.resolve()
        if isinstance(dataset, Path) or os.sep in dataset:
            raise DatasetNotFound(f"{folder}: no such dataset folder")
    name = find_dataset_name(dataset)
    folder = raw_folder() / name
    if not folder.is_dir():
        raise DatasetNotFound(f"{name} is known, but {folder} does not exist: is nnUNet_raw the right folder?")
    return folder


def refuse_unsupported(description: DatasetJson, path: Path) -> None:
    """Raise DatasetError for kinds of datasets that are not supported: labels in lossy formats, other image readers.

    Raises ConfigurationError for pictures where the packages that read them are not installed.
    """
    ending = description.file_ending.lower()
    if ending in LOSSY_ENDINGS:
        raise DatasetError(
            f"{path}: 'file_ending' {description.file_ending!r}: JPEG changes numbers, so labels can't be stored in it: convert "
            "images and labels to .png, or list .jpg images with .png labels in 'dataset' of dataset.json",
            path=path,
        )
    if ending in _OTHER_PICTURES:
        raise DatasetError(
            f"{path}: 'file_ending' {description.file_ending!r} is not read by nnU-Net; pictures are .png, .bmp, .tif",
            path=path,
        )
    if (description.image_reader or reader_for_ending(ending, None)) in PICTURE_READERS:
        check_packages()
    if description.image_reader not in (None, *READERS):
        raise DatasetError(
            f"{path}: 'overwrite_image_reader_writer' {description.image_reader!r} is not supported; expected one of "
            f"{', '.join(READERS)} or no such key",
            path=path,
        )


def listed_cases(listing: Mapping[str, Any], folder: Path, path: Path) -> tuple[RawCase, ...]:
    """Cases of an explicit ``dataset`` entry; relative paths start at the dataset's folder, $VARIABLES are filled in.

    Raises DatasetJsonError naming ``path`` for a wrong entry. Whether the files exist is not looked at.
    """

    def located(name: str) -> Path:
        return Path(os.path.abspath(folder / os.path.expandvars(name)))  # noqa: PTH100 (resolve() would follow links)

    cases = []
    for identifier, entry in listing.items():
        try:
            images, label = entry["images"], entry["label"]
            if not isinstance(images, list) or not images:
                raise TypeError
            cases.append(RawCase(identifier, tuple(located(i) for i in images), located(label)))
        except (KeyError, TypeError):
            raise DatasetJsonError(
                f"{path}: 'dataset': {identifier!r} must be {{'images': [file, ...], 'label': file}}, got {entry!r}"
            ) from None
    if not cases:
        raise DatasetJsonError(f"{path}: 'dataset' lists no cases")
    return tuple(cases)


def _training_cases(folder: Path, file_ending: str) -> tuple[RawCase, ...]:
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).is_dir():
            raise CaseError(f"{folder} has no folder {name}: training images go to imagesTr, labels to labelsTr")
    groups = _grouped_images(folder / "imagesTr", file_ending)
    if not groups:
        raise CaseError(f"{folder / 'imagesTr'} has no images: expected names like CASE_0000{file_ending}")
    labels = files_with(folder / "labelsTr", file_ending)
    return tuple(
        RawCase(identifier, images, labels.get(identifier, folder / "labelsTr" / f"{identifier}{file_ending}"))
        for identifier, images in groups.items()
    )


def _grouped_images(folder: Path, file_ending: str) -> dict[str, tuple[Path, ...]]:
    """Channel files of every case, sorted; hidden files are passed over."""
    pattern = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})(?i:" + re.escape(file_ending) + ")")
    groups: dict[str, list[Path]] = {}
    badly_named = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or stem_of(path.name, file_ending) is None:
            continue
        match = pattern.fullmatch(path.name)
        if match is None:
            badly_named.append(f"{path}: expected a name like CASE_0000{file_ending} (case, channel in four digits)")
        else:
            groups.setdefault(match["case"], []).append(path)
    _raise_listing(badly_named, f"badly named images in {folder}")
    return {identifier: tuple(groups[identifier]) for identifier in sorted(groups)}


def _refuse_incomplete(cases: Iterable[RawCase], channels: int, folder: Path, file_ending: str | None) -> None:
    """Raise CaseError listing what is missing; ``file_ending`` is None where file names are free (explicit lists)."""
    problems = []
    for case in cases:
        for path in case.files:
            if not path.is_file():
                kind = "label" if path == case.label else "image"
                problems.append(f"{case.identifier}: {kind} {path} is missing")
        problems += _channel_problems(case, channels, file_ending)
    _raise_listing(problems, f"missing files in {folder}")


def _channel_problems(case: RawCase, channels: int, file_ending: str | None) -> list[str]:
    if case.reader in PICTURE_READERS and all(path.is_file() for path in case.images):
        return colour_problems(case, channels)
    if (
        len(case.images) == 1
        and channels > 1
        and case.images[0].is_file()
        and count_channels(case.images[0], case.reader) == channels
    ):
        return []  # one 4D file with all channels, which nnU-Net's reader takes as well
    if file_ending is None:
        if len(case.images) == channels:
            return []
        return [f"{case.identifier}: has {len(case.images)} image files, expected {channels} (one a channel)"]
    folder = case.images[0].parent
    expected = {f"{case.identifier}_{channel:04d}": channel for channel in range(channels)}
    given = [stem_of(path.name, file_ending) for path in case.images]
    missing = [
        f"{case.identifier}: channel file {folder / f'{stem}{file_ending}'} is missing"
        for stem in expected
        if stem not in given
    ]
    doubled = [path for path, stem in zip(case.images, given, strict=True) if given.count(stem) > 1]
    if doubled:
        missing.append(f"{case.identifier}: {and_more(doubled)} differ only in their ending's case: leave one")
    extra = [path for path, stem in zip(case.images, given, strict=True) if stem not in expected]
    return missing + [
        f"{case.identifier}: {path} is not one of the {channels} channels in dataset.json" for path in extra
    ]


def colour_problems(case: RawCase, channels: int) -> list[str]:
    """What is wrong with the colours of a case's pictures, which together must be the channels of dataset.json.

    Raises CaseError for a picture that can't be read.
    """
    counts = [count_channels(path, case.reader) for path in case.images]
    if sum(counts) == channels:
        return []
    held = ", ".join(f"{path.name}: {count}" for path, count in zip(case.images, counts, strict=True))
    return [
        f"{case.identifier}: its pictures have {sum(counts)} channel(s) ({held}), dataset.json has {channels}; grey pictures "
        "have one, RGB three, RGBA four"
    ]


def _raise_listing(problems: Sequence[str], title: str) -> None:
    if problems:
        raise CaseError(f"{title}:\n" + lines_and_more(problems), mistakes=problems)
