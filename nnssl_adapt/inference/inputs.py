"""What a caller gives to predict (folders, files, arrays, SimpleITK images), as tasks of one image each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.dataset import RawCase, find_images
from nnssl_adapt.data.images import ImageGeometry, geometry_problems
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.task import IMAGE_ENDINGS, ImageTask, without_ending

Images = np.ndarray | sitk.Image | str | Path | Sequence[str | Path] | Sequence[sitk.Image]
"""What can be predicted: an array, SimpleITK images, a folder, a file, or files."""


def image_tasks(
    model: ModelFolder,
    images: Images,
    output: Path | None,
    geometry: ImageGeometry | None = None,
    spacing: Sequence[float] | None = None,
) -> list[ImageTask]:
    """Work out the single images, see :meth:`nnssl_adapt.inference.predictor.Predictor.predict`.

    Raises CaseError when files are missing or don't fit the model's channels, and ConfigurationError when input and
    output don't go together; above all when an image would be overwritten.
    """
    if not isinstance(images, np.ndarray) and (geometry is not None or spacing is not None):
        raise ConfigurationError("geometry and spacing go with arrays; files have their own")
    if is_in_memory(images):
        if not isinstance(images, np.ndarray):
            images, geometry = from_simpleitk(images)  # type: ignore[arg-type]
        loaded = checked_array(model, images, geometry, spacing)
        if output is not None and not is_image_file(output):
            raise ConfigurationError(
                f"an array has no name: give an output file, e.g. {output}/case{model.file_ending}"
            )
        return [ImageTask("array", (), output, loaded)]
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        cases = _find_cases(model, Path(images))
        if output is not None and output.resolve() == Path(images).resolve():
            raise ConfigurationError(f"{output} is the folder of the images: choose another output")
        several = f"{images} is a folder of images"
    else:
        files = (images,) if isinstance(images, (str, Path)) else images
        cases = _cases_of(model, tuple(Path(str(file)) for file in files))  # type: ignore[union-attr]
        several = f"{len(cases)} images were given" if len(cases) > 1 else ""
    if several and output is not None and (is_image_file(output) or output.is_file()):
        raise ConfigurationError(f"{several}: the output must be a folder, got {output}")
    return [_task(model, case, output) for case in cases]


def is_in_memory(images: Images) -> bool:
    """Whether this is an array or SimpleITK images, and no files."""
    if isinstance(images, (np.ndarray, sitk.Image)):
        return True
    return not isinstance(images, (str, Path)) and len(images) > 0 and isinstance(images[0], sitk.Image)


def is_image_file(path: Path) -> bool:
    """Whether an output is meant as a file."""
    return path.name.endswith(IMAGE_ENDINGS) and not path.is_dir()


def _task(model: ModelFolder, case: RawCase, output: Path | None) -> ImageTask:
    target = output
    if output is not None and not is_image_file(output):
        target = output / f"{case.identifier}{model.file_ending}"
    if target is not None and target.resolve() in {path.resolve() for path in case.images}:
        raise ConfigurationError(f"{target} is the image itself: choose another output")
    return ImageTask(case.identifier, case.images, target, reader=model.image_reader)


def _find_cases(model: ModelFolder, folder: Path) -> tuple[RawCase, ...]:
    try:
        return find_images(folder, model.file_ending, len(model.channel_names))
    except CaseError as error:
        raise CaseError(f"{error}\n{expected_channels(model)}") from error


def _cases_of(model: ModelFolder, files: tuple[Path, ...]) -> tuple[RawCase, ...]:
    """The images that files belong to: those of ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` by their names, else all to one."""
    if not files:
        raise CaseError("no image was given")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise CaseError(f"no such file or folder: {', '.join(missing)}")
    channels = len(model.channel_names)
    if channels == 1 and len(files) > 1:
        return _different(tuple(RawCase(_case_and_channel(file)[0], (file,)) for file in files))
    if len(files) in (1, channels):  # a single file may hold all channels (4D)
        return (RawCase(_case_and_channel(files[0])[0], files),)
    groups: dict[str, dict[int, Path]] = {}
    for file in files:
        name, channel = _case_and_channel(file)
        groups.setdefault(name, {})[-1 if channel is None else channel] = file
    if any(set(group) != set(range(channels)) for group in groups.values()):
        raise CaseError(f"got {len(files)} files; {expected_channels(model)}. For several images give their folder")
    return tuple(RawCase(name, tuple(group[c] for c in range(channels))) for name, group in groups.items())


def _different(cases: tuple[RawCase, ...]) -> tuple[RawCase, ...]:
    names = [case.identifier for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CaseError(f"several files are called {', '.join(twice)}, and would overwrite each other's segmentation")
    return cases


def _case_and_channel(file: Path) -> tuple[str, int | None]:
    """``("CASE", 1)`` for ``CASE_0001.nii.gz``, ``("CASE", None)`` for ``CASE.nii.gz``."""
    name = without_ending(file.name)
    stem, _, channel = name.rpartition("_")
    return (stem, int(channel)) if stem and len(channel) == 4 and channel.isdigit() else (name, None)


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
