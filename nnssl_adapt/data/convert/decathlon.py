"""The Medical Segmentation Decathlon's folders, and tasks of nnU-Net's first version, which look alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nnssl_adapt.data.convert.cases import (
    SourceCase,
    SourceFile,
    Target,
    all_cases,
    existing_files,
    refuse_pictures,
    some,
    training_case,
)
from nnssl_adapt.data.convert.conversion import convert_cases
from nnssl_adapt.data.dataset import DatasetJson, RawDataset
from nnssl_adapt.data.endings import files_with, stem_of
from nnssl_adapt.errors import CaseError, DatasetJsonError, DatasetNotFound
from nnssl_adapt.files import write_json
from nnssl_adapt.text import read_json

logger = logging.getLogger(__name__)

_ENDING = ".nii.gz"
_PARTS = ("Tr", "Ts", "Val")


def convert_msd(folder: str | Path, target: Target, workers: int = 1, progress: bool | None = None) -> RawDataset:
    """Convert a Decathlon task (``imagesTr``, ``imagesTs``, ``labelsTr``, ``dataset.json``; 4D images become a file a channel).

    The result is that of ``nnUNetv2_convert_MSD_dataset`` (nnunetv2 2.8.1), but ``imagesTs`` may be missing.
    Raises DatasetNotFound, DatasetJsonError, CaseError, and what :func:`convert_cases` raises.
    """
    root = _opened(folder)
    content = _translated(root, dropped=("training", "test"))
    images, labels = ({path.name: path for path in _files(root / part)} for part in ("imagesTr", "labelsTr"))
    _refuse_lonely(images, labels)
    makers = [partial(training_case, _stem(image), [image], labels[name], _ENDING) for name, image in images.items()]
    makers += [
        partial(training_case, _stem(image), [image], None, _ENDING, part="Ts")
        for image in _files(root / "imagesTs", optional=True)
    ]
    cases = all_cases(makers)
    return _converted("msd", root, target, cases, content, workers, progress)


def convert_nnunetv1(folder: str | Path, target: Target, workers: int = 1, progress: bool | None = None) -> RawDataset:
    """Convert a task of nnU-Net 1 (3D, or 2D data stored as volumes of one slice), as ``nnUNetv2_convert_old_nnUNet_dataset``.

    Every file keeps its name; ``imagesTs``, ``labelsTs``, ``imagesVal`` and ``labelsVal`` come along where they are.
    Raises DatasetNotFound, DatasetJsonError, CaseError, and what :func:`convert_cases` raises.
    """
    root = _opened(folder)
    content = _translated(root, dropped=("tensorImageSize", "numTest", "training", "test"))
    cases = [case for part in _PARTS for case in _v1_cases(root, part)]
    return _converted("nnunetv1", root, target, cases, content, workers, progress)


def _v1_cases(root: Path, part: str) -> list[SourceCase]:
    groups: dict[str, list[Path]] = {}
    for path in _files(root / f"images{part}", optional=part != "Tr"):
        stem = _stem(path)
        name, _, channel = stem.rpartition("_")
        if not name or len(channel) != 4 or not channel.isdigit():
            raise CaseError(
                f"{path}: expected a name like CASE_0000{_ENDING}. Is this a Decathlon folder? Then: nnssl-adapt convert msd"
            )
        groups.setdefault(name, []).append(path)
    labels = {_stem(p): p for p in _files(root / f"labels{part}", optional=part != "Tr")}
    if part == "Tr":
        _refuse_lonely({name: paths[0] for name, paths in groups.items()}, labels)
    return [
        SourceCase(
            name,
            part,
            tuple(SourceFile(path, (f"images{part}/{_stem(path)}{_ENDING}",)) for path in paths),
            SourceFile(labels[name], (f"labels{part}/{name}{_ENDING}",)) if name in labels else None,
        )
        for name, paths in sorted(groups.items())
    ]


def _stem(path: Path) -> str:
    return stem_of(path.name, _ENDING) or path.name


def _refuse_lonely(images: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    """Images and labels by the name that they must share."""
    lonely = [f"{images[name]} has no label" for name in images if name not in labels]
    lonely += [f"{labels[name]} has no image" for name in labels if name not in images]
    if lonely:
        raise CaseError(f"{len(lonely)} files have no partner:\n  " + "\n  ".join(lonely[:20]))


def _refuse_other_channels(cases: Sequence[SourceCase], count: int) -> None:
    """What dataset.json says must be there: channels 0, 1, … of every case."""
    bad = []
    for case in cases:
        channels = [int(name.removesuffix(_ENDING)[-4:]) for name in case.image_targets]
        if channels != list(range(count)):
            bad.append(f"{case.images[0].source} gives channel(s) {', '.join(map(str, channels))}")
    if bad:
        raise CaseError(f"'modality' in dataset.json names {count} channel(s), but {some(bad, 5)}")


def _converted(
    kind: str,
    root: Path,
    target: Target,
    cases: list[SourceCase],
    content: dict[str, Any],
    workers: int,
    progress: bool | None,
) -> RawDataset:
    description = DatasetJson.from_content(content, root / "dataset.json")
    _refuse_other_channels(cases, len(description.channel_names))
    number = sum(case.part == "Tr" for case in cases)
    if description.num_training not in (None, number):
        logger.warning(
            "%s: 'numTraining' is %d, but there are %d cases: the new one says %d",
            root / "dataset.json",
            description.num_training,
            number,
            number,
        )
        content = {**content, "numTraining": number}
    convert_cases(kind, str(root), target, cases, workers, progress)
    write_json(target.folder / "dataset.json", content)
    return RawDataset.open(target.folder)


def _opened(folder: str | Path) -> Path:
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise DatasetNotFound(f"{root}: no such folder")
    for name in ("imagesTr", "labelsTr"):
        if not (root / name).is_dir():
            raise DatasetNotFound(f"{root} has no folder {name}: give the task's folder, e.g. Task05_Prostate")
    return root


def _files(folder: Path, optional: bool = False) -> list[Path]:
    """Images of a folder; the Decathlon's archives carry ``._*`` files of macOS, which are none."""
    found = existing_files(p for p in files_with(folder, _ENDING).values() if not p.name.startswith("_"))
    if not found and not optional:
        refuse_pictures(folder.iterdir())
        raise CaseError(f"{folder} has no {_ENDING} files")
    return found


def _translated(root: Path, dropped: tuple[str, ...]) -> dict[str, Any]:
    """The old dataset.json in nnU-Net 2's words: labels name → value, ``modality`` called ``channel_names``."""
    path = root / "dataset.json"
    try:
        content = read_json(path, DatasetJsonError, "dataset.json")
        if "channel_names" in content:
            raise DatasetJsonError(f"{path} is in nnU-Net 2's format already: put the folder into nnUNet_raw as it is")
        labels = {str(name): int(value) for value, name in content["labels"].items()}
        if len(labels) < len(content["labels"]):
            raise DatasetJsonError(f"{path}: two labels have the same name: {', '.join(content['labels'].values())}")
        channels = content["modality"]
    except FileNotFoundError:
        raise DatasetJsonError(f"{path} is missing") from None
    except KeyError as error:
        raise DatasetJsonError(f"{path}: key {error} is missing; the old format has 'labels' and 'modality'") from None
    except (TypeError, AttributeError):
        raise DatasetJsonError(
            f"{path}: 'labels' must map numbers to names in the old format, e.g. {{'0': 'background', '1': 'cord'}}"
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetJsonError(
            f"{path} can't be read in the old format (JSON, labels as {{'0': 'background'}}): {error}"
        ) from error
    kept = {key: value for key, value in content.items() if key not in (*dropped, "modality")}
    return {**kept, "labels": labels, "file_ending": _ENDING, "channel_names": channels}
