"""Release packages: what is in them, what is not, and that they segment as the model they were made of."""

import hashlib
import json
import zipfile
from types import SimpleNamespace

import pytest
import torch
from support.model_folders import CASES, HOME, write_model_folder
from support.synthetic import make_dataset

from nnssl_adapt.errors import ConfigurationError, ModelFolderError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.sharing import package as package_module
from nnssl_adapt.sharing import proof as proof_module
from nnssl_adapt.sharing.checks import sct_warnings
from nnssl_adapt.sharing.contents import save_slim
from nnssl_adapt.sharing.package import make_package
from nnssl_adapt.sharing.unpack import unpack_model

TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture
def made(trained, tmp_path):
    """A package without its proof, and the model it was made of."""
    model = trained(name="PretrainedTrainer_short__nnUNetPlans__3d_fullres", mirror_axes=(0, 2))
    package = make_package(
        model, tmp_path / "out", date="20240915", name="model_seg_sc-lesion_t2_unet3d", licence="CC-BY-4.0", prove=False
    )
    return SimpleNamespace(model=model, package=package, out=tmp_path / "out")


def names_in(path):
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def text_in(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode()


CONTENT = {
    "dataset.json",
    "plans.json",
    "dataset_fingerprint.json",
    "fold_0/checkpoint_final.pth",
    "fold_0/debug.json",
    "fold_0/progress.png",
    "fold_0/training_log_2026_1_2.txt",
}


def test_the_two_layouts(made):
    zips = made.package.zips
    assert zips["sct"].name == "model_seg_sc-lesion_t2_unet3d-r20240915.zip"
    assert names_in(zips["sct"]) == {f"{TRAINER}/{name}" for name in CONTENT} | {"README.md"}
    root = f"Dataset991_Tiny/{TRAINER}"
    assert names_in(zips["nnunet"]) == {f"{root}/{name}" for name in CONTENT | {"README.md"}}
    assert {path.name for path in made.out.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "package.json",
        *(path.name for path in zips.values()),
    }


def test_checksums_are_those_of_the_files(made):
    for line in (made.out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((made.out / name).read_bytes()).hexdigest() == digest
    assert len((made.out / "SHA256SUMS").read_text().splitlines()) == 3


def test_the_checkpoint_is_slim_plain_and_the_same_network(made, tmp_path):
    folder = unpack_model(made.package.zips["sct"], tmp_path / "unpacked")
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    needed = {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}
    assert content.keys() == needed | {"citations"}
    assert [citation["name"] for citation in content["citations"]] == ["MAE", "nnU-Net"]
    assert content["trainer_name"] == "nnUNetTrainer" and content["inference_allowed_mirroring_axes"] == (0, 2)
    assert content["init_args"] == {"configuration": "3d_fullres", "fold": 0}
    original = torch.load(made.model / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert content["network_weights"].keys() == original.keys()
    assert all(torch.equal(content["network_weights"][name], tensor) for name, tensor in original.items())
    assert path.stat().st_size < (made.model / "fold_0" / "checkpoint_final.pth").stat().st_size - 70_000


def test_nothing_of_the_machine_or_the_subjects_gets_out(made):
    for path in made.package.zips.values():
        for name in names_in(path):
            with zipfile.ZipFile(path) as archive:
                content = archive.read(name)
            for secret in (*CASES, "sub-", "jane", "/home", "mri-3", str(made.model.parent)):
                assert secret.encode() not in content, (name, secret)
    log = text_in(path, f"Dataset991_Tiny/{TRAINER}/fold_0/training_log_2026_1_2.txt")
    assert log == "results in x\npredicting case\n1.5 mm/voxel, lr 0.01\n"
    debug = json.loads(text_in(path, f"Dataset991_Tiny/{TRAINER}/fold_0/debug.json"))
    assert debug == {"plans_file": "plans.json", "number_of_training_cases": 1, "fold": 0}
    plans = json.loads(text_in(path, f"Dataset991_Tiny/{TRAINER}/plans.json"))
    assert plans["pretrain_info"]["checkpoint_path"] == "mae"
    assert plans["nnssl_adapt"]["trained_by"] == "PretrainedTrainer_short"


def test_the_card_says_what_it_must(made):
    card = (made.out / "README.md").read_text()
    for part in (
        "license: cc-by-4.0",
        "base_model: AnonRes/ResEncL-OpenMind-MAE",
        "# model_seg_sc-lesion_t2_unet3d (r20240915)",
        "| cord | 0.9100 |",
        "| lesion | 0.4200 |",
        "He, K. (2022). Masked autoencoders.",
        "Isensee",
        "RPI",
        "5 training cases",
        "CC0",
        "revision 0123abc",
        f"checkpoint_final.pth, SHA-256 `{'ab' * 32}`",
        "licence of those weights: CC-BY-4.0",
    ):
        assert part in card, part
    assert HOME not in card


def test_the_same_date_gives_the_same_bytes_wherever_the_model_lies(made, trained, tmp_path):
    elsewhere = trained(tmp_path / "another place", name=made.model.name, mirror_axes=(0, 2))
    again = make_package(
        elsewhere, tmp_path / "again", date="20240915", name=made.package.name, licence="CC-BY-4.0", prove=False
    )
    for layout, path in made.package.zips.items():
        assert path.read_bytes() == again.zips[layout].read_bytes()
    other = make_package(elsewhere, tmp_path / "other", date="20240916", name=made.package.name, prove=False)
    assert other.zips["sct"].read_bytes() != made.package.zips["sct"].read_bytes()


def test_the_model_folder_is_not_changed(trained, tmp_path):
    model = trained()
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    make_package(model, tmp_path / "out", prove=False)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_a_package_proves_itself(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        proof_module.importlib.util, "find_spec", lambda name: None
    )  # without nnU-Net; see test_package_interop
    package = make_package(trained(folds=(0, 1)), tmp_path / "out")
    assert package.proof.with_model == 1 and package.proof.with_nnunet is None
    assert set(package.proof.labels) == {0, 1, 2} and package.proof.image == "a made-up image"


def test_both_zips_must_hold_the_same_model(trained, tmp_path, monkeypatch):
    def other(prepared, layout, tag, folder, work):
        if layout == "nnunet":
            (prepared.contents.folder / "plans.json").write_text(
                (prepared.contents.folder / "plans.json").read_text() + " "
            )
        return write_layout(prepared, layout, tag, folder, work)

    write_layout = package_module._write_layout
    monkeypatch.setattr(package_module, "_write_layout", other)
    with pytest.raises(ModelFolderError, match="hold different files: plans.json"):
        make_package(trained(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_that_segments_otherwise_is_not_made(trained, tmp_path, monkeypatch):
    def damaged(model, fold, path, trainer):
        save_slim(model, fold, path, trainer)
        content = torch.load(path, weights_only=True)
        head = content["network_weights"]["decoder.seg_layers.1.bias"]
        head += torch.tensor([0.0, 3.0, -3.0])
        torch.save(content, path)

    monkeypatch.setattr("nnssl_adapt.sharing.contents.save_slim", damaged)
    with pytest.raises(ModelFolderError, match="does not segment"):
        make_package(trained(), tmp_path / "out", layout="nnunet")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".unfinished*"))


def test_only_finished_folds_or_those_asked_for_go_in(trained, tmp_path):
    model = trained(folds=(0, 2, "all"))
    (model / "fold_2" / "checkpoint_final.pth").rename(model / "fold_2" / "checkpoint_best.pth")
    package = make_package(model, tmp_path / "out", layout="sct", prove=False)
    held = {name.split("/")[1] for name in names_in(package.zips["sct"]) if "fold_" in name}
    assert held == {"fold_0"}
    assert sum("left out: fold_" in warning for warning in package.warnings) == 2
    package = make_package(model, tmp_path / "all", layout="sct", folds=["all"], prove=False)
    assert any("fold_all/" in name for name in names_in(package.zips["sct"]))
    for wish, reason in (
        (["2"], "no fold_2/checkpoint_final.pth"),
        (["all", 0], "stands alone"),
        (["x"], "a number or all"),
    ):
        with pytest.raises((ModelFolderError, ConfigurationError), match=reason):
            make_package(model, tmp_path / "no", folds=wish, prove=False)


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_existing_output_is_kept(trained, tmp_path):
    model, out = trained(), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="no package"):
        make_package(model, out, prove=False, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    first = make_package(model, tmp_path / "new", prove=False, date="20240915")
    with pytest.raises(ConfigurationError, match="--overwrite"):
        make_package(model, tmp_path / "new", prove=False)
    make_package(model, tmp_path / "new", prove=False, date="20240916", overwrite=True)
    assert not first.zips["sct"].exists() and len(list((tmp_path / "new").glob("*.zip"))) == 2
    with pytest.raises(ConfigurationError, match="model's own folder"):
        make_package(model, model / "release", prove=False)


def test_checkpoint_of_another_dataset(trained, tmp_path):
    model, other = trained(), write_model_folder(tmp_path / "other", heads=2)
    (model / "fold_0" / "checkpoint_final.pth").write_bytes((other / "fold_0" / "checkpoint_final.pth").read_bytes())
    with pytest.raises(ModelFolderError, match="not of the network in plans.json"):
        make_package(model, tmp_path / "out", prove=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"plans": {"dataset_name": "Dataset007_Other"}}, "trained on Dataset007_Other"),
        ({"dataset_json": {"labels": {"background": 0, "liver": 1, "spleen": 2}}}, "trained with the labels"),
    ],
)
def test_nnunets_checkpoints_say_which_dataset_they_are_of(trained, tmp_path, arguments, reason):
    model = trained()
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    content["init_args"] |= arguments
    torch.save(content, path)
    with pytest.raises(ModelFolderError, match=reason):
        make_package(model, tmp_path / "out", prove=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: (model / "plans.json").unlink(), "no plans.json"),
        (lambda model: (model / "fold_0" / "checkpoint_final.pth").unlink(), "not to be published|no fold|truncated"),
    ],
)
def test_incomplete_models(trained, tmp_path, change, reason):
    model = trained()
    change(model)
    with pytest.raises(Exception, match=reason):
        make_package(model, tmp_path / "out", prove=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "model seg"}, "letters, digits"),
        ({"name": "../../model"}, "letters, digits"),
        ({"layout": "zip"}, "sct, nnunet or both"),
        ({"date": "yesterday"}, "20240915"),
        ({"orientation": "XYZ"}, "three letters"),
        ({"orientation": "LPI"}, "dataset.json .* says RPI"),
    ],
)
def test_wrong_options(trained, tmp_path, options, reason):
    with pytest.raises(ConfigurationError, match=reason):
        make_package(trained(), tmp_path / "out", prove=False, **options)
    assert not (tmp_path / "out").exists()


def test_the_toolbox_needs_an_orientation(trained, tmp_path, nnunet_folders):
    model = trained()
    content = json.loads((model / "dataset.json").read_text())
    del content["image_orientation"]
    (model / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="--orientation, for instance RPI"):
        make_package(model, tmp_path / "out", prove=False)
    make_package(model, tmp_path / "nnunet", layout="nnunet", prove=False)
    package = make_package(model, tmp_path / "sct", layout="sct", orientation="las", prove=False)
    assert json.loads(text_in(package.zips["sct"], f"{TRAINER}/dataset.json"))["image_orientation"] == "LAS"


def test_training_cases_that_only_the_raw_dataset_knows_are_taken_out(trained, tmp_path, nnunet_folders):
    """nnU-Net's debug.json does not list them."""
    raw = make_dataset(nnunet_folders / "nnUNet_raw", "Dataset991_Tiny", cases=2, shape=(4, 6, 5))
    model = trained()
    log = next((model / "fold_0").glob("training_log*.txt"))
    log.write_text("bad image case_01_0000.nii.gz skipped\n")
    assert "case_01" in {path.name[:7] for path in (raw / "labelsTr").iterdir()}
    package = make_package(model, tmp_path / "out", layout="sct", prove=False)
    with zipfile.ZipFile(package.zips["sct"]) as archive:
        assert archive.read(f"{TRAINER}/fold_0/{log.name}").decode() == "bad image case_0000.nii.gz skipped\n"


def test_what_no_rule_takes_out_stops_the_package(trained, tmp_path, monkeypatch):
    model = trained()
    monkeypatch.setattr("nnssl_adapt.sharing.anonymous.Cleaner.text", lambda self, text: text)
    with pytest.raises(ModelFolderError, match="would still say"):
        make_package(model, tmp_path / "out", prove=False)


def test_the_toolboxs_rules(trained):
    model = ModelFolder.open(trained(channels=2, labels={"labels": {"background": 0, "grey matter": 1, "lesion": 2}}))
    found = "\n".join(sct_warnings(model, (0, 1), None))
    for part in ("takes 2 (MR0, MR1)", "take LPI", "'grey matter'", "averages the 2 folds"):
        assert part in found
    assert "lesion" not in found
    assert package_module.default_name("Dataset041_Deep Grey") == "model_seg_deep-grey"
