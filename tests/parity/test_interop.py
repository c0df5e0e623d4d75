"""Released nnU-Net reads what we write, and we read what it writes: plans, stores, model folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.model_folders import ARCHITECTURE, LABELS, plans_content
from support.nnunet_prediction import predict_by_nnunet
from support.synthetic import make_dataset

pytest.importorskip("nnunetv2")

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnssl_adapt as na
from nnssl_adapt.data.properties import load_properties
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.trainer_class import trainer_for_nnunet, write_trainer_class
from nnssl_adapt.planning.provenance import Provenance
from nnssl_adapt.weights.network.architectures import Architecture, build_network

TESTS = Path(__file__).parents[1]
CHECKPOINT = TESTS / "data" / "nnssl_checkpoints" / "small_resenc"
RECIPE = {
    "epochs": 2,
    "warmup_epochs": 0,
    "iterations_per_epoch": 12,
    "validation_iterations": 1,
    "patch_size": (16, 24, 16),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One raw dataset and nnU-Net's three folders for it."""
    root = tmp_path_factory.mktemp("interop")
    folders = {f"nnUNet_{part}": str(root / part) for part in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir()
    raw = make_dataset(root / "raw", shape=(24, 30, 34), spacing=(1.6, 1.0, 1.2))
    images = root / "images"
    images.mkdir()
    for case in ("case_00", "case_01"):
        shutil.copy(raw / "imagesTr" / f"{case}_0000.nii.gz", images)
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(name, folder)
        yield SimpleNamespace(root=root, raw=raw, images=images, dataset=raw.name)


@pytest.fixture(scope="module")
def peer(world):
    """What nnU-Net made of the dataset with its own planning, preprocessing and training; the model folder's path."""
    run([sys.executable, str(TESTS / "support" / "peer_training.py"), "991"])
    return world.root / "results" / world.dataset / "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def ours(world, peer):
    """The same dataset fine-tuned by us, after nnU-Net: its fingerprint and plans are found and used."""
    plan = na.make_plan(dataset=991, checkpoint=CHECKPOINT, mode="like_pretrained", name="interop", workers=1)
    na.preprocess_dataset(plan, workers=1, progress=False)
    recipe = na.Recipe.load("tiny_cpu").override(**RECIPE)
    trainer = na.PretrainedTrainer(
        plan, fold=0, recipe=recipe, device="cpu", checkpoint=CHECKPOINT, workers=0, progress=False
    )
    return SimpleNamespace(plan=plan, model=trainer.run().path)


def run(words, **environment):
    # nnU-Net takes a thread a core whatever we say; on a busy machine threads that spin while they wait cost minutes.
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **calm, **environment})
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def by_nnunets_command(model, images, output):
    command = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
    flags = ["-i", images, "-o", output, "-m", model, "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    run([sys.executable, "-c", command, *(str(flag) for flag in flags)])


def agreement(one, other):
    """Share of equal voxels over all segmentations of two folders, whose geometries must be equal too."""
    names = sorted(path.name for path in one.glob("*.nii.gz"))
    assert names == sorted(path.name for path in other.glob("*.nii.gz")) and names
    equal, present = [], set()
    for name in names:
        a, b = (sitk.ReadImage(str(folder / name)) for folder in (one, other))
        assert a.GetPixelID() == b.GetPixelID()
        for part in ("Size", "Spacing", "Origin", "Direction"):
            assert getattr(a, f"Get{part}")() == pytest.approx(getattr(b, f"Get{part}")()), part
        a, b = sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b)
        equal.append((a == b).ravel())
        present |= set(np.unique(b))
    assert len(present) > 1, "a segmentation of nothing proves nothing"
    return np.concatenate(equal).mean()


COMPATIBLE, OURS = ("compatible", torch.float16, 0.9999), ("ours", torch.float32, 0.998)
"""A folder for our predictions, the type of our sums, and the least share of equal labels."""


def check_same_labels(model, world, tmp_path, ways=(COMPATIBLE, OURS)):
    """Compare our predictions with those in ``theirs``.

    nnU-Net sums the tiles in float16. With its rounding our labels are its labels; with our sums, in float32, voxels
    where two classes are nearly even come out differently, of which such a short training leaves more than a real one.
    """
    for name, dtype, least in ways:
        predictor = na.Predictor(model, device="cpu", accumulation_dtype=dtype)
        predictor.predict(world.images, tmp_path / name, save_probabilities=True)
        assert agreement(tmp_path / name, tmp_path / "theirs") >= least


def test_nnunets_command_predicts_with_our_model(ours, world, tmp_path):
    by_nnunets_command(ours.model, world.images, tmp_path / "theirs")
    check_same_labels(ours.model, world, tmp_path)


def test_we_predict_with_nnunets_model(peer, world, tmp_path):
    predict_by_nnunet(peer, world.images, tmp_path / "theirs", probabilities=True)
    check_same_labels(peer, world, tmp_path)
    for path in (tmp_path / "theirs").glob("*.npz"):
        theirs, ours = (
            np.load(folder / path.name)["probabilities"] for folder in (path.parent, tmp_path / "compatible")
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
        properties = load_properties(path.with_suffix(".pkl"))
        assert load_properties(tmp_path / "ours" / f"{path.stem}.pkl").keys() >= properties.keys() - {"nibabel_stuff"}


def primus_folder(root, architecture, trainer_name, patch=(16, 24, 32), planned=None):
    """A model folder with a Primus of random weights; ``planned``: the network that its plans speak of instead."""
    folder = root / "Dataset991_Tiny" / f"{trainer_name}__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    content = plans_content(transpose=(0, 1, 2), spacing=(1.6, 1.0, 1.2))
    content["configurations"]["3d_fullres"]["architecture"] = (planned or architecture).to_plans_dict(patch)
    content["foreground_intensity_properties_per_channel"] = {"0": {}}
    (folder / "plans.json").write_text(json.dumps(content))
    description = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": 5, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    torch.manual_seed(0)
    network = build_network(architecture, 1, 3, patch)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer_name,
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "inference_allowed_mirroring_axes": (2,),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def test_nnunet_predicts_with_a_primus_that_none_of_its_trainers_builds(world, tmp_path):
    small = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "patch_embed_size": [8, 8, 8]}
    architecture = Architecture.named("PrimusS", **small)
    name = trainer_for_nnunet(architecture)
    model = primus_folder(tmp_path, architecture, name)
    write_trainer_class(model, architecture)
    predict_by_nnunet(model, world.images, tmp_path / "theirs", trainers=model)
    check_same_labels(model, world, tmp_path)


@pytest.mark.parametrize("preset", ["PrimusS", "PrimusV2S", "PrimusV3S"])
def test_we_predict_with_a_primus_that_nnunets_own_trainer_built(world, tmp_path, preset):
    """Whose plans know nothing of it."""
    architecture = Architecture.named(preset)
    model = primus_folder(tmp_path, architecture, trainer_for_nnunet(architecture), planned=ARCHITECTURE)
    predict_by_nnunet(model, world.images, tmp_path / "theirs")
    check_same_labels(model, world, tmp_path, (COMPATIBLE,))  # a transformer of this size takes seconds for each


def test_a_model_folder_of_nnunet_says_what_it_is(peer):
    model = ModelFolder.open(peer)
    assert model.folds == (0,) and model.configuration == "3d_fullres"
    assert model.load_weights(0).trainer_name == "nnUNetTrainer"
    assert model.load_weights(0).mirror_axes == (0, 1, 2)
    assert model.plan.provenance == Provenance()
    assert (peer / "fold_0" / "checkpoint_final.pth").is_file()


def test_nnunet_reads_our_store(ours, peer):
    folder = str(ours.plan.store_folder)
    assert infer_dataset_class(folder) is nnUNetDatasetBlosc2
    store = nnUNetDatasetBlosc2(folder)
    assert store.identifiers == [f"case_{i:02d}" for i in range(5)] == na.CaseStore(folder).identifiers
    data, seg, previous, properties = store.load_case("case_01")
    case = na.CaseStore(folder).open("case_01")
    assert previous is None
    assert data.dtype == np.float32 and seg.dtype == np.int16
    assert np.array_equal(data[:], case.data[:]) and np.array_equal(seg[:], case.seg[:])
    assert properties["shape_before_cropping"] == case.properties["shape_before_cropping"]
    theirs = nnUNetDatasetBlosc2(str(peer.parents[2] / "preprocessed" / peer.parent.name / "nnUNetPlans_3d_fullres"))
    assert properties.keys() == theirs.load_case("case_01")[3].keys()


def test_we_read_nnunets_store(peer):
    folder = peer.parents[2] / "preprocessed" / peer.parent.name / "nnUNetPlans_3d_fullres"
    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case("case_02")
    store = na.CaseStore(folder)
    assert store.identifiers == [f"case_{i:02d}" for i in range(5)]
    case = store.open("case_02")
    assert np.array_equal(case.data[:], data[:]) and np.array_equal(case.seg[:], seg[:])
    assert case.properties["spacing"] == properties["spacing"]
    assert case.properties["class_locations"].keys() == {1, 2}
    for label, locations in properties["class_locations"].items():
        assert np.array_equal(case.properties["class_locations"][label], locations)


def test_nnunet_trains_on_our_plan_and_store(ours):
    """Its plan manager opens our plan, its trainer finds our store, and one step runs."""
    script = (
        "import os, torch\n"
        "os.environ['nnUNet_n_proc_DA'] = '0'\n"
        "from nnunetv2.run.run_training import get_trainer_from_args\n"
        f"trainer = get_trainer_from_args('991', '3d_fullres', 1, plans_identifier={ours.plan.plans_name!r}, "
        "device=torch.device('cpu'))\n"
        "trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 1, 1\n"
        "trainer.disable_checkpointing = True\n"
        "trainer.configuration_manager.configuration['patch_size'] = [16, 24, 16]\n"
        "trainer.run_training()\n"
    )
    run([sys.executable, "-c", script])


def test_nnunet_rebuilds_our_network_from_our_plan(ours):
    manager = PlansManager(str(ours.plan.plans_file))
    configuration = manager.get_configuration("3d_fullres")
    assert tuple(configuration.patch_size) == ours.plan.patch_size
    assert tuple(configuration.spacing) == ours.plan.spacing
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=False,
    )
    model = ModelFolder.open(ours.model)
    network.load_state_dict(model.load_weights(0).network_weights, strict=True)
    own = model.build_network()
    model.load_into(own, model.load_weights(0), "fold 0")
    assert type(network) is type(own)
    image = torch.randn(1, 1, 16, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network.eval()(image), own.eval()(image))
    assert json.loads((ours.model / "plans.json").read_text())["pretrain_info"]["key_to_encoder"] == "encoder.stages"
