"""``package``, ``name``, ``install``, ``models`` and ``push`` as a person types them."""

import json
import logging

import pytest
from support.model_folders import write_model_folder

from nnssl_adapt.cli.main import main

TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    logger = logging.getLogger("nnssl_adapt")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def model(tmp_path, nnunet_folders):
    return write_model_folder(tmp_path / "trained")


def test_from_package_to_installed_model(model, tmp_path, capsys):
    flags = ["--date", "2024-09-15", "--orientation", "RPI", "--name", "model_seg_t2_unet3d", "--no-proof"]
    assert main(["package", str(model), "-o", str(tmp_path / "out"), *flags]) == 0
    out = capsys.readouterr().out
    assert "warning: no licence" in out and "gh release create r20240915" in out
    assert main(["install", str(tmp_path / "out" / "model_seg_t2_unet3d-r20240915.zip")]) == 0
    assert f"-m {tmp_path / 'nnUNet_results' / 'Dataset991_Tiny' / TRAINER}" in capsys.readouterr().out
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "installed from model_seg_t2_unet3d-r20240915.zip" in out and "AnonRes/ResEncL-OpenMind-MAE" in out
    assert main(["models", "--public"]) == 0
    assert "Dataset991" not in capsys.readouterr().out


def test_models_without_a_results_folder(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results", raising=False)
    assert main(["models"]) == 0 and "nnUNet_results is not set" in capsys.readouterr().out
    assert main(["models", "--installed"]) == 1
    assert "export nnUNet_results" in capsys.readouterr().err


def test_errors_are_one_line_and_leave_nothing(model, tmp_path, capsys):
    for words in (
        ["package", str(tmp_path), "-o", str(tmp_path / "out")],
        ["package", str(model), "-o", str(tmp_path / "out"), "--name", "model seg"],
        ["package", str(model), "-o", str(tmp_path / "out"), "--no-proof"],  # nothing tells the orientation
        ["install", str(tmp_path / "nowhere.zip")],
        ["push", "nobody", str(model)],
        ["name", "--task", "cut"],
    ):
        assert main(words) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "bug" not in captured.err
    assert not (tmp_path / "out").exists()


def test_names(capsys):
    assert (
        main(["name", "--task", "seg", "--anatomy", "sc", "gm", "--contrast", "t1", "t2", "--architecture", "unet3d"])
        == 0
    )
    assert capsys.readouterr().out == "model_seg_sc-gm_t1-t2_unet3d\n"
    assert main(["name", "model_seg_monkey_sc_t1_unet3d"]) == 0
    out = capsys.readouterr().out
    assert "animal        monkey" in out and "by the convention: model_seg_monkey_t1_unet3d" in out
    assert main(["name", "model_seg_monkey_sc_t1_unet3d", "--strict"]) == 1
    assert main(["name", "model_seg_sc-gm_t1-t2_unet3d", "--strict"]) == 0


def test_push(model, hub, tmp_path, capsys):
    assert main(["push", "made-up/cord", str(model), "--licence", "MIT"]) == 0
    commit = hub.repositories["made-up/cord"].commit
    assert f"-pc made-up/cord@{commit}" in capsys.readouterr().out
    assert main(["install", "made-up/cord", "--cache-dir", str(tmp_path / "cache")]) == 0
    installed = tmp_path / "nnUNet_results" / "Dataset991_Tiny" / TRAINER
    assert json.loads((installed / "dataset.json").read_text())["labels"]["lesion"] == 2
