"""A case as strips of small slices in three planes: a grey JPEG of the image and, over it, a PNG of codes.

A code stands for a pair (label of the reference, label of the prediction). What a code looks like is the PNG's palette, so
that a page shows errors, classes, or one class alone, by another palette of the same picture.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from nnssl_adapt.evaluation.overlay import class_colour

PLANES = ("axial", "coronal", "sagittal")
"""Of the axes (Z, Y, X) of an upright image."""
SIDES = ("R", "R", "P")
"""What lies at the left edge of each plane's pictures."""

HIT, MISSED, ADDED, WRONG = "#2ca25f66", "#00b4ffe6", "#ffae00e6", "#ff2d95e6"
"""Colours (red, green, blue, opacity) of what both agree on, of false negatives and positives, and of mixed-up classes."""

_CLASS_OPACITY = "80"
_MOST_CODES = 255  # a palette has 256 colours, and one is "nothing"
_MARGIN_MM = 10.0
_MARGIN = 0.35
"""Around the labels, at least so many mm, or this share of what they fill."""


@dataclass(frozen=True)
class Size:
    """How large strips are: pixels of a slice's longer side, slices of a plane, and the JPEG's quality (0 to 100)."""

    pixels: int
    slices: int
    quality: int


SIZES = (Size(192, 24, 72), Size(176, 20, 62), Size(144, 16, 55), Size(112, 14, 45), Size(96, 10, 35), Size(64, 8, 30))
"""From the best down, until a case fits its share of the page."""

THUMBNAIL = Size(96, 1, 50)


@dataclass(frozen=True)
class UprightCase:
    """One case as it is drawn: axes (Z, Y, X) run to the head, to the front and to the patient's left.

    Attributes:
        image: one channel.
        reference, prediction: label maps of the same shape; 0 is background.
        spacing: millimetres (Z, Y, X).
        numbers: for each axis, the name of each slice in the file (``z = 12``).
        names: of the planes across each axis.
        sides: for each plane, the letter of the side of the body at its left edge; empty where it is not known.
    """

    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float, float]
    numbers: tuple[list[str], list[str], list[str]]
    names: tuple[str, str, str] = PLANES
    sides: tuple[str, str, str] = SIDES


@dataclass(frozen=True)
class Plane:
    """One strip: slices from left to right.

    Attributes:
        name: of the plane.
        grey: JPEG.
        labels: PNG with a palette: colour n + 1 is that of code n, and colour 0 is nothing.
        numbers: of the slices, as the file counts them.
        ratio: width of a slice divided by its height.
        start: which slice has most errors.
        side: at the left edge.
    """

    name: str
    grey: bytes
    labels: bytes
    numbers: list[str]
    ratio: float
    start: int
    side: str

    @property
    def count(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Strips:
    """The strips of one case; ``codes`` are the pairs (reference, prediction) that their colours stand for."""

    planes: list[Plane] = field(default_factory=list)
    codes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the pictures."""
        return sum(len(plane.grey) + len(plane.labels) for plane in self.planes)


def draw_strips(case: UprightCase, sizes: Sequence[Size] = SIZES, limit: int | None = None) -> Strips:
    """The strips of a case, in the first of ``sizes`` with at most ``limit`` bytes; else in the last of them.

    What is drawn is cut to the labels with a margin around them.
    """
    codes, pairs = encode_pairs(case.reference, case.prediction)
    box = _box(codes, case.spacing)
    cut = tuple(slice(first, last) for first, last in box)
    numbers = [names[first:last] for names, (first, last) in zip(case.numbers, box, strict=True)]
    near = replace(case, image=case.image[cut], numbers=(numbers[0], numbers[1], numbers[2]))
    codes, window = codes[cut], _window(near.image)
    for size in sizes:
        strips = Strips([_plane(near, codes, pairs, axis, size, window) for axis in range(3)], pairs)
        if limit is None or strips.size <= limit:
            break
    return strips


def encode_pairs(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Codes (uint8, 0 for background in both, else 1 + index) and the pairs (reference, prediction) that they stand for.

    The commonest 255 pairs have a code of their own; rarer ones count as the first of them that is an error.
    """
    codes = np.zeros(reference.shape, np.uint8)
    filled = (reference > 0) | (prediction > 0)
    width = int(max(reference.max(initial=0), prediction.max(initial=0))) + 1
    joined = reference[filled].astype(np.int64) * width + prediction[filled]
    values, inverse, counts = np.unique(joined, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_CODES]
    pairs = [(int(values[index]) // width, int(values[index]) % width) for index in order]
    error = next((number for number, (a, b) in enumerate(pairs) if a != b), 0)
    lookup = np.full(len(values), error + 1, np.uint8)
    lookup[order] = np.arange(1, len(order) + 1)
    codes[filled] = lookup[inverse.ravel()]
    return codes, pairs


def error_palette(pairs: Sequence[tuple[int, int]]) -> list[str]:
    """The colour of each pair where errors are shown: ``#rrggbbaa``."""
    return [HIT if a == b else MISSED if b == 0 else ADDED if a == 0 else WRONG for a, b in pairs]


def class_palette(values: Sequence[int]) -> dict[int, str]:
    """The colour of each label where classes are shown, as :func:`~nnssl_adapt.evaluation.overlay.overlay_figure` has them."""
    return {value: class_colour(index) + _CLASS_OPACITY for index, value in enumerate(values)}


def _plane(
    case: UprightCase,
    codes: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    axis: int,
    size: Size,
    window: tuple[float, float],
) -> Plane:
    down, across = (other for other in range(3) if other != axis)
    wrong = np.array([False, *(a != b for a, b in pairs)])
    errors = _counts(wrong[codes], axis)
    chosen = _chosen(errors, _counts(codes > 0, axis), size.slices)
    millimetres = [codes.shape[other] * case.spacing[other] for other in (down, across)]
    scale = min(size.pixels / max(millimetres), 1 / min(case.spacing[down], case.spacing[across]))
    height, width = (max(1, round(length * scale)) for length in millimetres)
    grey = np.zeros((height, width * len(chosen)), np.uint8)
    labels = np.zeros_like(grey)
    for place, index in enumerate(chosen):
        at = slice(place * width, (place + 1) * width)
        grey[:, at] = _shrunk(case.image.take(index, axis)[::-1], window, width, height)
        labels[:, at] = _shrunk_codes(codes.take(index, axis)[::-1], wrong, width, height)
    return Plane(
        name=case.names[axis],
        grey=_jpeg(grey, size.quality),
        labels=png_with_palette(labels, ["#00000000", *error_palette(pairs)]),
        numbers=[case.numbers[axis][index] for index in chosen],
        ratio=round(width / height, 4),
        start=int(np.argmax(errors[chosen])) if errors[chosen].any() else len(chosen) // 2,
        side=case.sides[axis],
    )


def _box(codes: np.ndarray, spacing: Sequence[float]) -> list[tuple[int, int]]:
    """First and last + 1 of each axis: the labels with a margin; everything where there are none."""
    box = []
    for axis, length in enumerate(codes.shape):
        filled = np.flatnonzero(_counts(codes > 0, axis))
        if len(filled) == 0:
            box.append((0, length))
            continue
        first, last = int(filled[0]), int(filled[-1]) + 1
        margin = round(max(_MARGIN_MM / spacing[axis], _MARGIN * (last - first)))
        box.append((max(0, first - margin), min(length, last + margin)))
    return box


def _chosen(errors: np.ndarray, filled: np.ndarray, number: int) -> list[int]:
    """Slices evenly over where labels are (else over everything), the one with most errors among them."""
    where = np.flatnonzero(filled)
    first, last = (int(where[0]), int(where[-1])) if len(where) else (0, len(filled) - 1)
    first, last = max(0, first - 1), min(len(filled) - 1, last + 1)
    worst = int(np.argmax(errors)) if errors.any() else None
    if number == 1:
        return [worst if worst is not None else int(np.argmax(filled)) if len(where) else (first + last) // 2]
    chosen = sorted({round(value) for value in np.linspace(first, last, min(number, last - first + 1))})
    if worst is not None and worst not in chosen:
        chosen[int(np.argmin([abs(index - worst) for index in chosen]))] = worst
    return chosen


def _counts(mask: np.ndarray, axis: int) -> np.ndarray:
    counts: np.ndarray = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
    return counts


def _window(image: np.ndarray) -> tuple[float, float]:
    """Intensities that are drawn black and white."""
    step = max(1, round((image.size / 2e6) ** (1 / 3)))
    low, high = np.percentile(image[::step, ::step, ::step], (1, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _shrunk(cut: np.ndarray, window: tuple[float, float], width: int, height: int) -> np.ndarray:
    low, high = window
    grey = np.clip((cut.astype(np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC))


def _shrunk_codes(cut: np.ndarray, wrong: np.ndarray, width: int, height: int) -> np.ndarray:
    """The nearest voxel's code; but where a voxel is wrong, its pixel is, so that no error is lost in a small picture."""
    shrunk = np.array(Image.fromarray(cut).resize((width, height), Image.Resampling.NEAREST))
    rows, columns = np.nonzero(wrong[cut])
    shrunk[rows * height // cut.shape[0], columns * width // cut.shape[1]] = cut[rows, columns]
    return shrunk


def _jpeg(grey: np.ndarray, quality: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=quality, optimize=True)
    return stream.getvalue()


def png_with_palette(indices: np.ndarray, palette: Sequence[str]) -> bytes:
    """A PNG of palette indices (rows, columns), uint8, with the colours ``#rrggbbaa`` (the PNG specification, chapter 11).

    Pillow leaves out colours at the palette's end that are opaque, and packs few colours into bits; a page that exchanges
    the colours needs all of them in their places.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = indices.shape
    rgba = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5, 7)] for colour in palette], np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1)  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", rgba[:, :3].tobytes()), (b"tRNS", rgba[:, 3].tobytes())]
    parts += [(b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)
