"""What can be known to go wrong before hours of preprocessing: weights that don't fit, images that lie another way."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import read_geometry
from nnssl_adapt.errors import DatasetError
from nnssl_adapt.geometry.orientation import check_code, is_oriented
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.transfer.report import TransferReport
from nnssl_adapt.weights.transfer.settings import TransferSettings
from nnssl_adapt.weights.transfer.transfer import transfer_weights

logger = logging.getLogger(__name__)

_NAMED = 4
"""Files that a message names for each orientation."""


def check_transfer(
    raw: RawDataset,
    checkpoint: Checkpoint,
    architecture: Architecture,
    patch_size: Sequence[int],
    settings: TransferSettings,
) -> TransferReport:
    """Fit the weights to a network of this architecture for ``raw`` that is thrown away, and return the account.

    ``patch_size`` (Z, Y, X) in voxels. Raises TransferError with the whole table when training could not start from them.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_network(architecture, raw.num_channels, raw.labels.num_heads, patch_size)
    report = transfer_weights(
        checkpoint,
        network,
        head_names=raw.labels.head_names,
        channel_names=raw.channel_names,
        **settings.to_dict(),
    )
    logger.info("weights fit: %s", str(report).rpartition("\n")[2])
    return report


def check_orientation(raw: RawDataset, wanted: str) -> None:
    """Compare the orientation of every image of ``raw`` (its header) with the code that the weights want.

    Raises DatasetError listing images that lie another way, and what can be done.
    """
    others = find_other_orientations(raw, wanted)
    if not others:
        logger.info("all images are %s, as the weights need them", wanted)
        return
    by_code: dict[str, list[str]] = {}
    for name, code in others.items():
        by_code.setdefault(code, []).append(name)
    shown = [
        f"{code}: {len(names)} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
        for code, names in sorted(by_code.items(), key=lambda entry: -len(entry[1]))
    ]
    raise DatasetError(
        f"the weights were trained on {wanted} images (axes x, y, z come from these sides, as the Spinal Cord Toolbox says "
        f"it), but {len(others)} files of {raw.name} are not:\n  " + "\n  ".join(shown) + "\n"
        f"Add --reorient {wanted} to work on reoriented copies (a new dataset; this one stays as it is), or "
        "--ignore-orientation to train on them as they are"
    )


def find_other_orientations(raw: RawDataset, wanted: str) -> dict[str, str]:
    """File → orientation code of every training image and label that is not ``wanted``. Only headers are read.

    Files are named from the dataset's folder on (``imagesTr/case_0000.nii.gz``), those elsewhere by their whole path.
    """
    wanted = check_code(wanted)
    others: dict[str, str] = {}
    for case in raw.cases:
        for path in case.files:
            geometry = read_geometry(path, case.reader)
            if geometry.orientation is not None and not is_oriented(geometry.direction, wanted):
                name = path.relative_to(raw.folder) if path.is_relative_to(raw.folder) else path
                others[name.as_posix()] = geometry.orientation
    return others
