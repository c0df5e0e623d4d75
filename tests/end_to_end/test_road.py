"""The main job, from an empty folder, by the commands that users type."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.hub_server import HubServer
from support.synthetic import make_dataset
from support.training_runs import assert_same_training

import nnssl_adapt as na
from nnssl_adapt import train as rank_program
from nnssl_adapt.cli import main, preprocess, train
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.training.launch import launch

TINY = [
    "--epochs",
    "2",
    "--iters",
    "2",
    "--warmup",
    "1",
    "--patch",
    "16",
    "24",
    "16",
    "--set",
    "validation_iterations=1",
]


def folder_of(plans_name):
    return Path(os.environ["nnUNet_results"]) / "Dataset991_Tiny" / f"PretrainedTrainer__{plans_name}__3d_fullres"


@pytest.fixture
def raw(tiny_dataset):
    """A raw dataset that has its fingerprint already."""
    return tiny_dataset(shape=(20, 28, 24))


@pytest.fixture
def fresh(nnunet_folders):
    """A raw dataset of which nothing is known yet."""
    return make_dataset(nnunet_folders / "nnUNet_raw", cases=3, shape=(20, 28, 24))


@pytest.mark.pictures
def test_preprocess_train_predict(raw, small_resenc, tmp_path, capsys):
    words = ["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-am", "median", "-np", "1"]
    assert preprocess.main(words) == 0
    plans = "ptPlans__mae____Spacing__2.00_1.00_1.30___Norm__Z"
    said = capsys.readouterr().out
    assert f"nnUNetv2_train_pretrained -d 991 -c 3d_fullres -f 0 -p {plans}" in said

    assert train.main(["991", "3d_fullres", "0", "-p", plans, "-device", "cpu", "--workers", "0", *TINY]) == 0
    model = folder_of(plans)
    fold = model / "fold_0"
    for name in (
        "checkpoint_final.pth",
        "progress.png",
        "transfer_report.json",
        "validation/summary.json",
        "debug.json",
    ):
        assert (fold / name).is_file(), name
    assert not (fold / "checkpoint_latest.pth").exists()
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    report = json.loads((fold / "transfer_report.json").read_text())
    assert report["coverage"] == 1.0

    validation = json.loads((fold / "validation" / "summary.json").read_text())
    predicted = {Path(case["prediction_file"]).name for case in validation["metric_per_case"]}
    splits = json.loads((raw.parents[1] / "nnUNet_preprocessed" / raw.name / "splits_final.json").read_text())
    assert predicted == {f"{case}.nii.gz" for case in splits[0]["val"]}

    # The Predictor, from the image files, segments the validation case as the validation did from the store.
    case = splits[0]["val"][0]
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(raw / "imagesTr" / f"{case}_0000.nii.gz", images)
    words = ["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"]
    assert main.main(words) == 0
    ours = sitk.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz"))
    again = sitk.ReadImage(str(fold / "validation" / f"{case}.nii.gz"))
    assert np.mean(sitk.GetArrayFromImage(ours) == sitk.GetArrayFromImage(again)) > 0.9999
    image = sitk.ReadImage(str(raw / "imagesTr" / f"{case}_0000.nii.gz"))
    assert ours.GetSpacing() == image.GetSpacing() and ours.GetOrigin() == image.GetOrigin()


def test_finetune_in_one_go_and_again(fresh, small_resenc, capsys):
    words = ["finetune", "-d", "Dataset991_Tiny", "-pc", str(small_resenc), "-n", "one", "-np", "1"]
    words += ["-device", "cpu", "--workers", "0", *TINY]
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert "small_resenc" in said and "model in" in said
    model = folder_of("ptPlans__one____Spacing__1.00_1.00_1.00___Norm__Z")
    summary = model / "fold_0" / "validation" / "summary.json"
    first = summary.read_text()
    assert main.main(words) == 0  # nothing is left to do, and nothing is lost
    assert summary.read_text() == first


def test_finetune_hands_its_training_over_to_several_processes(raw, small_resenc, monkeypatch, capsys):
    """What they are told is what a single process does. (That several do the same is tested elsewhere.)"""
    words = ["finetune", "-d", "991", "-pc", str(small_resenc), "-np", "1", "-device", "cpu", "--workers", "0", *TINY]
    words += ["--seed", "7", "--set", "weight_decay=0.01"]
    assert main.main([*words, "-n", "one"]) == 0
    asked = []

    def in_this_process(arguments, count, device):
        asked.append((count, device))
        return rank_program.main(arguments)

    monkeypatch.setattr(launch, "run_ranks", in_this_process)
    for _ in range(2):  # the second time, all is done
        assert main.main([*words, "-n", "several", "-num_gpus", "2", "--time-limit", "30"]) == 0
    assert asked == [(2, "cpu")] * 2
    assert "is trained already" in capsys.readouterr().out
    plans = (f"ptPlans__{name}____Spacing__1.00_1.00_1.00___Norm__Z" for name in ("one", "several"))
    assert_same_training(*(ModelFolder.open(folder_of(name)) for name in plans))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-num_gpus", "3", "--batch", "2"], "batch of 2 can't be shared by 3 processes"),
        (["-num_gpus", "0"], "-num_gpus 0"),
    ],
)
def test_finetune_looks_at_the_number_of_processes_before_it_prepares(raw, small_resenc, more, message, capsys):
    assert main.main(["finetune", "-d", "991", "-pc", str(small_resenc), "-device", "cpu", *more]) == 1
    assert message in capsys.readouterr().err
    assert not list(Path(os.environ["nnUNet_preprocessed"]).rglob("*.b2nd"))


def test_finetune_is_started_once(raw, small_resenc, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["finetune", "-d", "991", "-pc", str(small_resenc), "-device", "cpu"]) == 1
    assert "finetune is started once" in capsys.readouterr().err


def test_inspect_shows_what_would_be_transferred(raw, small_resenc, capsys):
    assert main.main(["inspect", str(small_resenc), "-d", "991"]) == 0
    said = capsys.readouterr().out
    assert "ResidualEncoderUNet" in said and "1 × 1 × 1 mm" in said and "encoder.stages" in said


def test_from_python(raw, small_resenc):
    """The public page, as a notebook would use it."""
    checkpoint = na.open_checkpoint(small_resenc)
    network = na.build_network(checkpoint.architecture, in_channels=1, num_classes=3, patch_size=(16, 24, 16))
    report = na.transfer_weights(checkpoint, network)
    assert report.coverage == 1.0 and "encoder" in str(report)
    plan = na.make_plan(dataset=991, checkpoint=checkpoint, mode="median", name="notebook", workers=1)
    store = na.preprocess_dataset(plan, workers=1, progress=False)
    assert len(store.identifiers) == 5
    recipe = na.Recipe.load("tiny_cpu").override(
        epochs=1, warmup_epochs=0, iterations_per_epoch=1, validation_iterations=1, patch_size=(16, 24, 16)
    )
    model = na.PretrainedTrainer(plan, fold=1, recipe=recipe, device="cpu", workers=0).run()
    image = np.random.default_rng(0).normal(100, 20, (1, 12, 17, 19)).astype(np.float32)
    before = image.copy()
    labels = na.Predictor(model.path, device="cpu").predict(image, spacing=(2.0, 1.0, 1.5))
    assert labels.shape == (12, 17, 19)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("state", ["killed", "unfinished"])
def test_preprocessing_goes_on_where_it_stopped(raw, small_resenc, state, capsys):
    words = ["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1"]
    assert preprocess.main(words) == 0
    plan = na.FinetunePlan.find("Dataset991_Tiny", "ptPlans__mae____Spacing__1.00_1.00_1.00___Norm__Z")
    whole = {p.name: p.stat().st_mtime_ns for p in plan.store_folder.glob("*.b2nd")}
    if state == "killed":
        (plan.store_folder / "case_02_seg.b2nd").unlink()
    else:
        file = plan.store_folder / "case_02.b2nd"
        file.write_bytes(file.read_bytes()[:-50])
    assert preprocess.main(words) == 0
    now = {p.name: p.stat().st_mtime_ns for p in plan.store_folder.glob("*.b2nd")}
    changed = {name for name in whole if now[name] != whole[name]}
    assert changed == {"case_02.b2nd", "case_02_seg.b2nd"}


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nnssl_adapt.cli.main", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_from_the_hub_and_then_offline(raw, small_resenc, tmp_path):
    """As on a cluster: preprocessing where there is internet, training where there is none."""
    names = ("checkpoint_final.pth", "adaptation_plan.json")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with HubServer() as hub:
        hub.add("someone/small-resenc", {name: (small_resenc / name).read_bytes() for name in names})
        words = ("preprocess", "-d", "991", "-n", "hub", "-pc", "someone/small-resenc", "-np", "1")
        result = run(*words, HF_ENDPOINT=hub.url, **environment)
        assert result.returncode == 0, result.stderr
    plan = na.FinetunePlan.find("Dataset991_Tiny", "ptPlans__hub____Spacing__1.00_1.00_1.00___Norm__Z")
    source = plan.provenance.source
    assert source.repo_id == "someone/small-resenc" and len(source.revision) == 40
    words = ("train", "-d", "991", "-f", "0", "-p", plan.plans_name, "-device", "cpu", "--workers", "0", *TINY)
    result = run(*words, HF_HUB_OFFLINE="1", **environment)
    assert result.returncode == 0, result.stderr
    result = run(*words, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert result.returncode == 1 and "someone/small-resenc" in result.stderr and "Traceback" not in result.stderr


def test_errors_are_one_line_and_verbose_has_the_traceback(raw, small_resenc, capsys):
    for words, expected in (
        (("inspect", "no/such/file.pth"), "no/such/file.pth"),
        (("preprocess", "-d", "7", "-n", "x", "-pc", str(small_resenc)), "Found: Dataset991_Tiny"),
        (("train", "-d", "991", "-f", "0", "-p", "ptPlans__none", "-device", "cpu"), "no plans file"),
        (("predict", "-i", str(raw), "-o", "out", "-m", str(raw), "-device", "cpu"), "plans.json"),
    ):
        assert main.main(list(words)) == 1
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1 and "Traceback" not in said
    result = run("inspect", "no/such/file.pth", "--verbose")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_training_says_so(raw, small_resenc, capsys):
    assert main.main(["finetune", "-d", "991", "-pc", str(small_resenc)]) == 1
    said = capsys.readouterr().err
    assert "-device cpu" in said and "Traceback" not in said


def test_unset_variables_say_what_to_export(small_resenc, monkeypatch, capsys):
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{part}", raising=False)
    assert main.main(["preprocess", "-d", "7", "-n", "x", "-pc", str(small_resenc)]) == 1
    assert "nnUNet_raw" in capsys.readouterr().err


def damage_shape(raw):
    image = sitk.ReadImage(str(raw / "labelsTr" / "case_01.nii.gz"))
    sitk.WriteImage(image[1:, :, :], str(raw / "labelsTr" / "case_01.nii.gz"))


def damage_label(raw):
    image = sitk.ReadImage(str(raw / "labelsTr" / "case_01.nii.gz"))
    image[3, 3, 3] = 9
    sitk.WriteImage(image, str(raw / "labelsTr" / "case_01.nii.gz"))


def damage_nan(raw):
    image = sitk.Cast(sitk.ReadImage(str(raw / "imagesTr" / "case_01_0000.nii.gz")), sitk.sitkFloat32)
    image[3, 3, 3] = float("nan")
    sitk.WriteImage(image, str(raw / "imagesTr" / "case_01_0000.nii.gz"))


def damage_gzip(raw):
    file = raw / "imagesTr" / "case_01_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_shape, "shape"),
        (damage_label, "9"),
        (damage_nan, "NaN"),
        (damage_gzip, "case_01_0000.nii.gz"),
        (lambda raw: (raw / "imagesTr" / "case_01_0000.nii.gz").unlink(), "case_01"),
        (lambda raw: (raw / "labelsTr" / "case_01.nii.gz").unlink(), "case_01"),
        (lambda raw: (raw / "dataset.json").unlink(), "dataset.json"),
        (lambda raw: (raw / "dataset.json").write_text("{"), "dataset.json"),
        (lambda raw: (raw / "dataset.json").write_text('{"labels": {}}'), "dataset.json"),
    ],
)
def test_bad_datasets(fresh, small_resenc, damage, expected, capsys):
    damage(fresh)
    assert preprocess.main(["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1"]) == 1
    said = capsys.readouterr().err
    assert expected in said and ("case_01" in said or "dataset.json" in said)
    assert not list((fresh.parents[1] / "nnUNet_preprocessed").rglob("ptPlans*"))


def test_unwritable_output(raw, small_resenc, tmp_path, monkeypatch, capsys):
    (tmp_path / "in_the_way").write_text("a file where a folder is needed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "in_the_way" / "deeper"))
    assert preprocess.main(["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1"]) == 1
    assert "can't write" in capsys.readouterr().err
