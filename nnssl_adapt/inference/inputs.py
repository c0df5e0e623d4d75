"""What a caller gives to predict (folders, files, arrays, SimpleITK images), as tasks of one image each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import NIBABEL_REORIENT, SIMPLE_ITK, ImageGeometry, geometry_problems
from nnssl_adapt.data.nifti import is_nifti
from nnssl_adapt.data.pictures import PICTURE_ENDINGS, PICTURE_READERS, TIFF_3D, TIFF_ENDINGS
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.inference.model_folder import NIBABEL_ORIENTATION, ModelFolder
from nnssl_adapt.inference.pairing import (
    ChannelOrder,
    Pairing,
    case_and_channel,
    channel_order,
    pair_files,
    pair_folder,
)
from nnssl_adapt.inference.task import IMAGE_ENDINGS, ImageTask
from nnssl_adapt.text import and_more, lines_and_more

logger = logging.getLogger(__name__)

Images = np.ndarray | sitk.Image | str | Path | Sequence[str | Path] | Sequence[sitk.Image]
"""What can be predicted: an array, SimpleITK images, a folder, a file, or files."""


@dataclass(frozen=True)
class Inputs:
    """What is to be predicted.

    Attributes:
        tasks: the images.
        refused: identifier → what is wrong with the files of an image that can't be one.
        several: whether more than one image was asked for, or a folder.
    """

    tasks: list[ImageTask]
    refused: dict[str, CaseError] = field(default_factory=dict)
    several: bool = False


def gather_inputs(
    model: ModelFolder,
    images: Images,
    output: Path | None,
    geometry: ImageGeometry | None = None,
    spacing: Sequence[float] | None = None,
    keep_folders: bool = False,
    keep_orientation: bool = False,
) -> Inputs:
    """Work out the single images, see :meth:`nnssl_adapt.inference.predictor.Predictor.predict`.

    Raises CaseError when there is nothing to predict, and ConfigurationError when input and output don't go together;
    above all when an image would be overwritten.
    """
    if not isinstance(images, np.ndarray) and (geometry is not None or spacing is not None):
        raise ConfigurationError("geometry and spacing go with arrays; files have their own")
    orientation = None if keep_orientation else model.image_orientation
    if is_in_memory(images):
        if not isinstance(images, np.ndarray):
            images, geometry = from_simpleitk(images)  # type: ignore[arg-type]
        if geometry is None:
            orientation = None  # nothing tells how the array lies
        loaded = checked_array(model, images, geometry, spacing)
        if output is not None and not is_image_file(output):
            raise ConfigurationError(
                f"an array has no name: give an output file, e.g. {output}/case{model.file_ending}"
            )
        return Inputs([ImageTask("array", (), output, loaded, orientation=orientation)])
    pairing, several = _paired(model, images, output, keep_folders)
    if not pairing.cases:
        listed = lines_and_more([str(error) for error in pairing.refused.values()], indent="" if not several else "  ")
        raise CaseError(f"{listed}\n{expected_channels(model)}", mistakes=[str(e) for e in pairing.refused.values()])
    if several and output is not None and (is_image_file(output) or output.is_file()):
        raise ConfigurationError(f"several images need an output folder, got {output}")
    tasks = [_task(model, case, output, keep_orientation) for case in pairing.cases]
    return Inputs(tasks, pairing.refused, several)


def _paired(model: ModelFolder, images: Any, output: Path | None, keep_folders: bool) -> tuple[Pairing, bool]:
    """The cases that a folder or files hold, and whether there are several of them, or a folder was given."""
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        folder = Path(images)
        if output is not None and output.resolve() == folder.resolve():
            raise ConfigurationError(f"{output} is the folder of the images: choose another output")
        pictures = PICTURE_ENDINGS if model.image_reader in PICTURE_READERS else ()
        endings = (*IMAGE_ENDINGS, *pictures, model.file_ending.lower())
        files = [
            path
            for path in folder.iterdir()
            if not path.name.startswith(".") and path.name.lower().endswith(endings) and not path.is_dir()
        ]
        if not files:
            raise CaseError(f"{folder} has no images: expected names like CASE_0000{model.file_ending}", path=folder)
        order = channel_order(folder, model.channel_names)
        return order.applied(pair_folder(folder, files, order.names, model.image_reader)), True
    files = [Path(images)] if isinstance(images, (str, Path)) else [Path(str(file)) for file in images]
    if not files:
        raise CaseError("no image was given")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise CaseError(f"no such file or folder: {and_more(missing)}", path=missing[0])
    order, folders = ChannelOrder.of(model.channel_names), {file.absolute().parent for file in files}
    if len(folders) == 1 and all(case_and_channel(file)[1] is not None for file in files):
        order = channel_order(folders.pop(), model.channel_names)
    pairing = order.applied(pair_files(files, order.names, keep_folders, model.image_reader))
    return pairing, len(pairing.cases) + len(pairing.refused) > 1


def is_in_memory(images: Images) -> bool:
    """Whether this is an array or SimpleITK images, and no files."""
    if isinstance(images, (np.ndarray, sitk.Image)):
        return True
    return not isinstance(images, (str, Path)) and len(images) > 0 and isinstance(images[0], sitk.Image)


def is_image_file(path: Path) -> bool:
    """Whether an output is meant as a file."""
    return path.name.lower().endswith((*IMAGE_ENDINGS, *PICTURE_ENDINGS)) and not path.is_dir()


def _task(model: ModelFolder, case: RawCase, output: Path | None, keep_orientation: bool) -> ImageTask:
    target = output
    if output is not None and not is_image_file(output):
        target = output / f"{case.identifier}{model.file_ending}"
    if target is not None and target.resolve() in {path.resolve() for path in case.images}:
        raise ConfigurationError(f"{target} is the image itself: choose another output")
    reader, orientation = model.image_reader, None if keep_orientation else model.image_orientation
    if reader == NIBABEL_REORIENT:
        orientation = None  # the reader turns images itself
    if reader in PICTURE_READERS:
        orientation = None  # pictures lie nowhere
        if not all(path.name.lower().endswith(PICTURE_ENDINGS) for path in case.images):
            reader = SIMPLE_ITK
    elif all(path.name.lower().endswith(TIFF_ENDINGS) for path in case.images):
        reader, orientation = TIFF_3D, None
    elif not all(is_nifti(path) for path in case.images):  # nibabel reads no other format
        orientation = NIBABEL_ORIENTATION if reader == NIBABEL_REORIENT else orientation
        reader = SIMPLE_ITK
    return ImageTask(case.identifier, case.images, target, reader=reader, orientation=orientation)


# -- how images lie ------------------------------------------------------------------------------------------------


def tell_orientation(model: ModelFolder, tasks: Sequence[ImageTask], lies: Sequence[str | None]) -> None:
    """Say in the log how images lie (one code a task, None where nothing tells), and whether they are turned."""
    counts = Counter(code for code in lies if code is not None)
    found = ", ".join(f"{code} ({count})" for code, count in counts.most_common())
    wanted = next((task.orientation for task in tasks if task.orientation is not None), None)
    if wanted is not None and set(counts) - {wanted}:
        logger.info("images lie as %s: turned to %s as the training images, and segmentations back", found, wanted)
    elif wanted is not None:
        logger.info("images lie as the training images, %s", wanted)
    elif model.image_reader == NIBABEL_REORIENT or not counts:
        return
    elif model.image_orientation is not None:
        logger.info("images are taken as they lie, %s; the training images lay as %s", found, model.image_orientation)
    elif len(counts) > 1:
        logger.warning(
            "images lie differently, %s, and the model does not say how its training images lay (image_orientation in its "
            "dataset.json): they are taken as they are",
            found,
        )
    else:
        logger.info("images are taken as they lie, %s: the model does not say how its training images lay", found)


def tell_doubts(doubts: Sequence[str]) -> None:
    """Warn once of headers that contradict themselves."""
    if doubts:
        logger.warning("where images lie is doubtful, by their headers: %s", and_more(doubts, 3, "; "))


# -- images in memory ----------------------------------------------------------------------------------------------


def expected_channels(model: ModelFolder) -> str:
    """What an image for this model is made of, for error messages."""
    names = model.channel_names
    listed = ", ".join(f"_{index:04d} = {name}" for index, name in enumerate(names))
    return f"the model takes {len(names)} channel(s), one a file: {listed}"


def checked_array(
    model: ModelFolder, image: np.ndarray, geometry: ImageGeometry | None, spacing: Sequence[float] | None
) -> tuple[np.ndarray, ImageGeometry]:
    """The array as (C, Z, Y, X) and its geometry, at the origin if only its spacing (mm) is known.

    Raises CaseError if it doesn't fit the model or has NaN voxels, ConfigurationError if it has no spacing.
    """
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or len(image) != len(model.channel_names):
        raise CaseError(f"expected an array (C, Z, Y, X), got {image.shape}; {expected_channels(model)}")
    if not np.isfinite(image).all():
        raise CaseError("the image has NaN or infinite voxels: replace them by a number that makes sense")
    if geometry is None:
        if spacing is None or len(spacing) != 3 or not all(s > 0 for s in spacing):
            raise ConfigurationError(f"an array needs its spacing: three numbers (Z, Y, X) in mm, got {spacing}")
        z, y, x = (float(s) for s in spacing)
        geometry = ImageGeometry((z, y, x), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1), image.shape[1:])
    elif geometry.size != image.shape[1:]:
        raise CaseError(f"the geometry is of {geometry.size} voxels (Z, Y, X), the array of {image.shape[1:]}")
    return image, geometry


def from_simpleitk(images: sitk.Image | Sequence[sitk.Image]) -> tuple[np.ndarray, ImageGeometry]:
    """Voxels (C, Z, Y, X) and geometry of SimpleITK images.

    Args:
        images: one 3D image for each channel; or a single one with its channels as the components of a vector, or on a
            fourth axis.

    Raises CaseError if they are not 3D or lie on different grids.
    """
    channels = [images] if isinstance(images, sitk.Image) else list(images)
    first = _geometry(channels[0])
    voxels = []
    for index, channel in enumerate(channels):
        for problem in geometry_problems(first, _geometry(channel)):
            raise CaseError(f"channel {index}: {problem} from channel 0; all channels must share one grid")
        array = sitk.GetArrayFromImage(channel)
        if channel.GetNumberOfComponentsPerPixel() > 1:
            array = np.moveaxis(array, -1, 0)
        voxels.append(array[None] if array.ndim == 3 else array)
    return np.concatenate(voxels), first


def to_simpleitk(labels: np.ndarray, geometry: ImageGeometry) -> sitk.Image:
    """Labels (Z, Y, X) as a SimpleITK image."""
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


def _geometry(image: sitk.Image) -> ImageGeometry:
    side = image.GetDimension()
    if side not in (3, 4):
        raise CaseError(f"expected a 3D image (or a 4D one with channels on its fourth axis), got {side} axes")
    x, y, z = image.GetSize()[:3]
    direction = np.asarray(image.GetDirection()).reshape(side, side)[:3, :3]
    sx, sy, sz = image.GetSpacing()[:3]
    ox, oy, oz = image.GetOrigin()[:3]
    return ImageGeometry((sz, sy, sx), (ox, oy, oz), tuple(float(v) for v in direction.ravel()), (z, y, x))
