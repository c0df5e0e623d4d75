"""A trained model folder with all that training leaves, and a hub that can be written to."""

import json
import logging

import pytest
import torch
from support.model_folders import CASES, HOME, write_model_folder


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command sends it to a screen that is gone after the test."""
    logger = logging.getLogger("nnssl_adapt")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def trained(tmp_path):
    """``trained(**options of write_model_folder)``: with logs, paths and case names in all the places they are found."""

    def write(root=None, private=True, **options):
        folder = write_model_folder(root or tmp_path / "trained", **options)
        content = json.loads((folder / "dataset.json").read_text())
        content["image_orientation"] = "RPI"
        content["licence"] = "CC0"
        if private:
            content["dataset"] = {case: {"images": [f"{HOME}/{case}.nii.gz"]} for case in CASES}
        (folder / "dataset.json").write_text(json.dumps(content))
        plans = json.loads((folder / "plans.json").read_text())
        plans["pretrain_info"] = {
            "checkpoint_path": f"{HOME}/weights/mae",
            "citations": [{"type": "Method", "name": "MAE", "apa_citations": ["He, K. (2022). Masked autoencoders."]}],
        }
        plans["nnssl_adapt"] = {
            "source": {
                "source": f"{HOME}/weights/mae",
                "repo_id": "AnonRes/ResEncL-OpenMind-MAE",
                "revision": "0123abc",
                "sha256": "ab" * 32,
                "filename": "checkpoint_final.pth",
            }
        }
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset_fingerprint.json").write_text(json.dumps({"spacings": [[2.0, 1.0, 1.5]]}))
        for fold in folder.glob("fold_*"):
            debug = {"plans_file": f"{HOME}/plans.json", "training_cases": [CASES[0]], "hostname": "mri-3", "fold": 0}
            (fold / "debug.json").write_text(json.dumps(debug))
            (fold / "progress.png").write_bytes(b"\x89PNG progress")
            log = (
                f"results in {HOME.replace(' ', '_')}/nnUNet_results/x\npredicting {CASES[1]}\n1.5 mm/voxel, lr 0.01\n"
            )
            (fold / "training_log_2026_1_2.txt").write_text(log)
            (fold / "validation").mkdir()
            (fold / "validation" / f"{CASES[1]}.nii.gz").write_bytes(b"")
            summary = {"mean": {"1": {"Dice": 0.91}, "2": {"Dice": 0.42}}, "metric_per_case": []}
            (fold / "validation" / "summary.json").write_text(json.dumps(summary))
            checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
            checkpoint |= {"optimizer_state": {"moments": torch.zeros(20_000)}, "logging": {"where": HOME}}
            torch.save(checkpoint, fold / "checkpoint_final.pth")
            (fold / "checkpoint_best.pth").write_bytes(b"not to be published")
        return folder

    return write


@pytest.fixture
def hub(hub, monkeypatch):
    """A running hub, and no pauses between attempts."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return hub
