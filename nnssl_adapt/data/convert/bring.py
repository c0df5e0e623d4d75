"""One source file on its way into a dataset: linked, copied, written in another format, renumbered or split."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from nnssl_adapt.data.convert.cases import SourceFile, Target, ending_of, some
from nnssl_adapt.data.images import distinct_values, read_and_repair_labels, read_image, write_labels
from nnssl_adapt.data.voxels import open_image, read_itk_image, write_image_file
from nnssl_adapt.errors import CaseError, OutputError
from nnssl_adapt.files import TEMPORARY_PREFIX, atomic_path, explain_write_errors, make_folder


def bring(file: SourceFile, target: Target) -> None:
    """Link, copy, rewrite in another format, renumber, or split one file.

    Raises CaseError for a source that can't be read, OutputError when the target can't be written whole.
    """
    places = [target.folder / name for name in file.targets]
    if len(places) > 1 or (file.targets[0].startswith("images") and _is_4d(file.source)):
        read_image([file.source])  # a truncated 4D file would otherwise be filled up with zeros
        image = read_itk_image(file.source)
        for number, place in enumerate(places):
            write_image_file(image[..., number], place)
    elif file.renumbered or _is_inexact(file):
        _write_repaired(file, places[0])
    elif ending_of(file.source) != ending_of(places[0]):
        read_image([file.source])
        write_image_file(read_itk_image(file.source), places[0])
    elif target.link is None:
        if file.targets[0].startswith("images"):
            read_image([file.source])  # what is damaged should not be found out in training
        with atomic_path(places[0]) as temporary:
            shutil.copyfile(file.source, temporary)
    else:
        _link(file.source, places[0], target.link)


def _write_repaired(file: SourceFile, place: Path) -> None:
    """Labels a rounding error away from whole numbers are repaired too, whether or not they get other numbers."""
    labels, geometry, _ = read_and_repair_labels(file.source)
    if not file.renumbered:
        write_labels(place, labels[0], geometry)
        return
    new_value = dict(file.renumbered)
    unknown = [value for value in distinct_values(labels) if value not in new_value]
    if unknown:
        raise CaseError(f"{file.source} has label value(s) {some(list(map(str, unknown)))} without a name")
    renumbered = np.zeros_like(labels[0])
    for old, new in file.renumbered:
        renumbered[labels[0] == old] = new
    write_labels(place, renumbered, geometry)


def _is_inexact(file: SourceFile) -> bool:
    """Whether these are labels with values such as 0.99999, which must be written again."""
    return file.targets[0].startswith("labels") and read_and_repair_labels(file.source)[2] > 0


def _is_4d(path: Path) -> bool:
    return bool(open_image(path).GetDimension() == 4)


def _link(source: Path, place: Path, kind: str) -> None:
    """A link under a temporary name first, so that an older file is replaced in one step."""
    make_folder(place.parent)
    with explain_write_errors(place), tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=place.parent) as folder:
        temporary = Path(folder) / place.name
        try:
            if kind == "symbolic":
                temporary.symlink_to(source.resolve())
            else:
                os.link(source.resolve(), temporary)
        except OSError as error:
            raise OutputError(
                f"can't make a {kind} link {place} to {source} ({error.strerror}): leave --link out to copy"
            ) from error
        temporary.replace(place)
