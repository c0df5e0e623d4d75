"""Our packages in the Spinal Cord Toolbox's own environment: older nnU-Net, torch and numpy, and the labels are ours.

Runs where ``SCT_PYTHON`` names a Python 3.11 that has them:

    python3.11 -m venv sct && sct/bin/pip install nnunetv2-neuropoly==2.6.2 torch==2.2.2 numpy==1.26.4
    SCT_PYTHON=$PWD/sct/bin/python pytest -n 0 tests/parity/test_package_sct.py
"""

import json
import os
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.model_folders import write_model_folder
from support.synthetic import make_dataset

import nnssl_adapt as na
from nnssl_adapt.sharing.package import make_package
from nnssl_adapt.weights.network.architectures import Architecture, build_network

PYTHON = os.environ.get("SCT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SCT_PYTHON names no Python of the Spinal Cord Toolbox")

SEGMENT = """
import importlib.util, sys
from pathlib import Path
import numpy, torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

assert torch.__version__ < "2.3" and numpy.__version__ < "2", (torch.__version__, numpy.__version__)
unpacked, image, output = sys.argv[1:]
(folder,) = Path(unpacked).glob("nnUNetTrainer*")
folds = sorted(int(path.name[5:]) for path in folder.glob("fold_*"))
for fold in folds:
    torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", map_location="cpu", weights_only=True)
own = {}
if (folder / "trainer_class.py").is_file():
    spec = importlib.util.spec_from_file_location("trainer_class", folder / "trainer_class.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = {"trainer_class": module.get_trainer_class()}
predictor = nnUNetPredictor(
    use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
)
predictor.initialize_from_trained_model_folder(
    str(folder), use_folds=folds, checkpoint_name="checkpoint_final.pth", **own
)
voxels, properties = SimpleITKIO().read_images([image])
numpy.save(output, predictor.predict_single_npy_array(voxels, properties))
"""


@pytest.fixture
def image(nnunet_folders):
    raw = make_dataset(nnunet_folders / "source", cases=1, shape=(24, 30, 34), spacing=(1.6, 1.0, 1.2))
    (nnunet_folders / "images").mkdir()
    return shutil.copy(raw / "imagesTr" / "case_00_0000.nii.gz", nnunet_folders / "images")


def trained(root, **options):
    model = write_model_folder(root, **options)
    plans = json.loads((model / "plans.json").read_text())
    plans["foreground_intensity_properties_per_channel"] = {"0": {}}  # looked up there even where it isn't needed
    (model / "plans.json").write_text(json.dumps(plans))
    return model


def share_of_same_labels(model, image, tmp_path):
    """Of the voxels: by the package in their environment, and by the model it was made of in ours."""
    package = make_package(model, tmp_path / "out", layout="sct", orientation="LPI", prove=False)
    with zipfile.ZipFile(package.zips["sct"]) as archive:
        archive.extractall(tmp_path / "unpacked")
    words = [PYTHON, "-c", SEGMENT, str(tmp_path / "unpacked"), str(image), str(tmp_path / "theirs.npy")]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(words, capture_output=True, text=True, env={**alone, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    predictor = na.Predictor(model, device="cpu", tta=False, accumulation_dtype=torch.float16)
    predictor.predict(tmp_path / "images", tmp_path / "ours")
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "ours" / "case_00.nii.gz")))
    theirs = np.load(tmp_path / "theirs.npy")
    assert len(np.unique(theirs)) == 3, "a segmentation of nothing proves nothing"
    assert theirs.shape == ours.shape
    return (theirs == ours).mean()


def test_a_cnn(image, tmp_path):
    assert share_of_same_labels(trained(tmp_path / "trained"), image, tmp_path) >= 0.9999


def test_of_two_folds_the_first_is_counted_twice_there(image, tmp_path):
    """As ``package`` warns; if this fails, they have mended it and the warning can go."""
    assert share_of_same_labels(trained(tmp_path / "trained", folds=(0, 1)), image, tmp_path) < 0.9999


def test_a_primus_with_its_trainer_class(image, tmp_path):
    small = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "patch_embed_size": [8, 8, 8]}
    architecture = Architecture.named("PrimusS", **small)
    model = trained(tmp_path / "trained", transpose=(0, 1, 2))
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"] = architecture.to_plans_dict((16, 24, 32))
    (model / "plans.json").write_text(json.dumps(plans))
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    torch.manual_seed(0)
    checkpoint["network_weights"] = build_network(architecture, 1, 3, (16, 24, 32)).state_dict()
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    assert share_of_same_labels(model, image, tmp_path) >= 0.9999
