"""What a NIfTI header says twice and differently: readers take one or the other, and lay the image elsewhere."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_adapt.data.nifti import HEADER_BYTES, IncompleteFile, byte_order, is_nifti, unpacked
from nnssl_adapt.text import dimensions

_ROUNDING = 1e-3
"""Relative difference of lengths, and cosine between axes, that rounding explains."""


@dataclass(frozen=True)
class Placement:
    """What a header says about where the voxels lie.

    Attributes:
        qform_code: 0: the header has no qform.
        sform_code: 0: it has no sform.
        pixdim: size of a voxel, (x, y, z) in the file's unit.
        sform: 3 × 4 matrix from voxels (x, y, z) to the file's unit.
    """

    qform_code: int
    sform_code: int
    pixdim: tuple[float, ...]
    sform: np.ndarray

    def doubt(self) -> str | None:
        """How it contradicts itself, for a message that names the file; None where it does not."""
        if self.qform_code <= 0 and self.sform_code <= 0:
            return "its header does not say how it lies (sform_code and qform_code are 0): readers guess"
        if self.sform_code <= 0:
            return None
        columns = self.sform[:, :3].astype(float)
        lengths = np.linalg.norm(columns, axis=0)
        if not np.isfinite(columns).all() or not lengths.all():
            return "its sform is no matrix of a grid"
        axes = columns / lengths
        if np.abs(axes.T @ axes - np.eye(3)).max() > _ROUNDING:
            return "its sform is sheared, which SimpleITK leaves out and nibabel keeps"
        if not np.allclose(lengths, self.pixdim, rtol=_ROUNDING, atol=0):
            return (
                f"its sform has voxels of {dimensions(lengths)}, and its pixdim {dimensions(self.pixdim)} (x, y, z): "
                "SimpleITK goes by pixdim"
            )
        return None


def read_placement(path: Path) -> Placement | None:
    """The placement in a NIfTI-1 header; None for other formats, and for files that can't be read (which is told elsewhere)."""
    if not is_nifti(path):
        return None
    head = b""
    try:
        for piece in unpacked(path):
            head += piece
            if len(head) >= HEADER_BYTES:
                break
    except (OSError, IncompleteFile):
        return None
    if len(head) < HEADER_BYTES or (order := byte_order(head)) is None:
        return None
    pixdim = struct.unpack_from(order + "3f", head, 80)
    codes = struct.unpack_from(order + "2h", head, 252)
    sform = np.array(struct.unpack_from(order + "12f", head, 280)).reshape(3, 4)
    return Placement(codes[0], codes[1], tuple(abs(float(size)) for size in pixdim), sform)


def placement_doubt(path: Path) -> str | None:
    """How a file's header contradicts itself, see :meth:`Placement.doubt`."""
    placement = read_placement(path)
    return None if placement is None else placement.doubt()
