"""Copies of a raw dataset whose images all lie the same way. Voxels are only put into another order."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.endings import files_with
from nnssl_adapt.data.images import read_geometry
from nnssl_adapt.data.nifti import IncompleteFile, is_nifti, read_nifti_voxels
from nnssl_adapt.data.pictures import PICTURE_READERS
from nnssl_adapt.data.splits import SPLITS_FILE
from nnssl_adapt.data.voxels import read_itk_image, write_image_file
from nnssl_adapt.errors import CaseError, DatasetError, PreprocessingError
from nnssl_adapt.files import atomic_path, make_folder, write_json
from nnssl_adapt.geometry.orientation import check_code, is_code, is_oriented, opposite, orientation_code
from nnssl_adapt.machine.workers import over_cases
from nnssl_adapt.paths import free_dataset_id, preprocessed_folder, raw_folder
from nnssl_adapt.text import lines_and_more, read_record

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

ORIENTATION_KEY = "image_orientation"
"""Entry of dataset.json with the orientation that a model's images must have: the Spinal Cord Toolbox's, in its convention."""

_OURS = "nnssl_adapt"
_RECORDS = ".nnssl_adapt"
_MARKER = "reorientation.json"
_ID_STEP = 500


def common_orientation(raw: RawDataset) -> str | None:
    """The orientation of all training images, by their headers; None where they lie differently, or one can't be read."""
    if any(case.reader in PICTURE_READERS for case in raw.cases):
        return None
    try:
        directions = [read_geometry(case.images[0], case.reader).direction for case in raw.cases]
    except CaseError:
        return None
    stated = raw.json.raw.get(ORIENTATION_KEY)
    candidates = [str(stated)] if isinstance(stated, str) and is_code(stated) else []
    candidates += [orientation_code(direction) for direction in directions[:1]]
    # Images exactly between two orientations have both: the one that dataset.json names goes first.
    return next((c.upper() for c in candidates if all(is_oriented(d, c) for d in directions)), None)


def reorient_dataset(raw: RawDataset, code: str, workers: int = 2, progress: bool = False) -> RawDataset:
    """Copy a raw dataset so that all its images and labels have the orientation ``code``; the original is never touched.

    The copy lies in ``nnUNet_raw`` as ``DatasetMMM_<Name>_<code>`` (MMM: 500 more, or the next free number). It is found
    again by a second call, which does only what is missing or has changed since. Voxels keep their values, type (but numbers
    that a header scales are stored as they are read, as floats) and place in space; their order in the file changes.
    ``imagesTs`` and ``labelsTs`` come along, as do the folds (``splits_final.json``); dataset.json is copied with all its
    entries, and with ``image_orientation``.

    Args:
        raw: the dataset.
        code: three letters such as ``RPI`` in the Spinal Cord Toolbox's convention (:mod:`nnssl_adapt.geometry.orientation`):
            the sides that the axes x, y, z come from.
        workers: processes, one file each.
        progress: whether to draw a progress bar.

    Raises:
        ConfigurationError: ``code`` is no orientation, or no dataset id is free.
        PreprocessingError: some files could not be copied (the others were).
        OutputError: the folder can't be written, or the disk is full.
    """
    code = check_code(code)
    if raw.image_reader in PICTURE_READERS:
        raise DatasetError(
            f"{raw.name}: pictures and TIFF stacks don't say how they lie, so they can't be reoriented", path=raw.folder
        )
    splits = (preprocessed_folder() / raw.name / SPLITS_FILE, raw.folder / SPLITS_FILE)
    folder = _find_copy(raw, code) or raw_folder() / _new_name(raw.name, code)
    copies = list(_copies(raw, folder))
    _refuse_same_target(copies, raw)
    _write_if_other(folder / _RECORDS / _MARKER, _marker(raw, code))
    _remove_orphans(folder, copies)
    todo = [copy for copy in copies if not copy.is_done(code)]
    if todo:
        logger.info(
            "reorienting %d files of %s to %s (axes x, y, z come from these sides; %s for nibabel and SimpleITK) into %s",
            len(todo),
            raw.name,
            code,
            opposite(code),
            folder,
        )
    problems = []
    for outcome in over_cases(
        reorient_file, [(copy.target.name, (copy, code)) for copy in todo], workers, "reorienting", progress
    ):
        if outcome.error is not None:
            problems.append(f"{outcome.identifier}: {outcome.complaint}")
    if problems:
        raise PreprocessingError(
            f"{len(problems)} of {len(copies)} files of {raw.name} could not be reoriented; correct them and run again:\n"
            + lines_and_more(problems),
            mistakes=problems,
        )
    _copy_splits(splits, folder)
    content = {key: value for key, value in raw.json.raw.items() if key != "dataset"}
    _write_if_other(folder / "dataset.json", {**content, ORIENTATION_KEY: code, _OURS: _marker(raw, code)})
    logger.info("%s is %s with all images %s", folder.name, raw.name, code)
    return RawDataset.open(folder)


@dataclass(frozen=True)
class FileCopy:
    """One file and its reoriented copy, with the note that is left when the copy stands."""

    source: Path
    target: Path

    @property
    def record(self) -> Path:
        """Where the note lies."""
        return self.target.parent.parent / _RECORDS / self.target.parent.name / f"{self.target.name}.json"

    def is_done(self, code: str) -> bool:
        """Whether the copy is whole, in this orientation, and of the source as it is now."""
        if not self.target.is_file() or not self.record.is_file():
            return False
        return read_record(self.record) == self.state(code)

    def state(self, code: str) -> dict[str, Any]:
        """What the note says of a copy that stands."""
        source = self.source.stat()
        return {
            "source": str(self.source),
            "bytes": source.st_size,
            "modified_ns": source.st_mtime_ns,
            "copy_bytes": self.target.stat().st_size,
            "orientation": code,
        }


def reorient_file(copy: FileCopy, code: str) -> None:
    """Write the copy of one image or label file (3D, or 4D with volumes on the fourth axis), whole or not at all.

    Raises CaseError if the source can't be read, OutputError if the copy can't be written.
    """
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    image = _read(copy.source)
    wanted = opposite(code)  # SimpleITK names the sides that axes go to
    if image.GetDimension() == 4:
        volumes = [sitk.DICOMOrient(image[..., index], wanted) for index in range(image.GetSize()[3])]
        turned = sitk.JoinSeries(volumes, image.GetOrigin()[3], image.GetSpacing()[3])
    else:
        turned = sitk.DICOMOrient(image, wanted)
    for key in image.GetMetaDataKeys():
        if key == "descrip":  # ITK fills in the rest of the header from the new geometry
            turned.SetMetaData(key, image.GetMetaData(key))
    _refuse_other_orientation(copy, turned, code)
    write_image_file(turned, copy.target)
    write_json(copy.record, copy.state(code))


def _read(path: Path) -> sitk.Image:
    """The image with its own number type. SimpleITK reads truncated NIfTI files without a word, so those are read twice."""
    read_geometry(path)  # says what is wrong with a file that is none, and with flat or odd images
    image = read_itk_image(path)
    try:
        if is_nifti(path):
            read_nifti_voxels(path, tuple(image.GetSize()[::-1]))
    except IncompleteFile as error:
        raise CaseError(f"{path} is truncated or damaged ({error}): copy or download it again") from None
    return image


def _refuse_other_orientation(copy: FileCopy, turned: sitk.Image, code: str) -> None:
    direction = np.asarray(turned.GetDirection()).reshape(turned.GetDimension(), -1)[:3, :3].ravel()
    if not is_oriented(direction.tolist(), code):
        raise CaseError(
            f"{copy.source} became {orientation_code(direction.tolist())} instead of {code}; please report this image"
        )


# -- which files, and where to ---------------------------------------------------------------------------------------


def _copies(raw: RawDataset, folder: Path) -> Iterator[FileCopy]:
    """Every image and label, training and test, under nnU-Net's names. Files of an explicit list get those names too."""
    ending = raw.file_ending
    for case in raw.cases:
        for channel, path in enumerate(case.images):
            yield FileCopy(path, folder / "imagesTr" / f"{case.identifier}_{channel:04d}{ending}")
        if case.label is not None:
            yield FileCopy(case.label, folder / "labelsTr" / f"{case.identifier}{ending}")
    for part in ("imagesTs", "labelsTs"):
        for stem, path in files_with(raw.folder / part, ending).items():
            if path.is_file():
                yield FileCopy(path, folder / part / f"{stem}{ending}")


def _refuse_same_target(copies: list[FileCopy], raw: RawDataset) -> None:
    sources: dict[Path, Path] = {}
    for copy in copies:
        if sources.setdefault(copy.target, copy.source) != copy.source:
            raise DatasetError(
                f"{raw.name}: {sources[copy.target]} and {copy.source} would both become {copy.target.name}; rename a case"
            )


def _new_name(name: str, code: str) -> str:
    number = free_dataset_id(int(name[7:10]) + _ID_STEP if name[7:10].isdigit() else _ID_STEP)
    short = name.partition("_")[2] or name
    return f"Dataset{number:03d}_{short}_{code}"


def _marker(raw: RawDataset, code: str) -> dict[str, str]:
    return {"reoriented_from": raw.name, "orientation": code}


def _find_copy(raw: RawDataset, code: str) -> Path | None:
    """The copy that an earlier call made or began."""
    for folder in sorted(raw_folder().glob("Dataset[0-9][0-9][0-9]_*")):
        for path, keys in ((folder / _RECORDS / _MARKER, ()), (folder / "dataset.json", (_OURS,))):
            if _entry(path, keys) == _marker(raw, code):
                return folder
    return None


def _entry(path: Path, keys: tuple[str, ...] = ()) -> Any:
    """An entry of a JSON file, or None where there is none."""
    content: Any = read_record(path)
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _remove_orphans(folder: Path, copies: list[FileCopy]) -> None:
    """Remove copies that we made of files which are no longer in the dataset, or they would be trained on."""
    wanted = {copy.record for copy in copies}
    for record in sorted((folder / _RECORDS).glob("*/*.json")):
        if record in wanted:
            continue
        target = folder / record.parent.name / record.name.removesuffix(".json")
        logger.warning("%s is of a file that is no longer in the dataset: removed", target)
        target.unlink(missing_ok=True)
        record.unlink()


def _copy_splits(candidates: Sequence[Path], folder: Path) -> None:
    """The folds that are in use, so that models of both datasets can be compared; edited ones are left alone."""
    for source in candidates:
        if source.is_file() and not (folder / SPLITS_FILE).exists():
            make_folder(folder)
            with atomic_path(folder / SPLITS_FILE) as temporary:
                shutil.copyfile(source, temporary)


def _write_if_other(path: Path, content: dict[str, Any]) -> None:
    if _entry(path) != content:
        write_json(path, content)
