"""The embedded example: a small real checkpoint, and a dataset made on the spot from a brain template.

The images are smooth random deformations of one template (MNI152, which the package ``nilearn`` ships with maps of grey
and white matter), and the checkpoint's pre-training has seen that template. So the numbers show that everything works,
and nothing about how well it would work on patients.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, map_coordinates

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.metrics import load_summary
from nnssl_adapt.evaluation.overlay import draw_overlay
from nnssl_adapt.files import atomic_path, make_folder, write_json
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.paths import raw_folder

DATASET_NAME = "Dataset900_DemoBrain"
CLASS_NAMES = ("grey matter", "white matter")
_BOX = (slice(52, 124), slice(60, 180), slice(98, 174))  # voxels (Z, Y, X) of the 1 mm template: most of one hemisphere
_CASES = 8
_LARGEST_SHIFT_MM = 4.0


def demo_checkpoint() -> Path:
    """Folder of the bundled checkpoint: a small ResEnc pre-trained by nnssl's masked autoencoder."""
    return Path(str(resources.files("nnssl_adapt") / "assets" / "demo_resenc_mae"))


def make_demo_dataset(folder: str | Path, seed: int = 0) -> Path:
    """Write the demo's raw dataset (8 cases, background, grey and white matter) below ``folder`` and return where.

    Cases that are already there are kept. Spacings differ from case to case (1.0 to 1.3 mm), as in real datasets.

    Raises:
        ConfigurationError: nilearn is not installed.
    """
    folder = Path(folder) / DATASET_NAME
    template, grey, white = _load_template()
    for index in range(_CASES):
        image_file = folder / "imagesTr" / f"brain_{index:02d}_0000.nii.gz"
        label_file = folder / "labelsTr" / f"brain_{index:02d}.nii.gz"
        if image_file.is_file() and label_file.is_file():
            continue
        random = np.random.default_rng((seed, index))
        image, labels, spacing = _deformed_case(template, grey, white, random)
        _write(label_file, labels, spacing)
        _write(image_file, image, spacing)
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {"0": "T1"},
            "labels": {"background": 0, **{name: i + 1 for i, name in enumerate(CLASS_NAMES)}},
            "numTraining": _CASES,
            "file_ending": ".nii.gz",
            "description": "Smooth random deformations of one brain template. For showing that things run, nothing else.",
            "reference": "ICBM 2009 MNI152 template and tissue probability maps, as shipped by nilearn",
        },
    )
    return folder


def _load_template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1, grey matter and white matter of the template at 1 mm, each (Z, Y, X), cut to the demo's box."""
    try:
        from nilearn import datasets
    except ImportError:
        raise ConfigurationError(
            "the demo needs the package nilearn, which ships the brain template: pip install 'nnssl-adapt[demo]'"
        ) from None
    images = (
        datasets.load_mni152_template(resolution=1),
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
    )
    t1, grey, white = (np.asarray(image.get_fdata(), dtype=np.float32).transpose(2, 1, 0)[_BOX] for image in images)
    return t1, grey, white


def _deformed_case(
    template: np.ndarray, grey: np.ndarray, white: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """One case: image (Z, Y, X) int16, labels (Z, Y, X) uint8, and its isotropic spacing in mm."""
    spacing = float(np.round(random.uniform(1.0, 1.3), 2))
    shape = tuple(round(n / spacing) for n in template.shape)
    grid = np.meshgrid(*(np.arange(n) * spacing for n in shape), indexing="ij")
    where = np.stack([axis + _smooth_shift(shape, random) for axis in grid])
    image, grey, white = (map_coordinates(a, where, order=1, mode="nearest") for a in (template, grey, white))
    image = np.clip(image / max(float(image.max()), 1e-6), 0, 1) ** random.uniform(0.8, 1.25)
    inside = image > 0
    image = 1000 * image + random.normal(0, 25, shape)
    image = np.where(inside, np.clip(image, 1, None), 0)  # the template is brain-extracted: its outside stays zero
    labels = np.argmax(np.stack([np.full(shape, 0.35), grey, white]), axis=0)
    return image.astype(np.int16), labels.astype(np.uint8), spacing


def _smooth_shift(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """A displacement (in mm of the template) that varies slowly over the volume."""
    noise = gaussian_filter(random.normal(size=shape), 12, mode="nearest")
    found: np.ndarray = noise * (_LARGEST_SHIFT_MM / max(float(np.abs(noise).max()), 1e-9))
    return found


def _write(path: Path, array: np.ndarray, spacing: float) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((spacing,) * 3)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # the template's axes point right, anterior, superior
    make_folder(path.parent)
    with atomic_path(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def show_result(model: ModelFolder, fold: int) -> tuple[Path, dict[str, float]]:
    """Draw the worst validation case of a fold, and return the picture's path and the mean Dice of every case."""
    validation = model.path / f"fold_{fold}" / "validation"
    summary = load_summary(validation / "summary.json")
    dice = {
        Path(case["prediction_file"]).name.removesuffix(".nii.gz"): float(
            np.nanmean([metrics["Dice"] for metrics in case["metrics"].values()])
        )
        for case in summary["metric_per_case"]
    }
    worst = min(dice, key=lambda case: dice[case])
    dataset = raw_folder() / DATASET_NAME
    image = sitk.ReadImage(str(dataset / "imagesTr" / f"{worst}_0000.nii.gz"))
    labels = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in (dataset / "labelsTr" / f"{worst}.nii.gz", validation / f"{worst}.nii.gz")
    )
    reference, prediction = labels
    picture = draw_overlay(
        validation.parent / "overlay.png",
        sitk.GetArrayFromImage(image).astype(np.float32),
        reference,
        prediction,
        CLASS_NAMES,
        spacing=image.GetSpacing()[::-1],
        title=f"{worst}: mean Dice {dice[worst]:.3f}",
        direction=image.GetDirection(),
    )
    return picture, dice
