"""Segmentations by a cascade's first network on the grid of the second, as nnU-Net keeps them in ``predicted_next_stage``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnssl_adapt.data.arrays import open_array, packed, piece_shapes
from nnssl_adapt.errors import CaseError
from nnssl_adapt.files import atomic_path, explain_write_errors, make_folder, sha256_of, write_json
from nnssl_adapt.text import read_record

if TYPE_CHECKING:
    import blosc2

FOLDER = "predicted_next_stage"
"""Name, in the first stage's model folder, of the folder that has one for each next stage."""

_RECORDS = ".nnssl_adapt"


@dataclass(frozen=True)
class PreviousStage:
    """``CASE.b2nd`` with labels (Z, Y, X) for every case that the first network was validated on.

    Attributes:
        folder: ``<model>/predicted_next_stage/<next configuration>``.
    """

    folder: Path

    def path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}.b2nd"

    def has(self, identifier: str) -> bool:
        return self.path(identifier).is_file()

    def fold_of(self, identifier: str) -> int | str | None:
        """Which fold's network predicted the case; None where nnU-Net wrote it, which does not say."""
        fold: int | str | None = read_record(self.folder / _RECORDS / f"{identifier}.json").get("fold")
        return fold

    def write(
        self, identifier: str, labels: np.ndarray, patch_size: Sequence[int], fold: int | str, weights: str | None
    ) -> None:
        """Write labels (Z, Y, X), uint8 or uint16. ``patch_size``: of the first stage; ``weights``: digest of the network.

        Raises OutputError: the folder can't be written, or the disk is full.
        """
        make_folder(self.folder / _RECORDS)
        blocks, chunks = piece_shapes((1, *labels.shape), patch_size, labels.itemsize)
        with explain_write_errors(self.folder), atomic_path(self.path(identifier)) as temporary:
            temporary.write_bytes(packed(labels, blocks[1:], chunks[1:]))
        write_json(self.folder / _RECORDS / f"{identifier}.json", {"fold": fold, "weights": weights})

    def is_by(self, identifier: str, weights: str | None) -> bool:
        """Whether the case is there and this network predicted it."""
        record = read_record(self.folder / _RECORDS / f"{identifier}.json")
        return weights is not None and self.path(identifier).is_file() and record.get("weights") == weights

    def made_by(self, identifiers: Iterable[str]) -> dict[str, str]:
        """For each case what predicted it: the digest of the network's weights, or where that is not known of its labels."""
        found = {}
        for identifier in identifiers:
            weights = read_record(self.folder / _RECORDS / f"{identifier}.json").get("weights")
            found[identifier] = str(weights) if weights else sha256_of(self.path(identifier))
        return found

    def open(self, identifier: str, shape: Sequence[int]) -> blosc2.NDArray:
        """The labels of a case, which must be of this shape (Z, Y, X). Raises CaseError."""
        path = self.path(identifier)
        if not path.is_file():
            raise CaseError(f"{path} is missing: validate the previous stage (train … --val)", path=path)
        labels = open_array(path)
        if tuple(labels.shape) != tuple(shape):
            raise CaseError(
                f"{path} has {tuple(labels.shape)} voxels, the preprocessed case {tuple(shape)}: it was preprocessed again "
                "since. Validate the previous stage again (train … --val)",
                path=path,
            )
        return labels


def one_hot(segmentation: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """A channel for each label, float32: what the second network sees. (Z, Y, X) → (labels, Z, Y, X)."""
    channels = np.zeros((len(labels), *segmentation.shape), dtype=np.float32)
    for channel, label in zip(channels, labels, strict=True):
        channel[segmentation == label] = 1
    return channels
