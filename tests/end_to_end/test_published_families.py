"""A stand-in of every family, fine-tuned from the command line for two tiny epochs and predicted with.

nnU-Net preprocesses by our plan what the family needs: a window of intensities arrives as its own CT normalisation.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support import max_pool_files as max_pool
from support import nnunet_v1 as v1
from support.nnssl_networks import PLAIN, RES, nnunet_plans, randomised, raw_cnn
from support.nnunet_prediction import predict_by_nnunet
from support.stu_net_files import DIMS, POOLS, PublishedSTUNet, stu_net_folder
from support.synthetic import make_dataset

import nnssl_adapt as na
from nnssl_adapt.cli import main
from nnssl_adapt.weights.families import nnunet, vocomni_nnunet
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.sources import published

TINY = [
    "--epochs",
    "2",
    "--iters",
    "1",
    "--warmup",
    "0",
    "--patch",
    "16",
    "24",
    "16",
    "--set",
    "validation_iterations=1",
]
HERE = ["-am", "median", "-np", "1", "-device", "cpu", "--workers", "0"]
SMALL = {"features_per_stage": [4, 6, 8]}


def version_1(folder):
    return v1.save(
        folder / "nnUNetTrainerV2__nnUNetPlansv2.1" / "fold_0", v1.random_numbers(v1.GenericUNet(1, 3)), content=ct()
    )


def ct(**more):
    return v1.plans(modalities=("CT",), patch=(16, 24, 16), spacing=(2.0, 1.0, 1.3), **more)


def stu_net(folder):
    pools = [*POOLS, [1, 1, 1], [1, 1, 1]]
    network = PublishedSTUNet(1, 105, [1] * 6, [*DIMS, 8, 8], pools, [[3, 3, 3]] * 6)
    content = ct()
    content["plans_per_stage"][0]["pool_op_kernel_sizes"] = pools
    return v1.save(
        folder, v1.random_numbers(network), "STUNetTrainer_base", content=content, filename="base_ep4k.model"
    )


def vocomni(folder):
    network = randomised(raw_cnn(PLAIN, 1, 21, **SMALL), 1)
    torch.save(
        {"state_dict": {f"module.{k}": t for k, t in network.state_dict().items()}}, folder / "VoComni_nnunet.pt"
    )
    return folder / "VoComni_nnunet.pt"


def triad(folder):
    network = randomised(raw_cnn(PLAIN, 1, 1, **SMALL), 2)
    torch.save({f"encoder.{k}": t for k, t in network.encoder.state_dict().items()}, folder / "triad_plain_mae.pth")
    return folder / "triad_plain_mae.pth"


def nnunet_folder(folder, channels, dataset_name, trainer):
    network = randomised(raw_cnn(RES, channels, 2, **SMALL), 3)
    plans = {**nnunet_plans(RES, 1), "dataset_name": dataset_name}
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(SMALL)
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "core": 1}}
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    content = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": "3d_fullres"},
    }
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def nninteractive(folder):
    return nnunet_folder(folder / "nnInteractive_v1.0", 8, "Dataset225_nnInteractiveV2", "nnUNetTrainer")


def totalsegmentator(folder):
    name = "Dataset291_TotalSegmentator_part1_organs_1559subj"
    trainer = "nnUNetTrainerNoMirroring"
    nnunet_folder(folder / name / f"{trainer}__nnUNetPlans__3d_fullres", 1, name, trainer)
    shutil.make_archive(str(folder / name), "zip", folder, name)
    return folder / f"{name}.zip"


def genesis(folder):
    torch.save(max_pool.genesis(max_pool.randomised(max_pool.PublishedUNet3D())), folder / "Genesis_Chest_CT.pt")
    return folder / "Genesis_Chest_CT.pt"


def fomo25(folder):
    torch.save(max_pool.fomo25(max_pool.randomised(max_pool.PublishedBaseline())), folder / "unet_b.ckpt")
    return folder / "unet_b.ckpt"


def stu_net_version_2(folder):
    return stu_net_folder(folder, [4, 6, 8, 8, 8, 8])[0]


def primus_version_2(folder):
    """Of a trainer whose plans speak of a U-Net."""
    trainer = "nnUNet_PrimusV2S_Trainer"
    model = nnunet_folder(folder / f"{trainer}__nnUNetPlans__3d_fullres", 1, "Dataset001_Any", trainer)
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [16, 24, 16]
    (model / "plans.json").write_text(json.dumps(plans))
    path = model / "fold_0" / "checkpoint_final.pth"
    network = build_network(tiny_preset("PrimusV2S"), 1, 2, (16, 24, 16))
    torch.save({**torch.load(path), "network_weights": network.state_dict()}, path)
    return model


def tiny_preset(preset):
    small = {"features_per_stage": [4, 6, 8, 8, 8, 8], "n_blocks_per_stage": [1] * 6}
    primus = {"embed_dim": 24, "eva_depth": 2, "eva_numheads": 2}
    return Architecture.named(preset, **(primus if preset.startswith("Primus") else small))


STAND_INS = {
    make.__name__: make
    for make in (
        *(version_1, stu_net, vocomni, triad, nninteractive, totalsegmentator),
        *(genesis, fomo25, stu_net_version_2, primus_version_2),
    )
}
MORE_FLAGS = {
    "vocomni": ["--reorient", "LPI"],
    "fomo25": ["--reorient", "LPI", "--patch", "16", "32", "16"],
    "genesis": ["--scope", "encoder+decoder"],
    "primus_version_2": ["--llrd", "0.8", "--freeze", "stages:1"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    raw = make_dataset(root / "nnUNet_raw", cases=5, shape=(18, 26, 20), labels=2)
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "CT"}}))
    return root


@pytest.fixture
def folders(world, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(world / name))
    monkeypatch.setattr(vocomni_nnunet, "FEATURES", SMALL["features_per_stage"])
    monkeypatch.setattr(nnunet, "architecture_of_preset", tiny_preset)
    return world


@pytest.fixture
def tuned(folders, tmp_path):
    """``tuned(name)``: the model folder that two tiny epochs leave, of which each is trained once."""

    def make(name):
        pattern = f"Dataset*/PretrainedTrainer*__ptPlans__{name}____*"
        if not list(Path(os.environ["nnUNet_results"]).glob(pattern)):
            words = ["finetune", "-d", "991", "-pc", str(STAND_INS[name](tmp_path)), "-n", name, *TINY, *HERE]
            assert main.main([*words, *MORE_FLAGS.get(name, [])]) == 0
        (model,) = Path(os.environ["nnUNet_results"]).glob(pattern)
        return model

    return make


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_is_fine_tuned_and_predicts(tuned, folders, tmp_path, name):
    model = tuned(name)
    report = json.loads((model / "fold_0" / "transfer_report.json").read_text())
    assert report["coverage"] == 1
    images = tmp_path / "images"
    images.mkdir()
    raw = next((folders / "nnUNet_raw").glob(f"{model.parent.name}/imagesTr"))
    shutil.copy(raw / "case_00_0000.nii.gz", images)
    assert (
        main.main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"]) == 0
    )
    found = sitk.ReadImage(str(tmp_path / "out" / "case_00.nii.gz"))
    assert found.GetSize() == sitk.ReadImage(str(images / "case_00_0000.nii.gz")).GetSize()


def test_nnunet_preprocesses_by_the_window_of_the_family(tuned, folders):
    preprocessor = pytest.importorskip("nnunetv2.preprocessing.preprocessors.default_preprocessor")
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.preprocess import preprocess_case
    from nnssl_adapt.planning.plan import FinetunePlan

    model = tuned("vocomni")
    plan = FinetunePlan.load(model / "plans.json")
    raw = RawDataset.open(plan.dataset_name)
    case = raw.cases[1]
    manager = PlansManager(str(model / "plans.json"))
    theirs = preprocessor.DefaultPreprocessor(verbose=False).run_case(
        [str(path) for path in case.images],
        str(case.label),
        manager,
        manager.get_configuration("3d_fullres"),
        raw.json.raw,
    )[0]
    ours = preprocess_case(case, plan.settings, raw.labels).data
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert plan.settings.normalization_schemes == ("CTNormalization",) and ours.min() >= 0 and ours.max() <= 1


@pytest.mark.parametrize(("name", "class_name"), [("stu_net", "STUNet"), ("genesis", "MaxPoolUNet")])
def test_nnunet_predicts_the_same_by_the_class_beside_the_model(tuned, folders, tmp_path, name, class_name):
    pytest.importorskip("nnunetv2")
    model = tuned(name)
    images = folders / "nnUNet_raw" / "Dataset991_Tiny" / "imagesTr"
    # nnU-Net sums the tiles in float16.
    ours = na.Predictor(model, device="cpu", accumulation_dtype=torch.float16)
    (tmp_path / "images").mkdir()
    for case in ("case_00", "case_01"):
        shutil.copy(images / f"{case}_0000.nii.gz", tmp_path / "images")
    ours.predict(tmp_path / "images", tmp_path / "ours")
    network = predict_by_nnunet(model, tmp_path / "images", tmp_path / "theirs", trainers=model)
    assert type(network).__name__ == class_name
    for case in ("case_00", "case_01"):
        files = (tmp_path / folder / f"{case}.nii.gz" for folder in ("ours", "theirs"))
        one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in files)
        assert len(np.unique(other)) > 1 and np.mean(one == other) > 0.9999


def test_the_catalogue_has_an_entry_for_each():
    known = {model.id for model in published.published_models()}
    assert {"genesis-chest-ct", "fomo25-unet-b", "suprem-unet"} <= known
    assert {"stunet-base", "vocomni-nnunet", "triad-plain-mae", "nninteractive-v1", "totalsegmentator-291"} <= known
