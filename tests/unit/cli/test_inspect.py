"""``nnssl-adapt inspect``: what it prints, writes and returns."""

import json

import pytest
from support.nnssl_families import FAMILIES
from support.pictures import write_picture_dataset
from support.planar import write_planar_model
from support.synthetic import make_dataset

from nnssl_adapt.cli.main import main


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    names = ("MAE", "EvaMAE", "Spark")
    return {name: FAMILIES[name](name, folder / name, 2 if name == "MAE" else 1).source for name in names}


def inspect(capsys, *arguments):
    """(exit code, what was printed, errors)."""
    code = main(["inspect", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_it_says_what_the_checkpoint_is_and_what_a_network_would_get(sources, capsys):
    code, out, err = inspect(capsys, sources["MAE"])
    assert (code, err) == (0, "")
    for part in ("ResidualEncoderUNet", "BaseMAETrainer", "2 channel(s)", "4 × 16 × 8 voxels", "2 × 0.8 × 0.7 mm"):
        assert part in out
    assert "A new network of the same kind (2 channel(s), 2 outputs, patch 4 × 16 × 8) would get" in out
    assert "100.0% of the encoder is pre-trained" in out
    assert "PROVEN" not in out
    assert len(out.splitlines()) < 40


def test_nothing_is_said_twice(sources, capsys):
    _, out, _ = inspect(capsys, sources["EvaMAE"])
    assert out.count("token order: file hwd") == 1


@pytest.mark.parametrize("name", ["MAE", "EvaMAE", "Spark"])
def test_a_good_transfer_is_proven(sources, capsys, name):
    code, out, _ = inspect(capsys, sources[name], "--prove")
    assert code == 0
    assert "\nPROVEN: the encoder computes what it did in pre-training" in out
    assert ("block 1" if name == "EvaMAE" else "stage 2") in out


def test_a_wrong_token_order_is_not_proven_and_the_exit_code_says_so(sources, capsys):
    code, out, _ = inspect(capsys, sources["EvaMAE"], "--prove", "--token-order", "whd")
    assert code == 1
    assert "NOT PROVEN" in out
    assert "DIFFERS" in out


def test_for_a_dataset_its_channels_and_labels_count(sources, capsys, nnunet_folders):
    make_dataset(nnunet_folders / "nnUNet_raw", channels=3)
    code, out, _ = inspect(capsys, sources["MAE"], "-d", dataset_name(nnunet_folders), "--prove")
    assert code == 0
    assert "(3 channel(s), " in out
    assert "input channels 2 → 3" in out
    assert "2 channel(s) repeated to 3" in out


def dataset_name(folders):
    return next((folders / "nnUNet_raw").iterdir()).name


def test_channels_are_mapped_by_name(sources, capsys, nnunet_folders):
    folder = make_dataset(nnunet_folders / "nnUNet_raw", channels=2)
    names = list(json.loads((folder / "dataset.json").read_text())["channel_names"].values())
    exchanged = f"{names[0]}=1,{names[1]}=0"
    code, out, _ = inspect(capsys, sources["MAE"], "-d", folder.name, "--prove", "--channels", exchanged)
    assert code == 0
    assert "channels as the map says" in out
    code, _, err = inspect(capsys, sources["MAE"], "-d", folder.name, "--channels", "nonsense=1")
    assert code == 1
    assert "nonsense" in err


def test_everything_is_written_as_json(sources, capsys, tmp_path):
    path = tmp_path / "what.json"
    code, out, _ = inspect(capsys, sources["EvaMAE"], "--prove", "--json", path)
    assert code == 0
    assert str(path) in out
    content = json.loads(path.read_text())
    assert content["checkpoint"]["architecture"]["class"] == "Primus"
    assert content["checkpoint"]["patch_size"] == [6, 12, 8]
    assert content["transfer"]["coverage"] == 1
    assert content["proof"]["passed"] is True
    assert {stage["name"] for stage in content["proof"]["stages"]} >= {"patch embedding", "block 0", "last norm"}


def test_a_failed_proof_is_written_too(sources, capsys, tmp_path):
    path = tmp_path / "what.json"
    code, _, _ = inspect(capsys, sources["EvaMAE"], "--prove", "--token-order", "whd", "--json", path)
    assert code == 1
    assert json.loads(path.read_text())["proof"]["passed"] is False


def test_a_picture_is_drawn(sources, capsys, tmp_path):
    path = tmp_path / "network.png"
    code, out, _ = inspect(capsys, sources["MAE"], "--plot", path)
    assert code == 0
    assert str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_source_that_is_none_is_one_line(capsys, tmp_path):
    code, out, err = inspect(capsys, tmp_path / "nothing.pth")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_2d_weights_are_proven_and_volumes_of_pictures_refused(small_resenc, nnunet_folders, capsys):
    pytest.importorskip("PIL")
    write_picture_dataset(nnunet_folders / "nnUNet_raw" / "Dataset702_Cells")
    planar = write_planar_model(nnunet_folders / "others")
    code, out, _ = inspect(capsys, planar, "-d", "702", "--prove")
    assert code == 0 and "PROVEN" in out and "decoder 1" in out
    code, _, err = inspect(capsys, small_resenc, "-d", "702")
    assert code == 1 and "pictures" in err and "-c 2d" in err
    code, _, err = inspect(capsys, small_resenc, "-d", "702", "-c", "2d")
    assert code == 1 and "3D network" in err
    code, _, err = inspect(capsys, planar, "-c", "3d_fullres")
    assert code == 1 and "two axes" in err
