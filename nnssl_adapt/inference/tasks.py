"""What is to be predicted, and where the result goes: from what a caller gives to single images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_adapt.data.dataset import RawCase, find_images
from nnssl_adapt.data.images import ImageGeometry, read_image
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.inference.model_folder import ModelFolder

Images = np.ndarray | str | Path | Sequence[str | Path]
"""What can be predicted: an array, a folder, a file, or the channel files of one image."""

_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True)
class ImageTask:
    """One image to predict.

    Attributes:
        identifier: its name.
        read: gives the image (C, Z, Y, X) and its geometry; raises CaseError.
        target: the label file to write; None: labels are returned.
    """

    identifier: str
    read: Callable[[], tuple[np.ndarray, ImageGeometry]]
    target: Path | None

    def is_done(self, with_probabilities: bool) -> bool:
        """Whether the label file exists, and the probabilities where they are wanted too."""
        if self.target is None or not self.target.is_file():
            return False
        return not with_probabilities or self.beside_target(".npz").is_file()

    def beside_target(self, ending: str = "") -> Path:
        """The target's path with another ending."""
        assert self.target is not None
        return self.target.with_name(_without_ending(self.target.name) + ending)


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
    if isinstance(images, np.ndarray):
        array, where = checked_array(model, images, geometry, spacing)
        if output is not None and not _is_image_file(output):
            raise ConfigurationError(
                f"an array has no name: give an output file, e.g. {output}/case{model.file_ending}"
            )
        return [ImageTask("array", lambda: (array, where), output)]
    if geometry is not None or spacing is not None:
        raise ConfigurationError("geometry and spacing go with arrays; files have their own")
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        cases = _find_cases(model, Path(images))
        if output is not None and output.resolve() == Path(images).resolve():
            raise ConfigurationError(f"{output} is the folder of the images: choose another output")
        if output is not None and (_is_image_file(output) or output.is_file()):
            raise ConfigurationError(f"{images} is a folder of images: the output must be a folder, got {output}")
    else:
        files = (images,) if isinstance(images, (str, Path)) else images
        cases = (_one_case(model, tuple(Path(file) for file in files)),)
    return [_task(model, case, output) for case in cases]


def _task(model: ModelFolder, case: RawCase, output: Path | None) -> ImageTask:
    target = output
    if output is not None and not _is_image_file(output):
        target = output / f"{case.identifier}{model.file_ending}"
    if target is not None and target.resolve() in {path.resolve() for path in case.images}:
        raise ConfigurationError(f"{target} is the image itself: choose another output")
    return ImageTask(case.identifier, lambda: _read(model, case), target)


def _find_cases(model: ModelFolder, folder: Path) -> tuple[RawCase, ...]:
    try:
        return find_images(folder, model.file_ending, len(model.channel_names))
    except CaseError as error:
        raise CaseError(f"{error}\n{expected_channels(model)}") from error


def _one_case(model: ModelFolder, files: tuple[Path, ...]) -> RawCase:
    if not files:
        raise CaseError("no image was given")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise CaseError(f"no such file or folder: {', '.join(missing)}")
    if len(files) not in (1, len(model.channel_names)):  # a single file may hold all channels (4D)
        raise CaseError(f"got {len(files)} files; {expected_channels(model)}. For several images give their folder")
    name = _without_ending(files[0].name)
    stem, _, channel = name.rpartition("_")
    return RawCase(stem if stem and len(channel) == 4 and channel.isdigit() else name, files)


def expected_channels(model: ModelFolder) -> str:
    """What an image for this model is made of, for error messages."""
    names = model.channel_names
    listed = ", ".join(f"_{index:04d} = {name}" for index, name in enumerate(names))
    return f"the model takes {len(names)} channel(s), one a file: {listed}"


def _read(model: ModelFolder, case: RawCase) -> tuple[np.ndarray, ImageGeometry]:
    image, geometry = read_image(case.images)
    if len(image) != len(model.channel_names):
        raise CaseError(f"{case.images[0]}: got {len(image)} channel(s); {expected_channels(model)}")
    return image, geometry


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


def _is_image_file(path: Path) -> bool:
    """Whether an output is meant as a file."""
    return path.name.endswith(_IMAGE_ENDINGS) and not path.is_dir()


def _without_ending(name: str) -> str:
    for ending in _IMAGE_ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name
