"""nnU-Net's ``2d``: plans, stores and model folders of pictures and of slices, read both ways; the same labels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.nnunet_prediction import predict_by_nnunet
from support.peer_preprocessing import assert_same_store
from support.pictures import write_picture_dataset
from support.synthetic import make_dataset

pytest.importorskip("nnunetv2")

import nnssl_adapt as na
from nnssl_adapt.data.images import read_labels, reader_for

TESTS = Path(__file__).parents[1]
SHORT = {"epochs": 1, "warmup_epochs": 0, "iterations_per_epoch": 12, "validation_iterations": 1}


@pytest.fixture(scope="module", params=["pictures", "slices"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A dataset, and what nnU-Net made of it by its own planning, preprocessing and training of ``2d``."""
    root = tmp_path_factory.mktemp(request.param)
    folders = {f"nnUNet_{part}": str(root / part) for part in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir()
    if request.param == "pictures":
        raw = write_picture_dataset(root / "raw" / "Dataset005_Cells")
    else:
        raw = make_dataset(root / "raw", shape=(7, 40, 34), spacing=(3.6, 1.0, 1.2))
    images = root / "images"
    images.mkdir()
    for path in sorted((raw / "imagesTr").iterdir())[:2]:
        shutil.copy(path, images)
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(name, folder)
        calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        words = [sys.executable, str(TESTS / "support" / "peer_training.py"), str(int(raw.name[7:10])), "2d"]
        result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **calm})
        assert result.returncode == 0, result.stderr[-3000:]
        peer = root / "results" / raw.name / "nnUNetTrainer__nnUNetPlans__2d"
        yield SimpleNamespace(root=root, raw=raw, images=images, dataset=raw.name, peer=peer)


@pytest.fixture(scope="module")
def ours(world: SimpleNamespace) -> Path:
    """Trained by us from nnU-Net's own plan and store."""
    plan = na.FinetunePlan.find(world.dataset, "nnUNetPlans", "2d")
    recipe = na.Recipe.load("from_scratch").override(**SHORT, learning_rate=0.05)
    return na.PretrainedTrainer(plan, fold=0, recipe=recipe, device="cpu", workers=0, progress=False).run().path


def agreement(one: Path, other: Path) -> float:
    ending = json.loads((one / "dataset.json").read_text())["file_ending"]
    names = sorted(path.name for path in one.glob(f"*{ending}"))
    assert names == sorted(path.name for path in other.glob(f"*{ending}")) and names
    equal, present = [], set()
    for name in names:
        (a, here), (b, there) = (read_labels(folder / name, reader_for((folder / name,))) for folder in (one, other))
        assert here == there
        equal.append((a == b).ravel())
        present |= set(np.unique(b))
    assert len(present) > 1, "a segmentation of nothing proves nothing"
    return float(np.concatenate(equal).mean())


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_both_predict_the_same(world: SimpleNamespace, ours: Path, tmp_path: Path, whose: str) -> None:
    model = world.peer if whose == "theirs" else ours
    predict_by_nnunet(model, world.images, tmp_path / "nnunet")
    na.Predictor(model, device="cpu", accumulation_dtype=torch.float16).predict(world.images, tmp_path / "na")
    assert agreement(tmp_path / "na", tmp_path / "nnunet") >= 0.9999


@pytest.fixture(scope="module")
def own_plan(world: SimpleNamespace) -> na.FinetunePlan:
    """Planned here by nnU-Net's rules, without weights, and preprocessed; with few features, for a CPU."""
    plan = na.make_plan(world.dataset, None, name="own", workers=1, configurations=["2d"], preset="default")
    content = plan.content
    arguments = content["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4 + 2 * stage for stage in range(arguments["n_stages"])]
    plan = na.FinetunePlan(content, "2d")
    na.preprocess_dataset(plan, workers=1, progress=False)
    return plan


def test_our_store_of_slices_is_nnunets(own_plan: na.FinetunePlan) -> None:
    assert_same_store(own_plan)


def test_nnunet_predicts_with_our_own_plan(world: SimpleNamespace, own_plan: na.FinetunePlan, tmp_path: Path) -> None:
    """From raw images to its labels: planned, preprocessed and trained here, without any weights."""
    recipe = na.Recipe.load("from_scratch").override(**SHORT, learning_rate=0.05)
    model = na.PretrainedTrainer(own_plan, fold=0, recipe=recipe, device="cpu", workers=0, progress=False).run().path
    predict_by_nnunet(model, world.images, tmp_path / "nnunet")
    na.Predictor(model, device="cpu", accumulation_dtype=torch.float16).predict(world.images, tmp_path / "na")
    assert agreement(tmp_path / "na", tmp_path / "nnunet") >= 0.9999
