"""Cases called like image formats, listed explicitly in dataset.json, from the raw dataset to the report."""

import json
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset

from nnssl_adapt.cli import main
from nnssl_adapt.geometry.orientation import opposite

NAMES = ("c00.nii", "c00.hdr", "c00.nia", "c00_0000", "c00")
"""ITK takes the first three for formats wherever they stand in a name; the fourth looks like a channel's file."""

TINY = ["--epochs", "1", "--iters", "2", "--warmup", "0", "--patch", "16", "24", "16", "-device", "cpu"]
TINY += ["--workers", "0", "--set", "validation_iterations=1"]


def run(*words):
    return main.main([str(word) for word in words])


def write_listing(root):
    """Put each file where its name says nothing, and list the files in dataset.json. Returns case → image."""
    listing, images = {}, {}
    for number, name in enumerate(NAMES):
        place = root / "patients" / str(number)
        place.mkdir(parents=True)
        (root / "imagesTr" / f"case_{number:02d}_0000.nii.gz").rename(place / "scan.nii.gz")
        (root / "labelsTr" / f"case_{number:02d}.nii.gz").rename(place / "manual.nii.gz")
        folder = place.relative_to(root)
        listing[name] = {"images": [f"{folder}/scan.nii.gz"], "label": f"{folder}/manual.nii.gz"}
        images[name] = place / "scan.nii.gz"
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": listing}))
    return images


@pytest.mark.pictures
def test_odd_names_in_an_explicit_list(nnunet_folders, small_resenc, tmp_path, capsys):
    root = make_dataset(nnunet_folders / "nnUNet_raw", cases=5, shape=(20, 28, 24))
    images = write_listing(root)
    split = {"train": ["c00"], "val": sorted(NAMES[:4])}
    (root / "splits_final.json").write_text(json.dumps([split]))
    words = ["-d", 991, "-n", "odd", "-pc", small_resenc, "-am", "median", "-np", 1]
    assert run("preprocess", *words, "--plans_name", "odd") == 0
    assert run("train", "-d", 991, "-c", "3d_fullres", "-f", 0, "-p", "odd", *TINY) == 0
    (model,) = (nnunet_folders / "nnUNet_results" / root.name).iterdir()
    validated = sorted(path.name for path in (model / "fold_0" / "validation").glob("*.nii.gz"))
    assert validated == sorted(f"{name}.nii.gz" for name in split["val"])

    orientation = json.loads((model / "plans.json").read_text())["image_orientation"]
    assert json.loads((model / "dataset.json").read_text())["image_orientation"] == orientation == "RAI"
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, path in images.items():
        shutil.copy(path, scans / f"{name}_0000.nii.gz")
    turned = sitk.DICOMOrient(sitk.ReadImage(str(images["c00"])), opposite("ASL"))
    sitk.WriteImage(turned, str(scans / "turned.nia_0000.nii.gz"))
    (scans / "broken.hdr_0000.nii.gz").write_bytes((scans / "c00_0000.nii.gz").read_bytes()[:2000])
    out = tmp_path / "out"
    assert run("predict", "-i", scans, "-o", out, "-m", model, "-device", "cpu", "--no-tta", "-np", 1) == 1
    assert "broken.hdr" in capsys.readouterr().err
    written = sorted(path.name.removesuffix(".nii.gz") for path in out.glob("*.nii.gz"))
    assert written == sorted((*NAMES, "turned.nia"))
    upright = sitk.DICOMOrient(sitk.ReadImage(str(out / "turned.nia.nii.gz")), opposite(orientation))
    same = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "c00.nii.gz")))
    assert (sitk.GetArrayFromImage(upright) == same).all() and same.any()

    (out / "turned.nia.nii.gz").unlink()
    references = nnunet_folders / "nnUNet_preprocessed" / root.name / "gt_segmentations"
    assert run("evaluate", "-p", out, "-g", references, "-np", 1) == 0
    cases = json.loads((out / "summary.json").read_text())["metric_per_case"]
    assert sorted(Path(case["prediction_file"]).name for case in cases) == sorted(f"{name}.nii.gz" for name in NAMES)
    assert run("report", model, "-o", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert 'id="case-0"' in page and "not drawn" not in page
    assert run("find-best", "-d", 991, "--no-ensembles", "-np", 1) == 0
    assert not list(tmp_path.rglob(".unfinished-*"))
