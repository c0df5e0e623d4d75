"""Which way the axes of an image run: three letters such as ``RPI``.

The convention is the Spinal Cord Toolbox's, in which weights and ``image_orientation`` are published: a letter says where
an axis COMES FROM, for the axes x, y, z in the order in which voxels are stored (x fastest). Others name where an axis goes
TO: nibabel, and SimpleITK's ``DICOMOrientImageFilter``. ``RPI`` here is ``LAS`` there. In arrays (Z, Y, X), ``RPI`` means:
first axis from inferior to superior, second from posterior to anterior, third from right to left.

ITK's world is LPS: +x to the left, +y to posterior, +z to superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnssl_adapt.errors import ConfigurationError

OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}

_TOWARDS = (("L", "R"), ("P", "A"), ("S", "I"))
"""For each axis of ITK's world: where it runs to, and where it comes from."""

_TIE = 1e-4
"""Sums of three cosines that differ by less are one and the same: a file's header holds about six digits."""


def orientation_code(direction: Sequence[float]) -> str:
    """Three letters for the axes x, y, z of an image, e.g. ``RPI``: where each comes from.

    Args:
        direction: nine cosines, ITK's row-major matrix whose columns are the image's axes (x, y, z) in its LPS world.

    An oblique axis is named after the nearest one of the body, the best match first and each once, as ITK does it.
    """
    cosines = _matrix(direction)
    letters = ["", "", ""]
    strength = np.abs(cosines)
    for _ in range(3):
        world, axis = np.unravel_index(int(np.argmax(strength)), (3, 3))
        to, come_from = _TOWARDS[world]
        letters[axis] = come_from if cosines[world, axis] > 0 else to
        strength[world, :] = strength[:, axis] = -1
    return "".join(letters)


def is_oriented(direction: Sequence[float], code: str) -> bool:
    """Whether an image has the orientation ``code``. Exactly between two orientations (at 45°), it has both."""
    cosines, code = _matrix(direction), check_code(code)
    return _agreement(cosines, code) >= _agreement(cosines, orientation_code(direction)) - _TIE


def is_code(code: str) -> bool:
    """Whether this is an orientation, such as ``RPI``."""
    return sorted("RAS".find(_axis_of(letter)) for letter in code.strip().upper()) == [0, 1, 2]


def check_code(code: str) -> str:
    """Return the code in capitals, or raise ConfigurationError saying what a code is."""
    if is_code(str(code)):
        return str(code).strip().upper()
    raise ConfigurationError(
        f"orientation {code!r}: expected three letters such as RPI, one each of R or L (right, left), A or P (anterior, "
        "posterior), S or I (superior, inferior): where the axes x, y, z come from"
    )


def opposite(code: str) -> str:
    """The same orientation in the words of those who say where axes go to (nibabel, SimpleITK), and back."""
    return "".join(OPPOSITE[letter] for letter in check_code(code))


@dataclass(frozen=True)
class Turn:
    """How an array is turned into another orientation: axes are put into another order, and some are reversed. Exact.

    Attributes:
        axes: for each axis (Z, Y, X) of the turned array, the stored one.
        flips: for each axis of the turned array, whether the stored one is reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @classmethod
    def to(cls, code: str, direction: Sequence[float]) -> Turn:
        """What turns an image of this direction (nine cosines, ITK's) to the orientation ``code``.

        An image that has it already stays, also where it lies exactly between two orientations.
        """
        if is_oriented(direction, code):
            return cls()
        stored, wanted = orientation_code(direction)[::-1], check_code(code)[::-1]  # of Z, Y, X
        axes = [next(i for i, letter in enumerate(stored) if letter in (end, OPPOSITE[end])) for end in wanted]
        flips = [stored[axis] != end for axis, end in zip(axes, wanted, strict=True)]
        return cls((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))

    @property
    def is_none(self) -> bool:
        """Whether nothing is turned."""
        return self == Turn()

    def apply(self, array: np.ndarray) -> np.ndarray:
        """A view of the array (…, Z, Y, X), turned."""
        first = array.ndim - 3
        return self._flipped(array.transpose(*range(first), *(first + axis for axis in self.axes)))

    def undo(self, array: np.ndarray) -> np.ndarray:
        """A view of a turned array (…, Z, Y, X) as it was stored."""
        first = array.ndim - 3
        back = [first + self.axes.index(axis) for axis in range(3)]
        stored: np.ndarray = self._flipped(array).transpose(*range(first), *back)
        return stored

    def _flipped(self, array: np.ndarray) -> np.ndarray:
        z, y, x = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        flipped: np.ndarray = array[..., z, y, x]
        return flipped


def _axis_of(letter: str) -> str:
    """R, A or S for either end of an axis; a question mark for anything else."""
    return next((end for end in "RAS" if letter in (end, OPPOSITE[end])), "?")


def _agreement(cosines: np.ndarray, code: str) -> float:
    """Sum of the cosines between the image's axes and those that the code names; 3 when they are the same."""
    total = 0.0
    for axis, letter in enumerate(code):
        world = next(index for index, ends in enumerate(_TOWARDS) if letter in ends)
        total += float(cosines[world, axis]) * (1 if letter == _TOWARDS[world][1] else -1)
    return total


def _matrix(direction: Sequence[float]) -> np.ndarray:
    return np.asarray(direction, dtype=np.float64).reshape(3, 3)
