"""What is to be predicted, and where the result goes: from what a caller gives to single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.dataset import RawCase, find_images
from nnssl_adapt.data.images import SIMPLE_ITK, ImageGeometry, read_image
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.inference.in_memory import checked_array, expected_channels, from_simpleitk
from nnssl_adapt.inference.model_folder import ModelFolder

Images = np.ndarray | sitk.Image | str | Path | Sequence[str | Path] | Sequence[sitk.Image]
"""What can be predicted: an array, SimpleITK images, a folder, a file, or files."""

_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True)
class ImageTask:
    """One image to predict.

    Attributes:
        identifier: its name.
        files: of its channels; empty when it is in memory.
        target: the label file to write; None: labels are returned.
        loaded: an image in memory (C, Z, Y, X) and its geometry.
        reader: of the files, the model's.
    """

    identifier: str
    files: tuple[Path, ...]
    target: Path | None
    loaded: tuple[np.ndarray, ImageGeometry] | None = None
    reader: str = SIMPLE_ITK

    def read(self, num_channels: int, expected: str) -> tuple[np.ndarray, ImageGeometry]:
        """The image (C, Z, Y, X) and its geometry. Raises CaseError, with ``expected``, for other channels."""
        if self.loaded is not None:
            return self.loaded
        image, geometry = read_image(self.files, self.reader)
        if len(image) != num_channels:
            raise CaseError(f"{self.files[0]}: got {len(image)} channel(s); {expected}")
        return image, geometry

    def outputs(self, with_probabilities: bool) -> list[Path]:
        """The files that are there when the image is done; none for an image that is returned."""
        if self.target is None:
            return []
        return [self.target, *(self.beside_target(e) for e in (".npz", ".pkl") if with_probabilities)]

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
    return path.name.endswith(_IMAGE_ENDINGS) and not path.is_dir()


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
    name = _without_ending(file.name)
    stem, _, channel = name.rpartition("_")
    return (stem, int(channel)) if stem and len(channel) == 4 and channel.isdigit() else (name, None)


def _without_ending(name: str) -> str:
    for ending in _IMAGE_ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name
