"""Pictures, from an empty folder to a report, by the commands that users type: ``-c 2d`` from scratch and from 2D weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import write_picture_dataset
from support.planar import write_planar_model

from nnssl_adapt.cli import main, preprocess, train
from nnssl_adapt.data.splits import read_splits

SHORT = ["-device", "cpu", "--workers", "0", "--epochs", "2", "--iters", "6", "--set", "validation_iterations=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        for part in ("raw", "preprocessed", "results"):
            (root / part).mkdir()
            patch.setenv(f"nnUNet_{part}", str(root / part))
        yield write_picture_dataset(root / "raw" / "Dataset005_Cells", cases=5)


@pytest.fixture(scope="module")
def model(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned from a 2D network by the commands."""
    source = write_planar_model(tmp_path_factory.mktemp("models"))
    assert preprocess.main(["-d", "5", "-c", "2d", "-n", "others", "-pc", str(source), "-np", "1"]) == 0
    plans = "ptPlans__others____Spacing__1.00_1.00___Norm__Z_Z_Z"
    assert train.main(["5", "2d", "0", "-p", plans, "--warmup", "0", *SHORT]) == 0
    return Path(os.environ["nnUNet_results"]) / "Dataset005_Cells" / f"PretrainedTrainer__{plans}__2d"


def test_what_a_training_leaves(model: Path) -> None:
    fold = model / "fold_0"
    cases = read_splits(Path(os.environ["nnUNet_preprocessed"]) / "Dataset005_Cells" / "splits_final.json")[0]["val"]
    assert sorted(path.name for path in (fold / "validation").glob("*.png")) == sorted(f"{case}.png" for case in cases)
    assert json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]
    rows = json.loads((fold / "transfer_report.json").read_text())
    assert rows["coverage"] == 1.0
    assert (model / "report.html").is_file()
    assert json.loads((model / "plans.json").read_text())["configurations"]["2d"]["patch_size"] == [24, 32]


def test_pictures_are_predicted_and_judged(pictures: Path, model: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number, ending in enumerate((".png", ".jpg", ".bmp")):  # written as .png, as the labels of the training
        name = f"cell_{number:02d}_0000"
        Image.open(pictures / "imagesTr" / f"{name}.png").save(images / f"{name}{ending}")
    assert (
        main.main(["predict", "-i", str(images), "-o", str(output), "-m", str(model), "-f", "0", "-device", "cpu"]) == 0
    )
    written = sorted(path.name for path in output.glob("*.png"))
    assert written == ["cell_00.png", "cell_01.png", "cell_02.png"]
    labels = np.asarray(Image.open(output / "cell_00.png"))
    assert labels.shape == (44, 60) and labels.dtype == np.uint8
    words = [str(pictures / "labelsTr"), str(output), "-djfile", str(model / "dataset.json"), "--chill"]
    assert main.main(["evaluate", *words]) == 0
    assert main.main(["report", str(model)]) == 0


def test_packages_and_the_best_configuration(model: Path, tmp_path: Path) -> None:
    words = [
        "5",
        "-c",
        "2d",
        "-tr",
        "PretrainedTrainer",
        "-p",
        model.name.split("__", 1)[1].removesuffix("__2d"),
        "-f",
        "0",
    ]
    assert main.main(["find-best", *words]) == 0


def test_from_scratch(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess.main(["-d", "5", "-c", "2d", "-n", "scratch", "--dry-run"]) == 0
    assert preprocess.main(["-d", "5", "-c", "2d", "-n", "scratch", "-np", "1"]) == 0
    said = capsys.readouterr().out
    assert "-c 2d -f 0 -p ptPlans_dynamic__scratch --from_scratch" in said
    plans = Path(os.environ["nnUNet_preprocessed"]) / "Dataset005_Cells" / "ptPlans_dynamic__scratch.json"
    content = json.loads(plans.read_text())
    arguments = content["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4] * arguments[
        "n_stages"
    ]  # a network of the planned size takes minutes on a CPU
    plans.write_text(json.dumps(content))
    words = ["5", "2d", "0", "-p", "ptPlans_dynamic__scratch", "--from_scratch", *SHORT, "--patch", "1", "32", "40"]
    assert train.main(words) == 0


def test_wrong_weights_are_told(pictures: Path, small_resenc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess.main(["-d", "5", "-c", "2d", "-n", "x", "-pc", str(small_resenc)]) == 1
    assert "3D network" in capsys.readouterr().err
    assert preprocess.main(["-d", "5", "-n", "x"]) != 0
    assert "-pc" in capsys.readouterr().err
