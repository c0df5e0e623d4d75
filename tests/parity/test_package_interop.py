"""Released nnU-Net installs our packages with its own command and predicts with them: the labels are ours."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.model_folders import ARCHITECTURE, write_cascade, write_model_folder
from support.nnunet_prediction import predict_by_nnunet
from support.synthetic import make_dataset

pytest.importorskip("nnunetv2")

import nnssl_adapt as na
from nnssl_adapt.inference.trainer_class import PRIMUS_FROM_PLANS
from nnssl_adapt.sharing.package import make_package
from nnssl_adapt.weights.network.architectures import Architecture, build_network

INSTALL = "from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point as main; main()"


def run(command, *flags, **environment):
    calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    words = [sys.executable, "-c", command, *map(str, flags)]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **calm, **environment})
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


@pytest.fixture
def images(nnunet_folders):
    raw = make_dataset(nnunet_folders / "source", cases=1, shape=(24, 30, 34), spacing=(1.6, 1.0, 1.2))
    folder = nnunet_folders / "images"
    folder.mkdir()
    shutil.copy(raw / "imagesTr" / "case_00_0000.nii.gz", folder)
    return folder


def trained(root, **options):
    """A model folder that nnU-Net can use: its preprocessing looks intensity properties up even where it needs none."""
    model = write_model_folder(root, **options)
    plans = json.loads((model / "plans.json").read_text())
    plans["foreground_intensity_properties_per_channel"] = {"0": {}}
    (model / "plans.json").write_text(json.dumps(plans))
    return model


def labels_in(folder):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_00.nii.gz")))


def check_same_labels(original, package, images, tmp_path, folds=(0,), trainers=None):
    """nnU-Net's labels by the package against ours by the model that it was made of, both with its rounding."""
    predict_by_nnunet(package, images, tmp_path / "theirs", folds, trainers=trainers)
    na.Predictor(original, device="cpu", accumulation_dtype=torch.float16).predict(images, tmp_path / "ours")
    theirs, ours = labels_in(tmp_path / "theirs"), labels_in(tmp_path / "ours")
    assert len(np.unique(theirs)) == 3, "a segmentation of nothing proves nothing"
    assert (theirs == ours).mean() >= 0.9999


def test_nnunets_installer_takes_the_package_and_its_prediction_gives_our_labels(images, tmp_path):
    model = trained(tmp_path / "trained", folds=(0, 1), name="PretrainedTrainer__ptPlans__mae____Norm__Z__3d_fullres")
    package = make_package(model, tmp_path / "out", layout="nnunet", orientation="LPI", prove=False)
    run(INSTALL, package.zips["nnunet"])
    (installed,) = (tmp_path / "nnUNet_results").glob("Dataset991_Tiny/*")
    assert [path.name for path in (tmp_path / "nnUNet_results").iterdir()] == ["Dataset991_Tiny"]
    check_same_labels(model, installed, images, tmp_path, folds=(0, 1))


def test_nnunets_installer_takes_both_stages_of_a_cascade(tmp_path, nnunet_folders):
    package = make_package(write_cascade(tmp_path / "trained"), tmp_path / "out", licence="MIT")
    assert package.proof.with_model == 1 and package.proof.with_nnunet >= 0.9999  # its second network, given our labels
    assert set(package.proof.labels) == {0, 1, 2}
    run(INSTALL, package.zips["nnunet"])
    installed = sorted(
        path.name.rpartition("__")[2] for path in (tmp_path / "nnUNet_results").glob("Dataset991_Tiny/*")
    )
    assert installed == ["3d_cascade_fullres", "3d_lowres"]


def test_the_proof_asks_nnunet_too(tmp_path, nnunet_folders):
    model = trained(tmp_path / "trained", mirror_axes=(0, 2))
    package = make_package(model, tmp_path / "out", layout="sct", orientation="RPI")
    assert package.proof.with_model == 1 and package.proof.with_nnunet >= 0.9999
    assert set(package.proof.labels) == {0, 1, 2}


def test_a_primus_that_no_stock_trainer_builds_brings_its_class(images, tmp_path):
    small = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "patch_embed_size": [8, 8, 8]}
    architecture = Architecture.named("PrimusS", **small)
    model = trained(tmp_path / "trained", transpose=(0, 1, 2))
    _exchange_network(model, architecture)
    package = make_package(model, tmp_path / "out", orientation="RPI", prove=False)
    assert any("trainer_class.py" in warning for warning in package.warnings)
    with zipfile.ZipFile(package.zips["sct"]) as archive:
        archive.extractall(tmp_path / "unpacked")
    (folder,) = (path for path in (tmp_path / "unpacked").iterdir() if path.is_dir())
    assert folder.name.startswith("nnUNetTrainer__") and (folder / "trainer_class.py").is_file()
    check_same_labels(model, folder, images, tmp_path, trainers=folder)
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import trainer_class\n"
        "made = trainer_class.get_trainer_class()\n"
        "plan = json.load(open(sys.argv[1] + '/plans.json'))['configurations']['3d_fullres']['architecture']\n"
        "one = made.build_network_architecture(plan['network_class_name'], plan['arch_kwargs'], "
        "plan['_kw_requires_import'], 1, 3, enable_deep_supervision=False)\n"
        f"assert made.__name__ == {PRIMUS_FROM_PLANS!r} and type(one).__name__ == 'Primus'\n"
    )
    run(script, folder)  # the way of nnU-Net 2.6, which the Spinal Cord Toolbox has


def _exchange_network(model, architecture):
    """Put a Primus in the place of the folder's CNN."""
    path = model / "plans.json"
    content = path.read_text()
    plans = json.loads(content)
    assert plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"].endswith(ARCHITECTURE.class_name)
    plans["configurations"]["3d_fullres"]["architecture"] = architecture.to_plans_dict((16, 24, 32))
    path.write_text(json.dumps(plans))
    torch.manual_seed(0)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    checkpoint["network_weights"] = build_network(architecture, 1, 3, (16, 24, 32)).state_dict()
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
