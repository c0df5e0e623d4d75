"""The Medical Segmentation Decathlon's folders, and tasks of nnU-Net's first version, which look alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnssl_adapt.data.convert.conversion import SourceCase, SourceFile, Target, convert_cases, training_case
from nnssl_adapt.data.dataset import DatasetJson, RawDataset
from nnssl_adapt.errors import CaseError, DatasetJsonError, DatasetNotFound
from nnssl_adapt.files import write_json

_ENDING = ".nii.gz"
_PARTS = ("Tr", "Ts", "Val")


def convert_msd(folder: str | Path, target: Target, workers: int = 1, progress: bool | None = None) -> RawDataset:
    """Convert a Decathlon task (``imagesTr``, ``imagesTs``, ``labelsTr``, ``dataset.json``; 4D images become a file a channel).

    The result is that of ``nnUNetv2_convert_MSD_dataset`` (nnunetv2 2.8.1), but ``imagesTs`` may be missing.
    Raises DatasetNotFound, DatasetJsonError, CaseError, and what :func:`convert_cases` raises.
    """
    root = _opened(folder)
    content = _translated(root, dropped=("training", "test"))
    cases = []
    for image in _files(root / "imagesTr"):
        label = root / "labelsTr" / image.name
        if not label.is_file():
            raise CaseError(f"{image} has no label: {label} is missing")
        cases.append(training_case(image.name.removesuffix(_ENDING), [image], label, _ENDING))
    for image in _files(root / "imagesTs", optional=True):
        cases.append(training_case(image.name.removesuffix(_ENDING), [image], None, _ENDING, part="Ts"))
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
        stem = path.name.removesuffix(_ENDING)
        name, _, channel = stem.rpartition("_")
        if not name or len(channel) != 4 or not channel.isdigit():
            raise CaseError(
                f"{path}: expected a name like CASE_0000{_ENDING}. Is this a Decathlon folder? Then: nnssl-adapt convert msd"
            )
        groups.setdefault(name, []).append(path)
    labels = {p.name.removesuffix(_ENDING): p for p in _files(root / f"labels{part}", optional=part != "Tr")}
    if part == "Tr":
        for name in sorted(groups.keys() ^ labels.keys()):
            lonely = groups[name][0] if name in groups else labels[name]
            raise CaseError(f"{lonely}: case {name} has no {'label' if name in groups else 'image'}")
    return [
        SourceCase(
            name,
            part,
            tuple(SourceFile(path, (f"images{part}/{path.name}",)) for path in paths),
            SourceFile(labels[name], (f"labels{part}/{labels[name].name}",)) if name in labels else None,
        )
        for name, paths in sorted(groups.items())
    ]


def _converted(
    kind: str,
    root: Path,
    target: Target,
    cases: list[SourceCase],
    content: dict[str, Any],
    workers: int,
    progress: bool | None,
) -> RawDataset:
    DatasetJson.from_content(content, root / "dataset.json")
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
    found = sorted(folder.glob(f"*{_ENDING}")) if folder.is_dir() else []
    found = [path for path in found if path.is_file() and not path.name.startswith((".", "_"))]
    if not found and not optional:
        raise CaseError(f"{folder} has no {_ENDING} files")
    return found


def _translated(root: Path, dropped: tuple[str, ...]) -> dict[str, Any]:
    """The old dataset.json in nnU-Net 2's words: labels name → value, ``modality`` called ``channel_names``."""
    path = root / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = {str(name): int(value) for value, name in content["labels"].items()}
        channels = content["modality"]
    except FileNotFoundError:
        raise DatasetJsonError(f"{path} is missing") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetJsonError(f"{path}: expected the old format with 'labels' and 'modality', lacks {error}") from None
    except (OSError, ValueError) as error:
        raise DatasetJsonError(
            f"{path} can't be read in the old format (JSON, labels as {{'0': 'background'}}): {error}"
        ) from error
    kept = {key: value for key, value in content.items() if key not in (*dropped, "modality")}
    return {**kept, "labels": labels, "file_ending": _ENDING, "channel_names": channels}
