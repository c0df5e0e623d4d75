"""A package proves itself: unpacked as another user would, it must segment as the model it was made of.

Where released nnU-Net is installed, its own prediction with the package is compared too. It runs in a process of its own:
nothing of it is imported here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import count_channels, read_labels
from nnssl_adapt.data.pictures import NATURAL_2D, PICTURE_READERS, TIFF_3D, write_labels_as_picture
from nnssl_adapt.errors import ModelFolderError
from nnssl_adapt.files import write_json
from nnssl_adapt.inference.model_folder import Fold, ModelFolder
from nnssl_adapt.inference.predictor import Predictor
from nnssl_adapt.inference.trainer_class import TRAINER_FILE

logger = logging.getLogger(__name__)

NNUNET_AGREES = 0.999
"""Share of equal voxels from which two programs agree; with nnU-Net's own rounding all but a few voxels are equal."""

_NNUNETS_COMMAND = (
    "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
)


@dataclass(frozen=True)
class PackageProof:
    """What was compared.

    Attributes:
        image: which image was segmented, for people.
        labels: values that occur in the segmentation.
        with_model: share of voxels with the original model's label; must be 1.
        with_nnunet: the same for nnU-Net's prediction; None: it is not installed.
    """

    image: str
    labels: tuple[int, ...]
    with_model: float
    with_nnunet: float | None

    def __str__(self) -> str:
        peer = "nnU-Net is not installed here" if self.with_nnunet is None else f"with nnU-Net's {self.with_nnunet:.4%}"
        return (
            f"proof on {self.image}: labels {', '.join(map(str, self.labels))}; equal voxels with the model it was made of "
            f"{self.with_model:.4%}, {peer}"
        )


def prove_package(
    model: ModelFolder,
    unpacked: Path,
    folds: Sequence[Fold],
    device: str = "cpu",
    images: Sequence[Path] | None = None,
    raw: RawDataset | None = None,
) -> PackageProof:
    """Segment one image by the package and by what it was made of, and compare.

    Args:
        model: the original.
        unpacked: the package's model folder.
        folds: to average.
        device: ``cpu``, ``cuda``, ….
        images: files of one case, a channel each; by default the first training case of ``raw``, else a made-up image.

    Raises ModelFolderError when they differ, or nnU-Net can't use the package.
    """
    with tempfile.TemporaryDirectory(prefix="nnssl_adapt-proof-") as place:
        work = Path(place)
        described = _prepare_image(model, work / "images", images, raw)
        logger.info("proof: segmenting %s with the model, then with its package …", described)
        original = _our_labels(model.path, folds, work / "images", work / "original", device)
        ours = _our_labels(unpacked, folds, work / "images", work / "package", device)
        equal = float((original == ours).mean())
        if equal < 1:
            raise ModelFolderError(
                f"the package of {model.path} does not segment {described} as the model does: {equal:.4%} equal voxels"
            )
        peer = _agreement_with_nnunet(unpacked, folds, work, ours, device)
        proof = PackageProof(described, tuple(int(value) for value in np.unique(ours)), equal, peer)
    if peer is not None and peer < NNUNET_AGREES:
        raise ModelFolderError(f"nnU-Net segments {described} by the package differently: {peer:.4%} equal voxels")
    return proof


def _prepare_image(model: ModelFolder, folder: Path, images: Sequence[Path] | None, raw: RawDataset | None) -> str:
    folder.mkdir()
    channels = len(model.channel_names)
    if not images and raw is not None and raw.cases and _channels_in(raw.cases[0].images, model) == channels:
        images = raw.cases[0].images
        described = f"the first training case of {raw.name}"
    else:
        described = ", ".join(path.name for path in images) if images else "a made-up image"
    if not images:
        _write_made_up(model, folder)
        return described
    if all(path.is_file() for path in images) and (found := _channels_in(images, model)) != channels:
        raise ModelFolderError(
            f"--image: {len(images)} file(s) with {found} channel(s), the model takes {channels}, one a file"
            + (", or all in a picture's colours" if model.image_reader in PICTURE_READERS else "")
        )
    for channel, path in enumerate(images):
        if not path.is_file():
            raise ModelFolderError(f"--image: no file {path}")
        if not path.name.endswith(model.file_ending):
            raise ModelFolderError(f"--image {path}: this model's images end in {model.file_ending}")
        shutil.copyfile(path, folder / f"image_{channel:04d}{model.file_ending}")
        beside = path.with_name(f"{path.name.removesuffix(model.file_ending)[:-5]}.json")
        if model.image_reader == TIFF_3D and beside.is_file():
            shutil.copyfile(beside, folder / "image.json")  # the spacing of a stack
    return described


def _channels_in(images: Sequence[Path], model: ModelFolder) -> int:
    """How many channels files hold: pictures one for each colour, others one each."""
    if model.image_reader not in PICTURE_READERS:
        return len(images)
    return sum(count_channels(path, model.image_reader) for path in images)


def _write_made_up(model: ModelFolder, folder: Path) -> None:
    """Smooth noise, somewhat larger than a patch so that several tiles are needed."""
    plan = model.plan
    random = np.random.default_rng(0)
    least = 1 if model.image_reader == NATURAL_2D else 4
    shape = [max(least, int(plan.patch_size[axis] * 1.25)) for axis in plan.transpose_backward]
    transposed = plan.settings.target_spacing((1.0, 1.0, 1.0)) or (1.0, 1.0, 1.0)
    spacing = [transposed[axis] for axis in plan.transpose_backward]
    if model.image_reader in PICTURE_READERS:
        _write_made_up_pictures(model, folder, shape, spacing)
        return
    for channel in range(len(model.channel_names)):
        coarse = sitk.GetImageFromArray(random.normal(size=shape).astype(np.float32))
        image = sitk.SmoothingRecursiveGaussian(coarse, 2.0)
        image = sitk.RescaleIntensity(image, 0, 1000)
        image.SetSpacing([float(mm) for mm in reversed(spacing)])
        sitk.WriteImage(image, str(folder / f"image_{channel:04d}{model.file_ending}"))


def _write_made_up_pictures(model: ModelFolder, folder: Path, shape: Sequence[int], spacing: Sequence[float]) -> None:
    random = np.random.default_rng(0)
    z, y, x = (float(mm) for mm in spacing)
    for channel in range(len(model.channel_names)):
        coarse = gaussian_filter(random.normal(size=shape), [0 if n == 1 else 2 for n in shape])
        grey = np.rint(255 * (coarse - coarse.min()) / max(float(np.ptp(coarse)), 1e-6)).astype(np.uint8)
        path = folder / f"image_{channel:04d}{model.file_ending}"
        write_labels_as_picture(path, grey, (z, y, x), model.image_reader)
    if model.image_reader == TIFF_3D:
        write_json(folder / "image.json", {"spacing": [z, y, x]})


def _our_labels(model: Path, folds: Sequence[Fold], images: Path, output: Path, device: str) -> np.ndarray:
    """Labels (Z, Y, X), without mirroring; summed in float16 and taken as images lie, as nnU-Net does."""
    predictor = Predictor(
        model, folds=list(folds), device=device, tta=False, accumulation_dtype=torch.float16, keep_orientation=True
    )
    predictor.predict(images, output, workers=0, progress=False)
    return _only_labels(output, predictor.model)


def _only_labels(folder: Path, model: ModelFolder) -> np.ndarray:
    return read_labels(folder / f"image{model.file_ending}", model.image_reader)[0]


def _agreement_with_nnunet(
    unpacked: Path, folds: Sequence[Fold], work: Path, ours: np.ndarray, device: str
) -> float | None:
    """Share of voxels with our labels; of a cascade by its second network, which is given what our first one made."""
    model = ModelFolder(unpacked)
    if importlib.util.find_spec("nnunetv2") is None:
        return None
    flags = ["-i", work / "images", "-o", work / "peer", "-m", unpacked, "-device", device.partition(":")[0]]
    flags += ["-f", *folds, "-npp", 1, "-nps", 1, "--disable_tta"]
    if model.plan.previous_stage is not None:
        flags += ["-prev_stage_predictions", work / "package" / model.plan.previous_stage]
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if (unpacked / TRAINER_FILE).is_file():
        calm["nnUNet_extTrainer"] = str(unpacked)
    logger.info("the same with nnU-Net's own prediction …")
    result = subprocess.run(
        [sys.executable, "-c", _NNUNETS_COMMAND, *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, **calm},
        check=False,
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        # Of several the first: what went wrong in a worker process comes before what its parent says about it.
        reason = next((line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])
        raise ModelFolderError(f"nnU-Net can't predict with the package of {unpacked.name}: {reason}")
    theirs = _only_labels(work / "peer", model)
    return float((theirs == ours).mean()) if theirs.shape == ours.shape else 0.0
