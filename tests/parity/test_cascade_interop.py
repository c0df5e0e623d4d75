"""A cascade from raw data to labels: planned and preprocessed here, trained here and by nnU-Net, predicted by both."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.nnunet_prediction import predict_by_nnunet
from support.peer_preprocessing import assert_same_store
from support.synthetic import make_dataset

pytest.importorskip("nnunetv2")

import nnssl_adapt as na
from nnssl_adapt.data.previous_stage import FOLDER
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError, ModelFolderError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.planning.plan import CASCADE, LOW_RESOLUTION
from nnssl_adapt.training.run.stopping import StopRequest
from nnssl_adapt.training.validation import FoldValidation

TESTS = Path(__file__).parents[1]
CHECKPOINT = TESTS / "data" / "nnssl_checkpoints" / "small_resenc"
SPLITS = [
    {"train": ["case_02", "case_03"], "val": ["case_00", "case_01"]},
    {"train": ["case_00", "case_01"], "val": ["case_02", "case_03"]},
]
RECIPE = {
    "epochs": 1,
    "warmup_epochs": 0,
    "iterations_per_epoch": 10,
    "validation_iterations": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset whose images are large for the weights' patch, with a plan of two stages and its cases."""
    root = tmp_path_factory.mktemp("cascade")
    folders = {f"nnUNet_{part}": root / part for part in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        folder.mkdir()
    raw = make_dataset(root / "raw", cases=4, shape=(40, 42, 48), spacing=(1.0, 1.0, 1.0))
    (raw / "splits_final.json").write_text(json.dumps(SPLITS))
    images = root / "images"
    images.mkdir()
    for case in ("case_00", "case_02"):
        shutil.copy(raw / "imagesTr" / f"{case}_0000.nii.gz", images)
    checkpoint = na.open_checkpoint(CHECKPOINT)
    size = {"patch_size": (16, 16, 16), "recommended_patch_size": (16, 16, 16)}
    checkpoint = replace(checkpoint, plan=checkpoint.plan.model_copy(update=size))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(name, str(folder))
        plan = na.make_plan(991, checkpoint, plans_name="stages", workers=1, configurations=[CASCADE])
        na.preprocess_dataset(plan, workers=1, progress=False, configurations=[LOW_RESOLUTION, CASCADE])
        yield SimpleNamespace(root=root, raw=raw, images=images, dataset=raw.name, plan=plan, checkpoint=checkpoint)


def train(world, configuration, fold, **changes):
    recipe = na.Recipe.load("tiny_cpu").override(**RECIPE, patch_size=None, trainer_name="Tiny", **changes)
    plan = world.plan.seen_through(configuration)
    trainer = na.PretrainedTrainer(plan, fold, recipe, device="cpu", checkpoint=CHECKPOINT, workers=0, progress=False)
    return trainer, trainer.run()


@pytest.fixture(scope="module")
def half_a_first_stage(world):
    """Fold 0 of the low resolution; without it, and without fold 1, there is no cascade."""
    with pytest.raises(ConfigurationError, match="3d_lowres") as missing:
        train(world, CASCADE, 0)
    assert missing.value.path.parts[-2:] == (FOLDER, CASCADE)
    train(world, LOW_RESOLUTION, 0)
    with pytest.raises(ConfigurationError, match="fold 1") as missing:
        train(world, CASCADE, 0)
    assert "case_02, case_03" in str(missing.value) and "case_00" not in str(missing.value)


@pytest.fixture(scope="module")
def first_stage(world, half_a_first_stage):
    """The low resolution, both folds."""
    train(world, LOW_RESOLUTION, 1)


@pytest.fixture(scope="module")
def ours(world, first_stage):
    """The model folder of the cascade, trained here."""
    trainer, model = train(world, CASCADE, 0)
    assert trainer.summary is not None
    return model.path


@pytest.fixture(scope="module")
def peer(world):
    """The model folder of the cascade that nnU-Net trained by the same plan."""
    run([sys.executable, str(TESTS / "support" / "peer_cascade.py"), "991", "stages"])
    return world.root / "results" / world.dataset / f"nnUNetTrainerNoMirroring__stages__{CASCADE}"


def run(words):
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_compile": "f"}
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **calm})
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def agreement(one, other):
    names = sorted(path.name for path in one.glob("*.nii.gz"))
    assert names == sorted(path.name for path in other.glob("*.nii.gz")) and names
    pairs = [[sitk.GetArrayFromImage(sitk.ReadImage(str(f / name))) for f in (one, other)] for name in names]
    assert any(len(np.unique(b)) > 1 for _, b in pairs), "a segmentation of nothing proves nothing"
    return float(np.mean([np.mean(a == b) for a, b in pairs]))


def check_both_stages(model, world, tmp_path):
    first = model.parent / model.name.replace(CASCADE, LOW_RESOLUTION)
    predict_by_nnunet(first, world.images, tmp_path / "first")
    predict_by_nnunet(model, world.images, tmp_path / "theirs", first=tmp_path / "first")
    predictor = na.Predictor(model, folds=0, device="cpu", accumulation_dtype=torch.float16)
    predictor.predict(world.images, tmp_path / "ours")
    assert agreement(tmp_path / "ours" / LOW_RESOLUTION, tmp_path / "first") >= 0.999
    predictor.predict(world.images, tmp_path / "given", previous=tmp_path / "first")
    assert agreement(tmp_path / "given", tmp_path / "theirs") >= 0.9999
    assert agreement(tmp_path / "ours", tmp_path / "theirs") >= 0.998


@pytest.mark.parametrize("configuration", [LOW_RESOLUTION, CASCADE])
def test_our_stores_are_nnunets(world, configuration):
    assert_same_store(world.plan.seen_through(configuration))


def test_nnunet_predicts_with_our_cascade(ours, world, tmp_path):
    check_both_stages(ours, world, tmp_path)


def test_we_predict_with_nnunets_cascade(peer, world, tmp_path):
    check_both_stages(peer, world, tmp_path)


def test_the_first_stage_leaves_what_nnunet_leaves(world, peer, tmp_path):
    """Its network, validated here."""
    first = peer.parent / peer.name.replace(CASCADE, LOW_RESOLUTION)
    theirs = {path.stem: blosc2.open(str(path))[:] for path in (first / FOLDER / CASCADE).glob("*.b2nd")}
    assert sorted(theirs) == ["case_00", "case_01", "case_02", "case_03"]
    fold = tmp_path / first.name / "fold_0"
    model, plan = ModelFolder.open(first), world.plan.seen_through(LOW_RESOLUTION)
    network, weights = model.build_network(), model.load_weights(0)
    model.load_into(network, weights, first)
    validation = FoldValidation(
        plan=plan,
        labels=plan.labels,
        file_ending=".nii.gz",
        store=CaseStore(plan.store_folder),
        cases=SPLITS[0]["val"],
        references=plan.dataset_folder / "gt_segmentations",
        folder=fold,
        fold=0,
        device=torch.device("cpu"),
    )
    validation.run(network, weights.mirror_axes, "theirs", StopRequest())
    found = list((fold.parent / FOLDER / CASCADE).glob("*.b2nd"))
    assert sorted(path.stem for path in found) == SPLITS[0]["val"]
    for path in found:
        labels = blosc2.open(str(path))[:]
        assert labels.dtype == theirs[path.stem].dtype and labels.shape == theirs[path.stem].shape
        assert np.mean(labels == theirs[path.stem]) > 0.998


def test_the_cascade_starts_as_the_full_resolution(ours):
    model = ModelFolder.open(ours)
    report = json.loads((ours / "fold_0" / "transfer_report.json").read_text())
    stem = [row for row in report["target"] if "silent" in (row.get("reason") or "")]
    assert stem and all(row["part"] == "stem" for row in stem)
    assert model.build_network(empty=True).encoder.stem.convs[0].conv.weight.shape[1] == 1 + 2


def test_a_first_stage_that_is_missing_or_of_other_folds_is_named(ours, world, tmp_path):
    alone = tmp_path / ours.name
    shutil.copytree(ours, alone)
    with pytest.raises(ModelFolderError, match=LOW_RESOLUTION) as missing:
        na.Predictor(alone, device="cpu").predict(world.images, tmp_path / "out")
    assert missing.value.path == tmp_path / ours.name.replace(CASCADE, LOW_RESOLUTION)
    record = ours.parent / ours.name.replace(CASCADE, LOW_RESOLUTION) / FOLDER / CASCADE / ".nnssl_adapt/case_03.json"
    before = record.read_text()
    record.write_text(before.replace('"fold": 1', '"fold": 0'))
    with pytest.raises(ConfigurationError, match="case_03 by fold 0"):
        train(world, CASCADE, 1)
    record.write_text(before)
