"""Models of networks that nnU-Net doesn't have (Swin UNETR, SegResNet): packaged, installed, pushed, and fine-tuned again."""

import importlib.util
import json
import sys

import pytest
import torch
from support.hub_server import HubServer
from support.model_folders import write_model_folder

from nnssl_adapt.errors import ModelFolderError
from nnssl_adapt.inference.find_model import find_model_folder
from nnssl_adapt.inference.predictor import Predictor
from nnssl_adapt.inference.trainer_class import trainer_for_nnunet, write_trainer_class
from nnssl_adapt.sharing.install import install_model
from nnssl_adapt.sharing.package import make_package
from nnssl_adapt.sharing.push import push_model
from nnssl_adapt.sharing.unpack import unpack_model
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network

SWIN = Architecture("SwinUNETR", {"feature_size": 12, "version": 1, "patch_merging": "old"})
SEG_RES_NET = Architecture(
    "SegResNet",
    {
        **{"init_filters": 4, "blocks_down": [1, 2], "blocks_up": [1], "norm": "batch", "decoder_norm": "instance"},
        **{"upsampling": "deconv", "final_norm": False},
    },
)
PATCHES = {"SwinUNETR": (64, 32, 32), "SegResNet": (8, 12, 16)}


@pytest.fixture(params=[SWIN, SEG_RES_NET], ids=lambda architecture: architecture.class_name)
def trained(request, tmp_path):
    """A model folder as a training leaves it, and its network."""
    architecture = request.param
    patch = PATCHES[architecture.class_name]
    name = "PretrainedTrainer__ptPlans__voco____1.50x1.50x1.50__3d_fullres"
    folder = write_model_folder(tmp_path / "trained", name=name, transpose=(2, 1, 0))
    plans = json.loads((folder / "plans.json").read_text())
    plans["plans_name"] = "ptPlans__voco____1.50x1.50x1.50"
    plans["configurations"]["3d_fullres"] |= {"architecture": architecture.to_plans_dict(patch), "patch_size": patch}
    (folder / "plans.json").write_text(json.dumps(plans))
    torch.manual_seed(0)
    network = build_network(architecture, 1, 3, patch).eval()
    content = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)
    content |= {"network_weights": network.state_dict(), "trainer_name": trainer_for_nnunet(architecture)}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    write_trainer_class(folder, architecture)
    return folder, architecture, network


def same_weights(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_package_is_installed_and_both_programs_build_its_network(trained, tmp_path, nnunet_folders, caplog):
    pytest.importorskip("nnunetv2")
    folder, architecture, network = trained
    package = make_package(
        folder, tmp_path / "out", date="20260915", orientation="LPI", prove=False, licence="CC-BY-4.0"
    )
    trainer = trainer_for_nnunet(architecture)
    (warning,) = [warning for warning in package.warnings if "trainer_class.py" in warning]
    assert ("monai" in warning) == (architecture is SWIN)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nnUNet_extTrainer" in card and ("monai" in card) == (architecture is SWIN)
    installed = install_model(package.zips["sct"])
    assert installed.path == find_model_folder(991) and installed.path.name.startswith("nnUNetTrainer__ptPlans__voco__")
    assert "is a program of the package's author" in caplog.text
    predictor = Predictor(installed, device="cpu")
    assert predictor.model.architecture == architecture
    assert same_weights(dict(network.state_dict()), installed.load_weights(0).network_weights)
    unpacked = unpack_model(package.zips["nnunet"], tmp_path / "unpacked")
    for built in networks_of(unpacked / "trainer_class.py", trainer, architecture):
        built.load_state_dict(network.state_dict())


def networks_of(path, trainer, architecture):
    """The network that ``trainer_class.py`` builds as nnU-Net calls it, and as the Spinal Cord Toolbox does."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    spec = importlib.util.spec_from_file_location("trainer_class_of_package", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    made = module.get_trainer_class()
    assert made.__name__ == trainer and made is getattr(module, trainer)
    manager = PlansManager(str(path.parent / "plans.json"))
    configuration = manager.get_configuration("3d_fullres")
    yield made.build_network_architecture(manager, configuration, 1, 3, False)
    entry = architecture.to_plans_dict(PATCHES[architecture.class_name])
    names = entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"]
    yield made.build_network_architecture(*names, 1, 3, enable_deep_supervision=False)


def test_a_pushed_model_is_taken_as_pre_trained_weights_again(trained, monkeypatch, tmp_path):
    folder, architecture, network = trained
    for variable in ("HF_HUB_OFFLINE", "HF_TOKEN", "nnssl_pretrained_models"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        pushed = push_model("made-up/swin", folder, licence="CC-BY-4.0")
        assert any(name.endswith("/trainer_class.py") for name in pushed.files)
        checkpoint = open_checkpoint("made-up/swin")
    assert checkpoint.architecture == architecture and checkpoint.plan.supervised
    assert checkpoint.plan.transpose_forward == (2, 1, 0) and checkpoint.licence == "CC-BY-4.0"
    assert same_weights(dict(checkpoint.tensors), dict(network.state_dict()))


def test_a_package_whose_weights_are_of_another_size_is_not_made(trained, tmp_path):
    folder, architecture, _ = trained
    plans = json.loads((folder / "plans.json").read_text())
    key = "feature_size" if architecture is SWIN else "init_filters"
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][key] *= 2
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelFolderError):
        make_package(folder, tmp_path / "out", date="20260915", orientation="LPI", prove=False)
