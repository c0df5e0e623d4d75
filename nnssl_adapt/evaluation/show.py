"""Looking at images and segmentations in a notebook."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.images import ImageGeometry, read_image, reader_for
from nnssl_adapt.errors import CaseError
from nnssl_adapt.evaluation.overlay import overlay_figure
from nnssl_adapt.evaluation.volumes import nifti_bytes, niivue_widget, widget_available
from nnssl_adapt.inference.inputs import from_simpleitk

logger = logging.getLogger(__name__)


def show(
    image: Any,
    label: Any = None,
    prediction: Any = None,
    class_names: Sequence[str] = (),
    spacing: Sequence[float] | None = None,
    title: str = "",
    interactive: bool = False,
) -> Any:
    """Draw an image in three planes, with its labels and a prediction beside it where given; a notebook shows the figure.

    Files and SimpleITK images are drawn with head and front up and the patient's right on the left, however they are
    stored; arrays as they are, since nothing says which way they lie.

    Args:
        image: a file, a SimpleITK image, or an array (Z, Y, X) or (C, Z, Y, X), of which the first channel is drawn.
        label: the same, of whole numbers: 0 is background.
        prediction: the same.
        class_names: of the labels 1, 2, …; numbers where there are none.
        spacing: millimetres (Z, Y, X); None: the image's own, 1 of an array.
        title: headline.
        interactive: planes and 3D to turn and scroll through, by NiiVue. Without ipyniivue (``pip install
            'nnssl-adapt[viewer]'``) the figure is drawn, and a warning says so.

    Returns a matplotlib ``Figure``, or an ``ipyniivue.NiiVue``.

    Raises CaseError: a file can't be read, or the shapes differ.
    """
    volume, own, direction, origin = _volume(image)
    labels = {
        what: _volume(given)[0] for what, given in (("label", label), ("prediction", prediction)) if given is not None
    }
    for what, array in labels.items():
        if array.shape != volume.shape:
            raise CaseError(f"the {what} has shape {array.shape}, the image {volume.shape}")
        if not np.array_equal(array, np.rint(array)):
            raise CaseError(f"the {what} has values that are not whole numbers")
    highest = max((int(array.max(initial=0)) for array in labels.values()), default=0)
    names = [*class_names, *(str(value) for value in range(len(class_names) + 1, highest + 1))]
    if interactive and widget_available():
        at = tuple(spacing or own), origin, direction
        drawn = {what: nifti_bytes(array, *at) for what, array in labels.items()}
        return niivue_widget(nifti_bytes(volume, *at), drawn, names)
    if interactive:
        logger.warning("ipyniivue is not installed, so this is no 3D view: pip install 'nnssl-adapt[viewer]'")
    reference, prediction = labels.get("label"), labels.get("prediction")
    return overlay_figure(volume, reference, prediction, names, spacing or own, title, direction)


_Place = tuple[np.ndarray, tuple[float, ...], tuple[float, ...] | None, tuple[float, ...]]


def _volume(given: Any) -> _Place:
    """An array (Z, Y, X), its spacing, its direction (ITK's) where it has one, and its origin (x, y, z)."""
    geometry: ImageGeometry | None = None
    if isinstance(given, (str, Path)):
        array, geometry = read_image([given], reader_for((given,)))
    elif isinstance(given, sitk.Image):
        array, geometry = from_simpleitk(given)
    else:
        array = np.asarray(given)
    if array.ndim == 4:
        array = array[0]
    if array.ndim != 3:
        raise CaseError(f"expected three axes (Z, Y, X), or four with channels first, got shape {array.shape}")
    if geometry is None:
        return array, (1.0, 1.0, 1.0), None, (0.0, 0.0, 0.0)
    return array, geometry.spacing, None if geometry.picture is not None else geometry.direction, geometry.origin
