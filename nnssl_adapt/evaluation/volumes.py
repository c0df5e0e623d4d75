"""Images and label maps for NiiVue, which draws NIfTI files in 3D: in a report (``report --viewer``) and in a notebook."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel
import numpy as np

from nnssl_adapt.evaluation.overlay import class_colour

_AS_IT_IS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def nifti_bytes(
    array: np.ndarray,
    spacing: Sequence[float],
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] | None = None,
) -> bytes:
    """A gzipped NIfTI file of an image or a label map.

    Whole numbers stay what they are, if they fit 16 bits. Others are stored in 16 bits with NIfTI's scale and offset, in
    steps of 1/65535 of their range.

    Args:
        array: (Z, Y, X).
        spacing: millimetres (Z, Y, X).
        origin: of the first voxel in mm, ITK's (x, y, z).
        direction: nine cosines, ITK's; None: the axes of ITK's world.
    """
    voxels = array.transpose(2, 1, 0)
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(direction or _AS_IT_IS, (3, 3)) * np.asarray(spacing[::-1])
    matrix[:3, 3] = origin
    affine = (
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
    )  # ITK's world runs to the left and back, NIfTI's right and to the front
    low, high = float(voxels.min(initial=0)), float(voxels.max(initial=0))
    whole = bool(np.array_equal(voxels, np.rint(voxels)))
    if whole and low >= 0 and high < 2**8:
        voxels = voxels.astype(np.uint8)
    elif whole and low >= -(2**15) and high < 2**15:
        voxels = voxels.astype(np.int16)
    else:
        voxels = voxels.astype(np.float32)
    image = nibabel.Nifti1Image(voxels, affine)
    if voxels.dtype.kind == "f":
        image.set_data_dtype(np.int16)  # nibabel finds scale and offset
    content: bytes = gzip.compress(image.to_bytes(), 6)
    return content


def widget_available() -> bool:
    """Whether ipyniivue is installed (extra ``viewer``)."""
    return importlib.util.find_spec("ipyniivue") is not None


def niivue_widget(image: bytes, labels: Mapping[str, bytes], class_names: Sequence[str]) -> Any:
    """An ``ipyniivue.NiiVue`` with an image and label maps over it, each a gzipped NIfTI file; in planes and in 3D.

    The patient's right is on the left, as in every other picture of ours.
    """
    ipyniivue = importlib.import_module("ipyniivue")
    colours = [class_colour(index) for index in range(len(class_names))]
    red, green, blue = ([0, *(int(colour[at : at + 2], 16) for colour in colours)] for at in (1, 3, 5))
    table = {
        **{"R": red, "G": green, "B": blue, "A": [0] + [255] * len(colours)},
        **{"I": list(range(len(colours) + 1)), "labels": ["", *class_names]},
    }
    volumes = [ipyniivue.Volume(data=image, name="image.nii.gz", colormap="gray", colorbar_visible=False)]
    for what, content in labels.items():
        volume = ipyniivue.Volume(data=content, name=f"{what}.nii.gz", opacity=0.5, colorbar_visible=False)
        volume.set_colormap_label(table)
        volumes.append(volume)
    widget = ipyniivue.NiiVue(
        height=420,
        is_radiological_convention=True,
        multiplanar_show_render=ipyniivue.ShowRender.ALWAYS,
        crosshair_width=1.0,
        back_color=(0.07, 0.07, 0.07, 1.0),
    )
    widget.load_volumes(volumes)
    return widget
