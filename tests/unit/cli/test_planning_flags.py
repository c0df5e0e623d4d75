"""Flags of planning: what they come to, and what is refused before any work."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk
from support.model_folders import write_model_folder

import nnssl_adapt as na
from nnssl_adapt.cli import finetune, main, plan_dynamic, preprocess, train, transfer_flags
from nnssl_adapt.cli.planning_flags import MODES, PRESETS, WEIGHTS_OWN
from nnssl_adapt.cli.transfer_flags import add_transfer_flags, transfer_settings_from
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.spacing import SPACING_MODES
from nnssl_adapt.planning.topology import NNUNET_PRESETS
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.transfer import settings
from nnssl_adapt.weights.transfer.settings import TransferSettings


def transfer(*words, channels=("T1", "T2", "FLAIR")):
    parser = argparse.ArgumentParser()
    add_transfer_flags(parser)
    return transfer_settings_from(parser.parse_args(words), channels)


def test_choices_on_the_screen_are_the_librarys():
    assert transfer_flags._SCOPES == settings.SCOPES
    assert transfer_flags._TOKEN_ORDERS == settings.TOKEN_ORDER_CHOICES
    assert (*NNUNET_PRESETS, *PRIMUS_TRAINERS) == PRESETS
    assert set(MODES) == {*SPACING_MODES, "default_nnunet", "auto"}


def test_transfer_flags():
    assert transfer() == TransferSettings()
    words = ("--scope", "encoder+decoder", "--channels", "t1=0,T2=0,flair=new", "--token-order", "hwd")
    assert transfer(*words, "--waive", "encoder.stages.5.*", "--waive", "decoder.*") == TransferSettings(
        "encoder+decoder", (0, 0, None), "hwd", ("encoder.stages.5.*", "decoder.*")
    )
    assert transfer("--channels", "Mean", channels=()) == TransferSettings(channels="mean")
    with pytest.raises(ConfigurationError, match="FLAIR"):
        transfer("--channels", "T1=0,T2=1")
    with pytest.raises(ConfigurationError, match=r"--channels T1=0: a map needs a dataset"):
        transfer("--channels", "T1=0", channels=())


@pytest.mark.parametrize("module", [preprocess, finetune])
def test_every_command_that_plans_has_them_all(module, capsys):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    shown = parser.format_help()
    for flag in ("--scope", "--channels", "--token-order", "--waive", "--keep-topology", "--plans_name", "--reorient"):
        assert flag in shown
    words = ["-d", "1", "-pc", "x", "-n", "y"]
    assert parser.parse_args([*words, "--reorient"]).reorient == WEIGHTS_OWN
    assert parser.parse_args([*words, "--reorient", "RPI"]).reorient == "RPI"
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--reorient", "RPI", "--ignore-orientation"])


def test_the_dynamic_command_has_no_spacing_to_choose(capsys):
    with pytest.raises(SystemExit):
        plan_dynamic.main(["-d", "1", "-pc", "x", "-n", "y", "-am", "median"])
    assert "unrecognized arguments: -am median" in capsys.readouterr().err


def test_topology_and_spacing_exclude_each_other(tiny_dataset, small_resenc, capsys):
    tiny_dataset()
    words = ["-d", "991", "-n", "a", "-pc", str(small_resenc), "--keep-topology", "-am", "median"]
    assert preprocess.main(words) == 1
    assert "error: --keep-topology keeps the spacing of the nnU-Net plans" in capsys.readouterr().err


def test_the_dynamic_command(tiny_dataset, small_resenc, capsys):
    folder = tiny_dataset()
    words = ["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1"]
    assert plan_dynamic.main([*words, "-pl", "nnUNetResEncUNetMPlans"]) == 1
    assert "Run this command with --preset ResEncM" in capsys.readouterr().err
    base = na.make_plan(991, na.open_checkpoint(small_resenc), mode="median", workers=1)
    content = {key: value for key, value in base.content.items() if key not in ("nnssl_adapt", "pretrain_info")}
    (base.dataset_folder / "nnUNetPlans.json").write_text(json.dumps({**content, "plans_name": "nnUNetPlans"}))
    assert plan_dynamic.main(words) == 0
    said = capsys.readouterr().out
    assert "nnUNetv2_train_pretrained -d 991 -c 3d_fullres -f 0 -p ptPlans_dynamic__mae" in said
    assert "weights fit: 100.0% of the encoder" in said
    assert (base.dataset_folder / "ptPlans_dynamic__mae.json").is_file()
    assert folder.is_dir()


def test_the_dynamic_command_needs_no_nnunet(tiny_dataset, small_resenc, capsys):
    tiny_dataset(shape=(20, 28, 36))
    weights = str(small_resenc.parent / "small_plainconv")
    words = ["-d", "991", "-n", "mae", "-pc", weights, "-np", "1", "--dry-run", "--fit-gpu", "6GB"]
    assert plan_dynamic.main(words) == 0
    said = capsys.readouterr().out
    assert "planned here by nnU-Net's rules, preset default (as the weights" in said
    assert "the largest patch within the median image" in said and "in 5.6 GiB" in said
    assert "Memory on a GPU, predicted: PlainConvUNet at patch" in said


def test_memory_is_shown_beside_the_spacing_modes(tiny_dataset, small_resenc, capsys):
    tiny_dataset(shape=(20, 28, 36))
    words = ["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1", "--dry-run"]
    assert preprocess.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.lstrip("* ").startswith(("mode", "like_pretrained", "no_resample"))]
    assert table[0].endswith("memory")
    assert all(line.endswith("iB") for line in table[1:])


def test_a_budget_that_can_not_be_read_or_met(tiny_dataset, small_resenc, capsys):
    tiny_dataset()
    words = ["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1", "--fit-gpu"]
    assert preprocess.main([*words, "much"]) == 1
    assert "--fit-gpu much: expected auto or an amount of memory such as 16GB" in capsys.readouterr().err
    assert preprocess.main([*words, "100MB"]) == 1
    said = capsys.readouterr().err
    assert "95.4 MiB of memory are too few" in said and "at batch 2" in said


# -- the contrast-agnostic road --------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """Weights as they are published: a zip with the trainer's folder at its root, for images that lie RPI."""
    name = "nnUNetTrainer__nnUNetPlans_contrast_agnostic__3d_fullres"
    folder = write_model_folder(tmp_path / "model", labels={"image_orientation": "RPI"}, name=name)
    zipped = tmp_path / "model_contrast_agnostic_20250101_nnunet_compatible"
    return Path(shutil.make_archive(str(zipped), "zip", folder.parent, folder.name))


def test_the_contrast_agnostic_road(tiny_dataset, weights, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny_dataset(shape=(20, 28, 24), spacing=(1.0, 1.0, 1.0))
    words = ["-d", "991", "-n", "ca", "-pc", str(weights), "-np", "1"]
    assert preprocess.main(words) == 1
    assert "RAI: 10 (imagesTr/case_00_0000.nii.gz" in capsys.readouterr().err

    words += ["--reorient", "--plans_name", "nnUNetPlans_contrast_agnostic"]
    assert preprocess.main(words) == 0
    said = capsys.readouterr().out
    assert "nnUNetv2_train_pretrained -d 999 -c 3d_fullres -f 0 -p nnUNetPlans_contrast_agnostic" in said
    plan = na.FinetunePlan.find("Dataset999_Tiny_RPI", "nnUNetPlans_contrast_agnostic")
    assert plan.architecture.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert plan.transpose_forward == (1, 0, 2)  # the source's, and its spacing in those axes
    assert plan.spacing == (2.0, 1.0, 1.5)
    assert plan.patch_size == (12, 20, 16)  # images of at most 29 × 22 × 26 mm once they are transposed
    case = RawDataset.open(plan.dataset_name).cases[0]
    assert sitk.ReadImage(str(case.images[0])).GetDirection() == (1, 0, 0, 0, -1, 0, 0, 0, 1)

    tiny = [
        "--recipe",
        "tiny_cpu",
        "--epochs",
        "1",
        "--iters",
        "1",
        "--warmup",
        "0",
        "--set",
        "validation_iterations=1",
    ]
    tiny += ["--patch", *map(str, plan.patch_size)]
    run = ["999", "3d_fullres", "0", "-p", "nnUNetPlans_contrast_agnostic.json", "-pretrained_weights", str(weights)]
    assert train.main([*run, "-device", "cpu", "--workers", "0", *tiny]) == 0
    (model,) = (folder.parents[1] / "nnUNet_results" / plan.dataset_name).iterdir()
    assert "__nnUNetPlans_contrast_agnostic__3d_fullres" in model.name
    assert json.loads((model / "dataset.json").read_text())["image_orientation"] == "RPI"
    report = json.loads((model / "fold_0" / "transfer_report.json").read_text())
    assert report["coverage"] == 1.0
    assert report["origin"]["sha256"] == plan.provenance.source.sha256


def test_weights_and_from_scratch_contradict_each_other(capsys):
    assert train.main(["1", "3d_fullres", "0", "-p", "x", "-pretrained_weights", "y", "--from_scratch"]) == 1
    assert "contradict" in capsys.readouterr().err


def test_reorient_without_a_code_needs_weights_that_say_one(tiny_dataset, small_resenc, capsys):
    tiny_dataset()
    assert preprocess.main(["-d", "991", "-n", "a", "-pc", str(small_resenc), "--reorient"]) == 1
    assert "--reorient: these weights don't say which orientation they want" in capsys.readouterr().err


def test_the_reorient_command(tiny_dataset, capsys):
    tiny_dataset()
    assert main.main(["reorient", "-d", "991", "rpi", "-np", "1"]) == 0
    said = capsys.readouterr().out
    assert "Dataset999_Tiny_RPI" in said and "-d 999" in said
    assert RawDataset.open(999).json.raw["image_orientation"] == "RPI"
    assert main.main(["reorient", "-d", "991", "XYZ"]) == 1
    assert "three letters such as RPI" in capsys.readouterr().err
