"""Turning, scaling and mirroring a patch: image and labels sampled in one pass, from no more voxels than that takes.

The rule is that of batchgeneratorsv2's SpatialTransform as nnU-Net sets it up. The image is interpolated linearly. A label's
score is the weight of the corners that have it, and the highest wins; scores are rounded to half precision as there, and if
several are then equal, the nearest voxel's label wins if it is one of them, else the lowest. Beyond what is read, the image
is 0 and the label -1, outside.

There, every label is interpolated over the whole patch. Here one look is enough for most voxels: all eight corners agree.
Everything works on tensors of any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int, int]

CODE_OF_OUTSIDE = 0
"""Labels are sampled as codes: label + 1, as uint8 if they fit (a quarter of the memory traffic), else as int16. The
highest code stands for several labels at once."""

_PIECE_VOXELS = 48 * 1024
"""Voxels that are worked on together on a CPU: all their intermediate values stay in its cache."""

_EVERYWHERE_VOXELS = 1 << 20
"""Voxels that are decided at once on a GPU: 100 bytes or so are needed for each."""

_CODES_A_VOXEL = 8
"""Codes are small, and neighbours are a slice away: so many times as many at once."""

_SLACK = 1e-3
"""Voxels that a coordinate in float32 may be off, generously."""


def affine_matrix(angles: Sequence[float], scale: float) -> np.ndarray:
    """The 3×3 matrix (Z, Y, X) of a scaling, then turns by ``angles`` (radians) about the first, second and third axis.

    It leads from where an output voxel lies to where its value is found: a scale above 1 makes things smaller.
    """
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.eye(3)
        after, last = (axis + 1) % 3, (axis + 2) % 3
        turn[after, after], turn[after, last], turn[last, after], turn[last, last] = cos, -sin, sin, cos
        turned = turn @ turned
    return turned * scale


def in_plane_matrix(angle: float, scale: float) -> np.ndarray:
    """As :func:`affine_matrix` within (Y, X) only: slices stay where they are."""
    matrix = affine_matrix((angle, 0, 0), scale)
    matrix[0] = (1, 0, 0)
    return matrix


def with_centre(matrix: np.ndarray, read_size: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """Complete a 3×3 matrix to 3×4, so that the middle of a patch is taken from the middle of what is read."""
    middle_of_patch, middle_of_read = ((np.asarray(size) - 1) / 2 for size in (patch_size, read_size))
    return np.column_stack([matrix, middle_of_read - matrix @ middle_of_patch])


def mirrored(matrix: np.ndarray, patch_size: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """The 3×4 matrix whose result is that of ``matrix``, mirrored along ``axes``."""
    result: np.ndarray = matrix.copy()
    for axis in axes:
        result[:, 3] += result[:, axis] * (patch_size[axis] - 1)
        result[:, axis] *= -1
    return result


@dataclass(frozen=True)
class Box:
    """Voxels ``start`` ≤ voxel < ``stop`` (Z, Y, X)."""

    start: Size
    stop: Size

    @property
    def size(self) -> Size:
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x


def needed_box(matrix: np.ndarray, patch_size: Sequence[int], filled: Box) -> Box:
    """The voxels that sampling a patch looks at, with as much of what is beyond ``filled`` as :func:`sample` needs.

    ``filled`` holds the voxels that have values; all else counts as outside. Of that, one voxel before and two after it
    stand for all.
    """
    ends = np.array([[0, size - 1] for size in patch_size])
    corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, 8)
    places = matrix[:, :3] @ corners + matrix[:, 3:]
    start, stop = [], []
    for low, high, first, end in zip(places.min(1), places.max(1), filled.start, filled.stop, strict=True):
        a = max(math.floor(low - _SLACK), first - 1)
        b = min(math.floor(high + _SLACK) + 3, end + 2)
        start.append(min(a, end))
        stop.append(max(b, start[-1] + 2))
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def code_type(highest_label: int) -> torch.dtype:
    """What codes of labels up to ``highest_label`` are stored as."""
    return torch.uint8 if highest_label + 1 < torch.iinfo(torch.uint8).max else torch.int16


def sample(image: Tensor, codes: Tensor, matrix: np.ndarray, patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A patch out of a box, each voxel's value from the place that ``matrix`` leads to.

    Args:
        image: float32 (C, Z, Y, X), contiguous; the box of :func:`needed_box`.
        codes: uint8 or int16 (Z, Y, X) of the same box, contiguous: label + 1, 0 outside.
        matrix: 3×4, from voxels (Z, Y, X) of the patch to voxels of the box.
        patch_size: of the result (Z, Y, X).

    Returns:
        float32 (C, Z, Y, X) and codes (Z, Y, X) of ``patch_size``.
    """
    out_image = image.new_empty((image.shape[0], *patch_size))
    out_codes = codes.new_empty(tuple(patch_size))
    sample_into(out_image, out_codes, image, codes, matrix)
    return out_image, out_codes


def sample_into(out_image: Tensor, out_codes: Tensor, image: Tensor, codes: Tensor, matrix: np.ndarray) -> None:
    """As :func:`sample`, into tensors that are there already (contiguous)."""
    grid = _Grid(matrix, shape_of(out_codes), shape_of(codes), codes.device)
    agreed, corners = _agreed_codes(codes), _corners(codes.view(-1), grid.box)
    several = torch.iinfo(codes.dtype).max
    results = out_codes.view(-1)
    undecided = []
    everywhere = _decides_everywhere(codes.device)
    for piece, index, fractions in (
        grid.by_slices(out_image, image) if grid.keeps_slices else grid.by_rows(out_image, image)
    ):
        torch.index_select(agreed, 0, index, out=results[piece])
        if everywhere:
            _decide_everywhere(results[piece], several, corners, index, fractions)
            continue
        mixed = _positions(results[piece] == several)
        undecided.append((mixed + piece.start, *(part.index_select(0, mixed) for part in (index, *fractions))))
    if everywhere:
        return
    where, index, *at = (torch.cat(parts) for parts in zip(*undecided, strict=True))
    for piece in _pieces(len(where), codes.device):
        candidates = torch.stack([corner.index_select(0, index[piece]) for corner in corners])
        results[where[piece]] = _winners(candidates, [fraction[piece] for fraction in at])


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The numbers as float32 on a device, on their way there from pinned memory if it is a GPU."""
    tensor: Tensor = torch.from_numpy(numbers).float()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


_Piece = tuple[slice, Tensor, list[Tensor]]
"""Voxels of the patch; the first corners of the cells that they lie in, and where in these along each axis (all flat)."""


class _Grid:
    """Where the voxels of a patch lie in a box: in which cell between 2×2×2 voxels, and where in it."""

    def __init__(self, matrix: np.ndarray, patch: Size, box: Size, device: torch.device) -> None:
        self.device, self.box = device, box
        z, y = np.meshgrid(np.arange(patch[0]), np.arange(patch[1]), indexing="ij")
        starts = matrix[:, 0, None] * z.ravel() + matrix[:, 1, None] * y.ravel() + matrix[:, 3, None]
        steps = matrix[:, 2, None] * np.arange(patch[2])
        # Where each row of the patch begins, (rows, 1), and how it goes on, (1, X): one copy that nothing waits for.
        numbers = _sent(np.concatenate([starts, steps], axis=1), device)
        self.starts: list[Tensor] = [row[: starts.shape[1], None] for row in numbers]
        self.steps: list[Tensor] = [row[None, starts.shape[1] :] for row in numbers]
        self.rows_a_slice = patch[1]
        ends = starts[:, :, None] + steps[:, None, [0, -1]]
        self.leaves_box = [
            bool(low < 0 or high > size - 2)
            for low, high, size in zip(ends.min((1, 2)), ends.max((1, 2)), box, strict=True)
        ]
        # A GPU would rather have one large piece than many small ones.
        self.keeps_slices = device.type == "cpu" and not matrix[0, 1:3].any() and not matrix[1:3, 0].any()

    def by_rows(self, out: Tensor, image: Tensor) -> Iterator[_Piece]:
        """Fill ``out`` with the interpolated image, some rows at a time."""
        corners = [_corners(channel.view(-1), self.box) for channel in image]
        results = [channel.view(-1) for channel in out]
        width = self.steps[0].shape[1]
        for rows in _pieces(len(self.starts[0]), self.device, width):
            index, fractions = self._cells(rows)
            piece = slice(rows.start * width, rows.stop * width)
            for result, values in zip(results, corners, strict=True):
                _interpolate([each.index_select(0, index) for each in values], fractions, out=result[piece])
            yield piece, index, fractions

    def by_slices(self, out: Tensor, image: Tensor) -> Iterator[_Piece]:
        """The same where each slice of the patch lies between two of the box: first these two become one."""
        within, fractions = self._cells(slice(0, self.rows_a_slice), axes=(1, 2))
        depth = self._places(slice(None), 0)[:: self.rows_a_slice, 0]
        plane = self.box[1] * self.box[2]
        for number, (first, fraction) in enumerate(
            zip(depth.floor().int().tolist(), depth.frac().tolist(), strict=True)
        ):
            for result, volume in zip(out, image, strict=True):
                between = torch.lerp(volume[first], volume[first + 1], fraction).view(-1)
                values = [each.index_select(0, within) for each in _corners(between, self.box[1:])]
                _interpolate(values, fractions, out=result[number].view(-1))
            piece = slice(number * len(within), (number + 1) * len(within))
            yield piece, within + first * plane, [torch.full((1,), fraction).expand(len(within)), *fractions]

    def _places(self, rows: slice, axis: int) -> Tensor:
        """Where voxels of these rows lie along an axis of the box."""
        places = self.starts[axis][rows] + self.steps[axis]
        return places.clamp_(0, self.box[axis] - 2) if self.leaves_box[axis] else places

    def _cells(self, rows: slice, axes: Sequence[int] = (0, 1, 2)) -> tuple[Tensor, list[Tensor]]:
        """First corners of the cells of these rows, counted over ``axes``, and where in the cells."""
        places = [self._places(rows, axis) for axis in axes]
        floors = [place.floor() for place in places]
        fractions = [place.sub_(floor).view(-1) for place, floor in zip(places, floors, strict=True)]
        # Whole numbers below 2^24 are exact in float32: so many rows, but not so many voxels, has any box.
        row = floors[-2] if len(axes) == 2 else torch.add(floors[-2], floors[-3], alpha=self.box[1])
        return torch.add(floors[-1].int(), row.int(), alpha=self.box[2]).view(-1), fractions


def shape_of(volume: Tensor) -> Size:
    """Of a tensor (Z, Y, X)."""
    z, y, x = volume.shape
    return z, y, x


def _corners(flat: Tensor, size: Sequence[int]) -> list[Tensor]:
    """Views of a volume (or slice) that begin at the corners of its first cell, x fastest."""
    offsets, stride = [0], 1
    for length in reversed(size):
        offsets = [step + offset for step in (0, stride) for offset in offsets]
        stride *= length
    return [flat[offset:] for offset in offsets]


def _pieces(length: int, device: torch.device, voxels: float = 1) -> Iterator[slice]:
    """Parts of ``length`` items of so many voxels each: all at once on a GPU."""
    step = max(1, int(_PIECE_VOXELS / voxels)) if device.type == "cpu" else max(1, length)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _positions(mask: Tensor) -> Tensor:
    """Where a flat mask on the CPU is set. NumPy is ten times faster at that than torch."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _interpolate(known: list[Tensor], fractions: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """From the values at a cell's corners, x fastest, to that within. ``known`` is used up."""
    for fraction in reversed(fractions[1:]):
        known = [torch.lerp(a, b, fraction, out=a) for a, b in zip(known[::2], known[1::2], strict=True)]
    return torch.lerp(known[0], known[1], fractions[0], out=out)


def _agreed_codes(codes: Tensor) -> Tensor:
    """For the cell that begins at each voxel: the code of all its corners, or the highest of the type. Flat.

    Cells that begin at an axis's last voxel don't exist; what stands there is wrong and never asked for.
    """
    _, size_y, size_x = codes.shape
    flat, distances = codes.view(-1), (1, size_x, size_y * size_x)
    agreed = flat.clone()
    for piece in _pieces(max(0, len(flat) - sum(distances)), codes.device, 1 / _CODES_A_VOXEL):
        part = flat[piece.start : piece.stop + sum(distances)]
        differ = torch.zeros_like(part)
        for distance in distances:
            # The cell so far (voxel, edge, square), the next one, and one against the other.
            count = len(differ) - distance
            differ = differ[:count].bitwise_or(differ[distance:]).bitwise_or_(part[:count] ^ part[distance:][:count])
        agreed[piece].bitwise_or_((differ != 0).to(codes.dtype).mul_(torch.iinfo(codes.dtype).max))
    return agreed


# -- where corners disagree ------------------------------------------------------------------------------------------------


def _decides_everywhere(device: torch.device) -> bool:
    """Whether all voxels are decided, not only those where corners disagree: to know how many these are, one waits."""
    return device.type != "cpu"


def _decide_everywhere(
    results: Tensor, several: int, corners: Sequence[Tensor], index: Tensor, fractions: Sequence[Tensor]
) -> None:
    """Replace ``several`` in ``results`` (n) by the code that wins there. Waits for no device."""
    for start in range(0, len(index), _EVERYWHERE_VOXELS):
        piece = slice(start, start + _EVERYWHERE_VOXELS)
        candidates = torch.stack([corner.index_select(0, index[piece]) for corner in corners])
        won = _winners(candidates, [fraction[piece] for fraction in fractions], everywhere=True)
        results[piece].copy_(torch.where(results[piece] == several, won, results[piece]))


def _winners(candidates: Tensor, fractions: Sequence[Tensor], everywhere: bool = False) -> Tensor:
    """The code with the highest score in each column of ``candidates`` (corners, n).

    ``everywhere``: compute the rarer cases for all columns, and wait for no device.
    """
    low, high = candidates.amin(0), candidates.amax(0)
    is_low = candidates == low
    share = _interpolate(list(is_low.float()), fractions)
    low_score, high_score = _score(share), _score(1 - share)
    winners = torch.where(high_score > low_score, high, low)
    only_two = is_low.logical_or_(candidates == high).all(0)
    unsettled = ~only_two | (high_score == low_score)
    if everywhere:
        return torch.where(unsettled, _winners_of_all(candidates, fractions), winners)
    rest = _positions(unsettled)
    if len(rest):
        at = [fraction.index_select(0, rest) for fraction in fractions]
        winners[rest] = _winners_of_all(candidates.index_select(1, rest), at)
    return winners


def _winners_of_all(candidates: Tensor, fractions: Sequence[Tensor]) -> Tensor:
    """As :func:`_winners`, for any number of codes in a column and with ties."""
    scores = torch.stack(
        [_score(_interpolate(list((candidates == code).float()), fractions)) for code in candidates]
    ).float()
    best = scores.amax(0)
    highest = torch.iinfo(candidates.dtype).max
    winners = torch.where(scores == best, candidates, highest).amin(0)
    corner = torch.zeros(candidates.shape[1:], dtype=torch.int64, device=candidates.device)
    for fraction in fractions:
        corner = corner * 2 + (fraction > 0.5)
    nearest, nearest_score = (values.gather(0, corner[None])[0] for values in (candidates, scores))
    return torch.where(nearest_score == best, nearest, winners)


def _score(share: Tensor) -> Tensor:
    """In thousandths and half precision: what is nearly equal becomes equal, and the nearest voxel decides."""
    return (share * 1000).half()
