"""Images that a caller has in memory: NumPy arrays and SimpleITK images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.images import ImageGeometry, geometry_problems
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.inference.model_folder import ModelFolder


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
