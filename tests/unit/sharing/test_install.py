"""Installing packages: what is put where, and every way in which a zip can be wrong."""

import hashlib
import io
import json
import struct
import zipfile

import pytest
import torch
from support.hub_server import Page, WebServer
from support.model_folders import write_model_folder

from nnssl_adapt.errors import ConfigurationError, DigestMismatch, ModelFolderError, NnsslAdaptError, SourceError
from nnssl_adapt.inference.find_model import find_model_folder
from nnssl_adapt.inference.predictor import Predictor
from nnssl_adapt.sharing.catalogue import installed_models
from nnssl_adapt.sharing.install import install_model
from nnssl_adapt.sharing.package import make_package

TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture
def package(trained, tmp_path, nnunet_folders):
    return make_package(trained(folds=(0, 1)), tmp_path / "out", date="20240915", prove=False)


def results(tmp_path):
    """Names of everything in nnUNet_results; leftovers too."""
    return sorted(path.name for path in (tmp_path / "nnUNet_results").rglob("*"))


@pytest.mark.parametrize("layout", ["sct", "nnunet"])
def test_a_package_is_put_where_predict_finds_it(package, tmp_path, layout):
    model = install_model(package.zips[layout])
    assert model.path == tmp_path / "nnUNet_results" / "Dataset991_Tiny" / TRAINER == find_model_folder(991)
    assert model.folds == (0, 1) and (model.path / "README.md").is_file()
    assert (model.path / "fold_0" / "progress.png").is_file() and model.dataset_json["image_orientation"] == "RPI"
    assert Predictor(model, device="cpu").folds == (0, 1)
    (listed,) = installed_models()
    assert listed.source == package.zips[layout].name and "folds 0, 1; MR0 → cord, lesion" in listed.summary


def test_a_folder_an_address_and_another_name(package, trained, tmp_path):
    assert install_model(trained(tmp_path / "x", name="B__nnUNetPlans__3d_fullres")).path.name.startswith("B__")
    assert install_model(package.folder, dataset="Dataset011_Cord").folds == (0, 1)
    model = install_model(package.zips["sct"], dataset="Dataset012_Cord")
    assert find_model_folder(12) == model.path and model.plan.dataset_name == "Dataset012_Cord"
    content = package.zips["sct"].read_bytes()
    with WebServer() as web:
        web.pages["/model.zip"] = Page(content)
        digest = hashlib.sha256(content).hexdigest()
        with pytest.raises(DigestMismatch):
            install_model(f"{web.url}/model.zip#sha256={'0' * 64}", dataset="Dataset013_Cord")
        install_model(f"{web.url}/model.zip#sha256={digest}", dataset="Dataset013_Cord")
    assert find_model_folder(13).is_dir()


def test_what_is_there_stays_unless_it_was_installed_and_may_be_replaced(package, trained, tmp_path):
    mine = tmp_path / "nnUNet_results" / "Dataset991_Tiny" / TRAINER
    trained(tmp_path / "nnUNet_results")
    before = (mine / "fold_0" / "checkpoint_final.pth").read_bytes()
    with pytest.raises(ConfigurationError, match="was not installed"):
        install_model(package.zips["sct"], overwrite=True)
    assert (mine / "fold_0" / "checkpoint_final.pth").read_bytes() == before
    install_model(package.zips["sct"], dataset="Dataset012_Cord")
    with pytest.raises(ConfigurationError, match="--overwrite"):
        install_model(package.zips["sct"], dataset="Dataset012_Cord")
    install_model(package.zips["sct"], dataset="Dataset012_Cord", overwrite=True)


def test_two_datasets_of_one_id_are_warned_about(package, tmp_path, caplog):
    (tmp_path / "nnUNet_results" / "Dataset991_Other").mkdir()
    install_model(package.zips["sct"])
    assert "has the id of Dataset991_Other" in caplog.text


# -- wrong zips ----------------------------------------------------------------------------------------------------------


def rezipped(source, target, change):
    """A zip with the members of another, after ``change(names → bytes)``."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def second_trainer(members):
    members.update({name.replace("nnUNetTrainer__", "nnUNetTrainer_2__"): members[name] for name in list(members)})


def without(part):
    def change(members):
        for name in [name for name in members if part in name]:
            del members[name]

    return change


def with_plans(**changes):
    def change(members):
        name = next(name for name in members if name.endswith("plans.json"))
        members[name] = json.dumps({**json.loads(members[name]), **changes}).encode()

    return change


def other_checkpoint(members):
    buffer = io.BytesIO()
    name = next(name for name in members if name.endswith("fold_1/checkpoint_final.pth"))
    content = torch.load(io.BytesIO(members[name]), weights_only=True)
    content["network_weights"]["decoder.seg_layers.1.bias"] = torch.zeros(7)
    torch.save(content, buffer)
    members[name] = buffer.getvalue()


BAD = {
    "zip slip": (lambda members: members.update({"../../evil.txt": b"x"}), "out of the zip's own folder"),
    "absolute": (lambda members: members.update({"/etc/evil": b"x"}), "an absolute path"),
    "two trainer folders": (second_trainer, "holds 2 trained models"),
    "no plans": (without("plans.json"), "no plans.json"),
    "no dataset.json": (without("dataset.json"), "no dataset.json"),
    "no weights": (without(".pth"), "no trained model"),
    "another network": (other_checkpoint, "not of the network in plans.json"),
    "path in plans": (with_plans(dataset_name="../../Dataset001_X"), "no dataset name"),
    "no dataset in plans": (with_plans(dataset_name="X"), "--dataset Dataset041_Name"),
    "plans are no plans": (with_plans(configurations={}), "configuration"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_packages_leave_nothing(package, tmp_path, kind):
    change, reason = BAD[kind]
    bad = rezipped(package.zips["sct"], tmp_path / "bad.zip", change)
    with pytest.raises(NnsslAdaptError, match=reason) as caught:
        install_model(bad)
    assert "\n" not in str(caught.value)
    assert results(tmp_path) == [] and not list(tmp_path.rglob("evil*"))


def test_bombs_are_refused(package, tmp_path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
            archive.writestr(f"{TRAINER}/{name}", bytes(40 << 20))
    with pytest.raises(SourceError, match="times its size"):
        install_model(bomb)
    assert results(tmp_path) == []


def test_code_in_a_checkpoint_is_not_run(package, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    def change(members):
        buffer = io.BytesIO()
        torch.save({"network_weights": {}, "evil": Evil()}, buffer)
        members[next(name for name in members if name.endswith("fold_0/checkpoint_final.pth"))] = buffer.getvalue()

    with pytest.raises(NnsslAdaptError, match="refused"):
        install_model(rezipped(package.zips["sct"], tmp_path / "evil.zip", change))
    assert not (tmp_path / "ran").exists() and results(tmp_path) == []


def test_damaged_zips_and_what_is_none(package, tmp_path):
    whole = package.zips["sct"].read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    flipped = tmp_path / "flipped.zip"
    with zipfile.ZipFile(package.zips["sct"]) as archive:
        at = archive.getinfo(f"{TRAINER}/fold_0/checkpoint_final.pth").header_offset + 5000
    flipped.write_bytes(whole[:at] + struct.pack("B", whole[at] ^ 255) + whole[at + 1 :])
    text = tmp_path / "model.txt"
    text.write_text("hello")
    for source in (cut, flipped, text, tmp_path / "nowhere.zip"):
        with pytest.raises(SourceError):
            install_model(source)
    with pytest.raises(ConfigurationError, match="no dataset name"):
        install_model(package.zips["sct"], dataset="../../x")
    assert results(tmp_path) == []


def test_only_files_of_a_model_are_taken(package, tmp_path):
    def change(members):
        members[f"{TRAINER}/fold_0/run_me.py"] = b"print('no')"
        members[f"{TRAINER}/.hidden"] = members["other/notes.txt"] = b"x"

    model = install_model(rezipped(package.zips["sct"], tmp_path / "more.zip", change))
    assert not {"run_me.py", ".hidden", "notes.txt"} & {path.name for path in model.path.rglob("*")}


def test_a_failing_disk_leaves_nothing(package, tmp_path, monkeypatch):
    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnssl_adapt.sharing.install.shutil.copytree", full)
    with pytest.raises(NnsslAdaptError, match="no space left"):
        install_model(package.zips["sct"])
    assert [name for name in results(tmp_path) if "Dataset" not in name] == []


# -- what is installed ---------------------------------------------------------------------------------------------------


def test_broken_models_are_listed_too(tmp_path, nnunet_folders):
    folder = write_model_folder(tmp_path / "nnUNet_results")
    (folder / "dataset.json").write_text("{")
    (listed,) = installed_models()
    assert listed.summary.startswith("can't be used: ") and listed.source is None
    with pytest.raises(ModelFolderError):
        find_model_folder(991, plans="other")
