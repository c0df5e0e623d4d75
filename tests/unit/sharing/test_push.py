"""Pushing to a real HTTP hub on 127.0.0.1 by the real huggingface_hub, and taking it back as pre-trained weights."""

import json

import pytest
import torch
from support.model_folders import CASES
from support.synthetic import make_dataset

import nnssl_adapt as na
from nnssl_adapt.errors import (
    ConfigurationError,
    ModelFolderError,
    SourceAccessDenied,
    SourceError,
    SourceNotFound,
    SourceUnavailable,
)
from nnssl_adapt.sharing.install import install_model
from nnssl_adapt.sharing.package import make_package
from nnssl_adapt.sharing.push import push_model
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.checkpoint.weight_file import read_weight_file

REPOSITORY = "made-up/model_seg_sc-lesion_t2_unet3d"
TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def encoder_of(weights):
    return {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}


def test_one_commit_has_the_model_its_card_and_safetensors(hub, trained):
    pushed = push_model(REPOSITORY, trained(folds=(0, 1)), licence="CC-BY-4.0", private=True)
    repository = hub.repositories[REPOSITORY]
    assert repository.commit == pushed.commit and REPOSITORY in hub.private
    assert (
        set(repository.files)
        == set(pushed.files)
        >= {
            "README.md",
            f"{TRAINER}/plans.json",
            f"{TRAINER}/dataset.json",
            f"{TRAINER}/fold_0/checkpoint_final.pth",
            f"{TRAINER}/fold_1/checkpoint_final.safetensors",
        }
    )
    assert b"license: cc-by-4.0" in repository.files["README.md"]
    assert sum("/commit/" in path for method, path in hub.requests if method == "POST") == 1
    for content in repository.files.values():
        assert not any(case.encode() in content for case in CASES)


def test_both_formats_hold_the_same_weights(hub, trained, tmp_path):
    push_model(REPOSITORY, trained())
    read = {}
    for ending in ("pth", "safetensors"):
        path = tmp_path / f"weights.{ending}"
        path.write_bytes(hub.repositories[REPOSITORY].files[f"{TRAINER}/fold_0/checkpoint_final.{ending}"])
        read[ending] = read_weight_file(path)["network_weights"]
    assert read["safetensors"].keys() < read["pth"].keys()  # a tensor once, not under each of its names
    assert all(torch.equal(tensor, read["pth"][name]) for name, tensor in read["safetensors"].items())
    assert {t.data_ptr() for t in read["pth"].values()}.__len__() == len(read["safetensors"])


@pytest.mark.parametrize("way", ["hub", "safetensors", "sct", "nnunet"])
def test_a_trained_model_is_pretrained_weights_for_the_next_task(hub, trained, tmp_path, nnunet_folders, way):
    model = trained(transpose=(0, 1, 2), spacing=(2.0, 1.0, 1.3))
    if way in ("hub", "safetensors"):
        push_model(REPOSITORY, model, licence="CC-BY-4.0")
        filename = f"{TRAINER}/fold_0/checkpoint_final.safetensors" if way == "safetensors" else None
        checkpoint = open_checkpoint(REPOSITORY, cache_dir=tmp_path / "cache", filename=filename)
        assert checkpoint.origin.repo_id == REPOSITORY
    else:
        package = make_package(model, tmp_path / "out", licence="CC-BY-4.0", prove=False)
        checkpoint = open_checkpoint(package.zips[way], cache_dir=tmp_path / "cache")
    assert checkpoint.plan.supervised and checkpoint.plan.orientation == "RPI"
    assert checkpoint.plan.head_names == ("background", "cord", "lesion")
    assert checkpoint.licence == "CC-BY-4.0"
    assert checkpoint.citation_names == ("Method: MAE", "Framework: nnU-Net")
    make_dataset(tmp_path / "nnUNet_raw", name="Dataset005_Next", cases=2, channels=2, labels=4)
    plan = na.make_plan(
        dataset=5, checkpoint=checkpoint, mode="median", name="again", workers=1, ignore_orientation=True
    )
    assert plan.provenance.source.sha256 == checkpoint.origin.sha256
    network = na.build_network(plan.architecture, 2, 4, plan.patch_size)
    report = na.transfer_weights(checkpoint, network)
    original = encoder_of(torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"])
    transferred = encoder_of(network.state_dict())
    assert transferred.keys() == original.keys()
    for name, tensor in original.items():
        expected = tensor.repeat(1, 2, 1, 1, 1) / 2 if tensor.ndim == 5 and tensor.shape[1] == 1 else tensor
        assert torch.allclose(transferred[name], expected, atol=1e-7), name
    assert report is not None


def test_a_pushed_model_is_installed_and_a_package_keeps_its_card(hub, trained, tmp_path, nnunet_folders):
    package = make_package(trained(), tmp_path / "out", date="20240915", licence="CC0-1.0", prove=False)
    for source in (package.zips["nnunet"], package.zips["sct"], package.folder):
        push_model(REPOSITORY, source, overwrite=True)
        card = hub.repositories[REPOSITORY].files["README.md"].decode()
        assert "| cord | 0.9100 |" in card and "cc0-1.0" in card
    model = install_model(REPOSITORY, cache_dir=tmp_path / "cache")
    assert model.path == tmp_path / "nnUNet_results" / "Dataset991_Tiny" / TRAINER
    assert json.loads((model.path / "installed.json").read_text())["about"]["source"] == REPOSITORY
    assert not list(model.path.rglob("*.safetensors"))


def test_what_is_there_is_not_replaced_unasked(hub, trained, tmp_path):
    hub.add(REPOSITORY, {"old__model__3d/fold_0/checkpoint_final.pth": b"old", ".gitattributes": b"lfs"})
    before = hub.repositories[REPOSITORY]
    with pytest.raises(SourceError, match="--overwrite"):
        push_model(REPOSITORY, trained())
    assert hub.repositories[REPOSITORY] is before
    push_model(REPOSITORY, trained(tmp_path / "b"), overwrite=True)
    files = hub.repositories[REPOSITORY].files
    assert not any(name.startswith("old__") for name in files) and files[".gitattributes"] == b"lfs"


@pytest.mark.parametrize(
    ("step", "status", "error"),
    [
        ("create", 403, SourceAccessDenied),
        ("preupload", 401, SourceAccessDenied),
        ("batch", 403, SourceAccessDenied),
        ("object", 500, SourceUnavailable),
        ("commit", 400, SourceError),
        ("commit", 500, SourceUnavailable),
    ],
)
def test_a_push_that_fails_anywhere_commits_nothing(hub, trained, step, status, error):
    hub.breaks[step] = status
    model = trained()
    with pytest.raises(error) as caught:
        push_model(REPOSITORY, model)
    assert "\n" not in str(caught.value) and REPOSITORY in str(caught.value)
    assert not (hub.repositories[REPOSITORY].files if REPOSITORY in hub.repositories else {})
    hub.breaks.clear()
    assert push_model(REPOSITORY, model).commit == hub.repositories[REPOSITORY].commit


def test_the_token_is_used(hub, trained, monkeypatch):
    hub.token = "hf_secret"
    model = trained()
    with pytest.raises(SourceAccessDenied, match="hf auth login"):
        push_model(REPOSITORY, model)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert push_model(REPOSITORY, model).commit == hub.repositories[REPOSITORY].commit


def test_nothing_is_asked_of_the_hub_for_what_is_wrong_here(hub, trained, tmp_path, monkeypatch):
    model = trained()
    for repository in ("model", "a/b/c", "a b/c", "../x"):
        with pytest.raises(ConfigurationError, match="OWNER/NAME"):
            push_model(repository, model)
    with pytest.raises(SourceNotFound):
        push_model(REPOSITORY, tmp_path / "nowhere")
    (model / "plans.json").unlink()
    with pytest.raises(ModelFolderError, match=r"no plans\.json"):
        push_model(REPOSITORY, model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        push_model(REPOSITORY, model)
    assert hub.requests == []


def test_a_hub_that_is_not_there(hub, trained, monkeypatch):
    hub.stop()
    with pytest.raises(SourceUnavailable, match="nothing was committed"):
        push_model(REPOSITORY, trained())
