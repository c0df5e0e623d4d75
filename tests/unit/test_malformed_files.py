"""Any JSON of any type at any place of the files that trained models, sidecars, studies and conversions have."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.malformed import changed_contents, used_or_refused, variants
from support.model_folders import write_model_folder
from support.synthetic import make_dataset

from nnssl_adapt.data.convert.cases import Target
from nnssl_adapt.data.convert.decathlon import convert_msd
from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.evaluation.compare import load_results
from nnssl_adapt.evaluation.report.report import make_report
from nnssl_adapt.inference.ensemble import ensemble_folders
from nnssl_adapt.inference.export import write_probabilities
from nnssl_adapt.inference.postprocess import Postprocessing
from nnssl_adapt.studies.study_file import study_from
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.comparison import cases_seen, recorded_identity

NUMBERS = {"Dice": 0.5, "IoU": 0.4, "n_ref": 3, "n_pred": 4, "TP": 1, "FP": 1, "FN": 1, "TN": 1}
SUMMARY = {
    "foreground_mean": NUMBERS,
    "mean": {"1": NUMBERS, "2": NUMBERS},
    "metric_per_case": [
        {
            "metrics": {"1": NUMBERS, "2": NUMBERS},
            "prediction_file": f"/p/{name}.nii.gz",
            "reference_file": f"/r/{name}.nii.gz",
        }
        for name in "ab"
    ],
    "nnssl_adapt": {
        "empty": "nan",
        "tolerance_mm": 1.0,
        "surface": "voxels",
        "class_names": {"1": "cord", "2": "lesion"},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    (folder / "fold_0" / "validation").mkdir()
    return folder


def test_summaries(model: Path) -> None:
    path = model / "fold_0" / "validation" / "summary.json"
    used = 0
    for number, text in enumerate(variants(SUMMARY, seed=11, most=150)):
        path.write_text(text, encoding="utf-8")
        used += used_or_refused(lambda: load_results(path), text)
        if number % 4 == 0:
            used_or_refused(lambda: make_report(model, overlays=False), text)
    assert used > 5
    path.unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("debug.json", {"nnssl_adapt": "0.1.0", "recipe": {"epochs": 2}, "gpu": "x", "training_cases": ["a"]}),
        ("metrics.jsonl", {"epoch": 0, "seconds": 1.5, "train_loss": 0.2, "pseudo_dice": [0.1, 0.2]}),
    ],
)
def test_what_a_report_reads(model: Path, name: str, content: dict[str, Any]) -> None:
    path = model / "fold_0" / name
    for text in variants(content, seed=12, most=40):
        path.write_text(text, encoding="utf-8")
        assert used_or_refused(lambda: make_report(model, overlays=False), text)
    path.unlink()


def test_what_an_older_run_was_made_of(model: Path) -> None:
    """Older checkpoints are judged by the debug.json beside them."""
    path = model / "fold_0" / "debug.json"
    run = SimpleNamespace(plan=SimpleNamespace(configuration="3d_fullres"))
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    for text in variants({"training_cases": ["a", "b"], "validation_cases": ["c"]}, seed=13, most=60):
        path.write_text(text, encoding="utf-8")
        used_or_refused(lambda: sorted(cases_seen(recorded_identity(checkpoint, {"nnssl_adapt": {}}, run))), text)  # type: ignore[arg-type]
    path.unlink()


def test_yaml_of_recipes_and_studies(tmp_path: Path) -> None:
    study = {
        "dataset": 41,
        "folds": [0],
        "fractions": [0.5, 1.0],
        "seeds": 2,
        "metrics": ["Dice"],
        "arms": {"mae": {"weights": "owner/mae", "spacing": "fixed", "spacing_mm": [2, 1, 1.5]}},
    }
    study["arms"]["scratch"] = {"weights": "scratch"}  # type: ignore[index]
    for wrong in changed_contents(study, seed=14, most=120):
        used_or_refused(lambda content=wrong: study_from(content), repr(wrong))
    path = tmp_path / "r.yaml"
    recipe = {
        "epochs": 5,
        "learning_rate": 0.1,
        "class_weights": {"a": 1.0},
        "mirror_axes": [0, 1],
        "patch_size": [8, 8, 8],
    }
    for text in variants(recipe, seed=15, most=120):
        path.write_text(text, encoding="utf-8")
        used_or_refused(lambda: str(Recipe.load(path)), text)


def test_postprocessing(tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    for text in variants(Postprocessing(((1, 2), (2,))).to_dict(), seed=16, most=100):
        path.write_text(text, encoding="utf-8")
        used_or_refused(lambda: Postprocessing.load(path), text)


def test_old_dataset_json_in_conversions(nnunet_folders: Path, tmp_path: Path) -> None:
    root = make_dataset(tmp_path, "Task07_Tiny", cases=1, shape=(4, 6, 5))
    (root / "imagesTr" / "case_00_0000.nii.gz").rename(root / "imagesTr" / "case_00.nii.gz")
    content = {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "core", "2": "rim"}, "numTraining": 1}
    content |= {
        "training": [{"image": "imagesTr/case_00.nii.gz", "label": "labelsTr/case_00.nii.gz"}],
        "reference": "x",
    }
    used = 0
    for number, text in enumerate(variants(content, seed=17, most=90)):
        (root / "dataset.json").write_text(text, encoding="utf-8")
        target = Target(nnunet_folders / "nnUNet_raw" / f"Dataset{100 + number}_Tiny")
        used += used_or_refused(lambda folder=target: convert_msd(root, folder), text)
    assert used > 5


def test_places_of_classes_beside_a_store(tmp_path: Path) -> None:
    shared = tmp_path / "fg_sampling"
    shared.mkdir()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"spacing": [1, 1, 1]}))
    for name in ("a.b2nd", "a_seg.b2nd"):
        import blosc2

        blosc2.asarray(np.zeros((1, 3, 4, 5), np.float32), urlpath=str(tmp_path / name), mode="w")
    blosc2.asarray(np.arange(4, dtype=np.uint64), urlpath=str(shared / "locations.b2nd"), mode="w")
    arrays = {"indptr": [0, 1], "class_id": [0], "count": [4], "base": [0], "shape": [[3, 4, 5]]}
    for name, values in arrays.items():
        np.save(shared / f"{name}.npy", np.array(values))
    meta = shared / "meta.json"
    good = {"version": 1, "identifiers": ["a"], "class_keys": [1, [1, 2]]}
    for text in variants(good, seed=18, most=80):
        meta.write_text(text, encoding="utf-8")
        used_or_refused(lambda: CaseStore(tmp_path).open("a").properties, text)
    meta.write_text(json.dumps(good))
    for name, values in arrays.items():
        for wrong in ([], [7], [-1, 99], [[1]], [1.5, 2.5], ["x"], [[3, 4]]):
            np.save(shared / f"{name}.npy", np.array(wrong))
            used_or_refused(lambda: CaseStore(tmp_path).open("a").properties, f"{name} {wrong}")
        (shared / f"{name}.npy").write_bytes(b"\x93NUMPY\x01")
        used_or_refused(lambda: CaseStore(tmp_path).open("a").properties, name)
        np.save(shared / f"{name}.npy", np.array(values))


def test_sidecars_of_predictions(tmp_path: Path) -> None:
    """``.npz`` and ``.pkl``: another type in any place of the properties, and bytes that are no archive."""
    folder = tmp_path / "in"
    folder.mkdir()
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "a": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    geometry = ImageGeometry(
        (3.0, 1.0, 0.5), (1.0, -2.0, 3.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), (2, 3, 4)
    )
    probabilities = np.full((2, 2, 3, 4), 0.5, np.float32)
    write_probabilities(folder / "a", probabilities, geometry.to_properties())
    good = (folder / "a.npz").read_bytes()
    plain = json.loads(json.dumps(geometry.to_properties()))
    affines = {"nibabel_stuff": {"original_affine": np.eye(4).tolist()}, "spacing": [1.0, 1.0, 1.0]}
    for properties in (plain, affines):
        for wrong in changed_contents(properties, seed=19, most=60):
            (folder / "a.pkl").write_bytes(pickle.dumps(wrong))
            used_or_refused(lambda: ensemble_folders([folder], tmp_path / "out"), repr(wrong))
    write_probabilities(folder / "a", probabilities, geometry.to_properties())
    for cut in (0, 1, 30, len(good) // 2, len(good) - 1):
        (folder / "a.npz").write_bytes(good[:cut])
        with pytest.raises(NnsslAdaptError):
            ensemble_folders([folder], tmp_path / "out")
    for array in (np.array("x"), np.zeros((2, 2)), np.zeros((2, 2, 3, 4), np.int16), np.zeros((0, 2, 3, 4))):
        np.savez(folder / "a.npz", probabilities=array)
        with pytest.raises(NnsslAdaptError):
            ensemble_folders([folder], tmp_path / "out")
