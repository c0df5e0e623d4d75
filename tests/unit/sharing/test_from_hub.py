"""Prediction straight from a hub on 127.0.0.1, by the real huggingface_hub: on the network, and without it."""

import numpy as np
import pytest
from huggingface_hub import ModelCard
from support.synthetic import write_image

import nnssl_adapt as na
from nnssl_adapt.cli import main
from nnssl_adapt.errors import ModelFolderError, SourceNotFound, SourceUnavailable
from nnssl_adapt.inference.published import find_published
from nnssl_adapt.sharing.push import push_model

REPOSITORY = "made-up/cord"
TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"
OPTIONS = {"device": "cpu", "tta": False}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The hub's cache in a folder of this test."""
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "nnssl_adapt.weights.sources.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "images" / "sub-1_0000.nii.gz"
    path.parent.mkdir()
    write_image(path, np.random.default_rng(0).normal(size=(12, 20, 26)).astype(np.float32), (2.0, 1.0, 1.5))
    return path


def test_one_line_and_the_second_time_without_network(hub, trained, cache, image, tmp_path, monkeypatch):
    model = trained(folds=(0, 1))
    expected = na.Predictor(model, **OPTIONS).predict(image)
    pushed = push_model(REPOSITORY, model)
    for ways in (
        lambda: na.Predictor(REPOSITORY, **OPTIONS),
        lambda: na.Predictor.from_pretrained(REPOSITORY, revision=pushed.commit, **OPTIONS),
        lambda: na.Predictor(f"hf://{REPOSITORY}@main", **OPTIONS),
    ):
        assert np.array_equal(ways().predict(image), expected)
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert any(path.endswith("/config.json") for path in fetched)  # by which the hub counts
    assert not any(path.endswith(".safetensors") for path in fetched)
    asked = len(hub.requests)
    predictor = na.Predictor.from_pretrained(REPOSITORY, local_files_only=True, **OPTIONS)
    assert predictor.folds == (0, 1) and len(hub.requests) == asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["predict", "-i", str(image), "-o", str(tmp_path / "out"), "-m", REPOSITORY, "-device", "cpu", "--no-tta"]
    assert main.main(words) == 0
    assert len(hub.requests) == asked
    assert na.Predictor(f"{REPOSITORY}@{pushed.commit}", **OPTIONS).folds == (0, 1)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.stop()  # nobody said that there is no network
    assert np.array_equal(na.Predictor(REPOSITORY, **OPTIONS).predict(image), expected)


def test_only_the_folds_that_are_asked_for_are_fetched(hub, trained, cache):
    push_model(REPOSITORY, trained(folds=(0, 1, 2)))
    assert na.Predictor(REPOSITORY, folds=1, **OPTIONS).folds == (1,)
    weights = [path for method, path in hub.requests if method == "GET" and path.endswith(".pth")]
    assert len(weights) == 1 and "fold_1" in weights[0]
    with pytest.raises(SourceUnavailable, match="fold_0/checkpoint_final.pth"):  # a part is not taken for the whole
        na.Predictor.from_pretrained(REPOSITORY, local_files_only=True, **OPTIONS)
    assert na.Predictor.from_pretrained(REPOSITORY, folds=1, local_files_only=True, **OPTIONS).folds == (1,)
    with pytest.raises(ModelFolderError, match="fold_7"):
        na.Predictor(REPOSITORY, folds=7, **OPTIONS)


def test_a_release_zip_in_a_repository(hub, trained, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    package = na.make_package(trained(), tmp_path / "out", licence="CC0-1.0", prove=False)
    hub.add(REPOSITORY, {"model.zip": package.zips["sct"].read_bytes(), "README.md": b"a model"})
    assert na.Predictor(REPOSITORY, **OPTIONS).folds == (0,)
    asked = len(hub.requests)
    assert na.Predictor.from_pretrained(REPOSITORY, local_files_only=True, **OPTIONS).folds == (0,)
    assert len(hub.requests) == asked


def test_a_pre_training_is_no_model(hub, cache, capsys, tmp_path):
    hub.add("made-up/mae", {"checkpoint_final.pth": b"weights", "adaptation_plan.json": b"{}"})
    with pytest.raises(ModelFolderError, match="pre-training") as caught:
        na.Predictor("made-up/mae", **OPTIONS)
    assert caught.value.next_command == "nnssl-adapt finetune -d DATASET -pc made-up/mae"
    assert (
        main.main(["predict", "-i", str(tmp_path), "-o", str(tmp_path / "o"), "-m", "made-up/mae", "-device", "cpu"])
        == 1
    )
    assert "finetune -d DATASET -pc made-up/mae" in capsys.readouterr().err


def test_what_is_not_there(hub, cache, tmp_path, monkeypatch):
    with pytest.raises(SourceNotFound, match=r"no repository made-up/none.*there is no folder"):
        na.Predictor("made-up/none", **OPTIONS)
    hub.add("made-up/text", {"README.md": b"nothing"})
    with pytest.raises(SourceNotFound, match="no trained model"):
        na.Predictor("made-up/text", **OPTIONS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        na.Predictor(REPOSITORY, **OPTIONS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made-up" / "cord").mkdir(parents=True)
    assert str(find_published(REPOSITORY)) == REPOSITORY  # a folder wins


def test_the_hub_finds_and_counts_what_is_pushed(hub, trained):
    push_model(REPOSITORY, trained(folds=(0, 1)), licence="CC-BY-4.0")
    files = hub.repositories[REPOSITORY].files
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "nnssl-adapt" and card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "image-segmentation"
    assert {"nnssl-adapt", "nnunet", "medical"} < set(card.data.tags) and card.data.metrics == ["dice"]
    results = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results["Dice of cord"] == ("dice", 0.91) and results["mean Dice"] == ("dice", 0.665)
    assert b'"library_name": "nnssl-adapt"' in files["config.json"]
