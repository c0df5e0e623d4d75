"""``verify``: what it finds, and that it agrees with what training accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset, write_image

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.verifying.examine import examine_dataset, verify_dataset
from nnssl_adapt.errors import DatasetError

SHAPE, SPACING = (4, 6, 5), (2.0, 1.0, 1.3)


def with_header(path: Path, **header: tuple[float, ...]) -> None:
    image = sitk.ReadImage(str(path))
    for name, value in header.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(path))


def with_voxels(path: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(sitk.ReadImage(str(path)))
    sitk.WriteImage(image, str(path))


def with_json(root: Path, **entries: object) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def joined_channels(root: Path) -> None:
    """Both channels of a case in one 4D file, which nnU-Net reads too."""
    paths = [root / f"imagesTr/case_00_000{channel}.nii.gz" for channel in range(2)]
    sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(path)) for path in paths]), str(paths[0]))
    paths[1].unlink()


def list_files(root: Path, **changed: object) -> None:
    cases = {
        f"case_{n:02d}": {
            "images": [f"imagesTr/case_{n:02d}_000{channel}.nii.gz" for channel in range(2)],
            "label": f"labelsTr/case_{n:02d}.nii.gz",
        }
        for n in range(3)
    }
    with_json(root, dataset={**cases, **changed})


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/image.nii.gz")


def float_voxels(shape: tuple[int, ...], value: float) -> np.ndarray:
    voxels = np.ones(shape, np.float32)
    voxels[1, 2, 3] = value
    return voxels


DEFECTS: dict[str, Callable[[Path], object]] = {
    "none": lambda root: None,
    "label spacing by rounding": lambda root: with_header(
        root / "labelsTr/case_00.nii.gz", Spacing=(1.3, 1.0, 2.00003)
    ),
    "channel spacing by rounding": lambda root: with_header(
        root / "imagesTr/case_00_0001.nii.gz", Spacing=(1.3, 1.0, 2.00003)
    ),
    "label spacing of one slice": lambda root: [
        write_image(root / f"{kind}/case_00{channel}.nii.gz", np.ones((1, 6, 5), np.uint8), (thickness, 1.0, 1.3))
        for kind, channel, thickness in (("imagesTr", "_0000", 3), ("imagesTr", "_0001", 3), ("labelsTr", "", 5))
    ],
    "label origin by rounding": lambda root: with_header(root / "labelsTr/case_00.nii.gz", Origin=(1.0001, -2, 3)),
    "label origin": lambda root: with_header(root / "labelsTr/case_00.nii.gz", Origin=(9, -2, 3)),
    "label shape": lambda root: write_image(root / "labelsTr/case_00.nii.gz", np.ones((4, 6, 6), np.uint8), SPACING),
    "label value": lambda root: with_voxels(root / "labelsTr/case_00.nii.gz", np.full(SHAPE, 7, np.uint8)),
    "label fraction": lambda root: with_voxels(root / "labelsTr/case_00.nii.gz", np.full(SHAPE, 0.5, np.float32)),
    "no foreground": lambda root: with_voxels(root / "labelsTr/case_00.nii.gz", np.zeros(SHAPE, np.uint8)),
    "NaN": lambda root: with_voxels(root / "imagesTr/case_00_0000.nii.gz", float_voxels(SHAPE, np.nan)),
    "truncated": lambda root: (root / "imagesTr/case_00_0001.nii.gz").write_bytes(
        (root / "imagesTr/case_00_0001.nii.gz").read_bytes()[:-30]
    ),
    "no image": lambda root: (root / "labelsTr/case_00.nii.gz").write_text("text"),
    "missing channel": lambda root: (root / "imagesTr/case_00_0001.nii.gz").unlink(),
    "missing label": lambda root: (root / "labelsTr/case_00.nii.gz").unlink(),
    "lonely label": lambda root: [path.unlink() for path in (root / "imagesTr").glob("case_00*")],
    "too many channels": lambda root: (root / "imagesTr/case_00_0001.nii.gz").rename(
        root / "imagesTr/case_00_0002.nii.gz"
    ),
    "bad name": lambda root: (root / "imagesTr/case_00_0001.nii.gz").rename(root / "imagesTr/case_00_1.nii.gz"),
    "strange file": lambda root: (root / "imagesTr/notes.txt").write_text("text"),
    "broken links": lambda root: [broken_link(path) for path in root.glob("*/case_00*")],
    "both channels in one file": joined_channels,
    "files listed": list_files,
    "listed and missing": lambda root: (list_files(root), (root / "imagesTr/case_00_0001.nii.gz").unlink()),
    "listed, one channel": lambda root: list_files(
        root, case_00={"images": ["imagesTr/case_00_0000.nii.gz"], "label": "labelsTr/case_00.nii.gz"}
    ),
    "another count": lambda root: with_json(root, numTraining=9),
    "pictures": lambda root: with_json(root, file_ending=".png"),
    "unknown reader": lambda root: with_json(root, overwrite_image_reader_writer="NaturalImage2DIO"),
    "gap in labels": lambda root: with_json(root, labels={"background": 0, "core": 1, "rim": 3}),
    "unknown case in a fold": lambda root: (root / "splits_final.json").write_text(
        json.dumps([{"train": ["case_00", "case_01"], "val": ["case_99"]}])
    ),
}


HARMLESS = {
    "none",
    "label origin by rounding",
    "label origin",
    "no foreground",
    "strange file",
    "both channels in one file",
    "files listed",
    "another count",
}


def accepted_by_training(root: Path) -> bool:
    from nnssl_adapt.data.splits import load_or_make_splits

    try:
        dataset = RawDataset.open(root)
        examine_dataset(dataset.folder).verdict.raise_if_bad()
        load_or_make_splits(root.parent / "preprocessed", [case.identifier for case in dataset.cases], root)
    except DatasetError:
        return False
    return True


def accepted_by_verify(root: Path) -> bool:
    try:
        return verify_dataset(root).is_good
    except DatasetError:
        return False


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_verify_accepts_can_be_trained_and_the_other_way_round(tmp_path, monkeypatch, defect):
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    root = make_dataset(tmp_path, cases=3, channels=2, shape=SHAPE, spacing=SPACING)
    DEFECTS[defect](root)
    assert accepted_by_training(root) == (defect in HARMLESS)
    assert accepted_by_verify(root) == (defect in HARMLESS)


@pytest.mark.parametrize("file", ["labelsTr/case_00.nii.gz", "imagesTr/case_00_0001.nii.gz"])
def test_rounding_is_mended_in_labels_and_in_further_channels(tmp_path, file):
    root = make_dataset(tmp_path, cases=3, channels=2, shape=SHAPE, spacing=SPACING)
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(root / file)))
    with_header(root / file, Spacing=(1.3, 1.0, 2.00003))
    (finding,) = verify_dataset(root).findings
    assert (finding.level, finding.case, finding.fix) == ("error", "case_00", "rounding only: --fix-geometry")
    assert verify_dataset(root, fix_geometry=True).findings == ()
    mended = sitk.ReadImage(str(root / file))
    assert mended.GetSpacing() == pytest.approx((1.3, 1.0, 2.0), abs=1e-6) and np.array_equal(
        sitk.GetArrayFromImage(mended), voxels
    )
    assert RawDataset.open(root).cases


def test_the_folds_that_training_uses_are_looked_at(nnunet_folders):
    root = make_dataset(nnunet_folders / "nnUNet_raw", cases=4, shape=SHAPE, spacing=SPACING)
    for path in sorted(root.glob("*/case_*")):
        number = int(path.name[5:7])
        path.rename(path.with_name(path.name.replace(path.name[:7], f"sub-{number // 2}_ses-{number % 2}")))
    assert any("2 subjects have several cases" in finding.message for finding in verify_dataset(root).findings)
    together = [{"train": ["sub-0_ses-0", "sub-0_ses-1"], "val": ["sub-1_ses-0", "sub-1_ses-1"]}]
    (root / "splits_final.json").write_text(json.dumps(together))
    assert verify_dataset(root).findings == ()
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / root.name
    preprocessed.mkdir()
    apart = [{"train": ["sub-0_ses-0", "sub-1_ses-0"], "val": ["sub-0_ses-1"]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(apart))
    unused, leak = sorted(verify_dataset(root).findings, key=lambda finding: finding.check)
    assert leak.check == "leakage" and f"{preprocessed}" in leak.message and "both sides: sub-0" in leak.message
    assert unused.level == "warning" and "in no fold" in unused.message and "sub-1_ses-1" in unused.message


def test_a_case_called_nan_is_not_said_to_have_nan_voxels(tmp_path):
    root = make_dataset(tmp_path, cases=1, shape=SHAPE, spacing=SPACING)
    for path in sorted(root.glob("*/case_00*")):
        path.rename(path.with_name(path.name.replace("case_00", "NaN_1")))
    (root / "imagesTr/NaN_1_0000.nii.gz").write_text("text")
    (finding,) = verify_dataset(root).findings
    assert (finding.case, finding.check) == ("NaN_1", "readable")
