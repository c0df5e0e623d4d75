"""``nnssl-adapt predict`` as it is typed."""

import numpy as np
import pytest
import SimpleITK as sitk
from support.model_folders import write_model_folder
from support.synthetic import make_case, write_image

from nnssl_adapt.cli.main import main
from nnssl_adapt.inference.fold_networks import FoldNetworks
from nnssl_adapt.inference.postprocess import Postprocessing, keep_largest_component

SPACING = (3.0, 1.2, 0.8)


@pytest.fixture
def model(nnunet_folders):
    return write_model_folder(nnunet_folders / "nnUNet_results", folds=(0, 1))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        image, _ = make_case(np.random.default_rng(ord(name)), (14, 30, 40), 1, 3)
        write_image(folder / f"{name}_0000.nii.gz", image[0].astype(np.int16), SPACING)
    return folder


def predict(*words):
    return main(["predict", "-device", "cpu", "--no-tta", *(str(word) for word in words)])


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_model_by_folder_by_dataset_and_by_parts_of_its_name(model, images, tmp_path, capsys):
    ways = {
        "folder": ("-m", model),
        "id": ("-m", "991"),
        "nnunet": ("-d", "Dataset991_Tiny", "-tr", "nnUNetTrainer", "-p", "nnUNetPlans", "-c", "3d_fullres"),
    }
    for name, way in ways.items():
        assert predict("-i", images, "-o", tmp_path / name, *way, "-f", "0", "1") == 0
        assert f"segmentations in {tmp_path / name}" in capsys.readouterr().out
        assert np.array_equal(read(tmp_path / name / "a.nii.gz"), read(tmp_path / "folder" / "a.nii.gz"))
    assert predict("-i", images / "a_0000.nii.gz", "-o", tmp_path / "one.nii.gz", "-d", 991, "-f", 1) == 0
    assert not np.array_equal(read(tmp_path / "one.nii.gz"), read(tmp_path / "folder" / "a.nii.gz"))


def test_parts_and_going_on(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict("-i", images, "-o", out, "-m", model, "--part", "2/2") == 0
    assert [path.name for path in out.glob("*.nii.gz")] == ["b.nii.gz"]
    made = (out / "b.nii.gz").stat().st_mtime_ns
    assert predict("-i", images, "-o", out, "-m", model, "--continue") == 0
    assert "1 of 2 images are already predicted" in capsys.readouterr().out
    assert (out / "a.nii.gz").is_file() and (out / "b.nii.gz").stat().st_mtime_ns == made
    assert predict("-i", images, "-o", out, "-m", model, "--overwrite") == 0
    assert (out / "b.nii.gz").stat().st_mtime_ns != made


def test_a_bad_image_shows_in_the_exit_code(model, images, tmp_path, capfd):
    (images / "c_0000.nii.gz").write_bytes(b"nothing")
    assert predict("-i", images, "-o", tmp_path / "out", "-m", model, "-np", 1) == 1
    said = capfd.readouterr().err
    assert "error: 1 of 3 images could not be predicted; the others are in" in said and "c_0000.nii.gz" in said
    assert (
        (tmp_path / "out" / "a.nii.gz").is_file()
        and "Warning" not in said
        and "with --continue, what is finished" in said
    )


@pytest.fixture
def steps(tmp_path):
    """The largest component of labels 1 and 2 together, then of 2."""
    Postprocessing(((1, 2), (2,))).save(tmp_path / "found" / "postprocessing.json")
    return tmp_path / "found" / "postprocessing.json"


def test_postprocessing_in_the_same_command(model, images, steps, tmp_path, capsys):
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert predict("-i", images, "-o", plain, "-m", model, "-f", 0, "--save-probabilities") == 0
    with_steps = ("-i", images, "-o", out, "-m", model, "-f", 0, "--save-probabilities", "--postprocess")
    assert predict(*with_steps, steps) == 0
    assert "postprocessing: largest component of 1+2, then of 2" in capsys.readouterr().out
    for name in "ab":
        before, after = read(plain / f"{name}.nii.gz"), read(out / f"{name}.nii.gz")
        expected = keep_largest_component(keep_largest_component(before, (1, 2)), (2,))
        assert np.array_equal(after, expected) and not np.array_equal(after, before)
        raw, kept = (np.load(folder / f"{name}.npz")["probabilities"] for folder in (plain, out))
        assert np.array_equal(raw, kept)
    # nnU-Net's file of the same steps is the same; other steps are not.
    assert predict(*with_steps, steps.with_suffix(".pkl"), "--continue") == 0
    assert "2 of 2 images are already predicted" in capsys.readouterr().out
    assert predict(*with_steps[:-1], "--continue") == 0
    assert "predicted again: made with other postprocessing" in capsys.readouterr().out
    assert np.array_equal(read(out / "a.nii.gz"), read(plain / "a.nii.gz"))


def test_postprocessing_of_another_model_is_refused(model, images, tmp_path, capsys):
    Postprocessing(((1, 7),)).save(tmp_path / "postprocessing.json")
    wrong = tmp_path / "postprocessing.pkl"
    assert predict("-i", images, "-o", tmp_path / "out", "-m", model, "--postprocess", wrong) == 1
    assert f"{wrong} is about label 7, but there are only 1, 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_it_says_how_to_go_on(model, images, tmp_path, capsys, monkeypatch):
    def stop(self, image, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FoldNetworks, "logits_by_tiles", stop)
    assert predict("-i", images, "-o", tmp_path / "out", "-m", model) == 130
    assert "run the same command with --continue to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "MODEL", "-f", "7"), r"no fold_7/checkpoint_final.pth; trained folds: 0 (final), 1 (final)"),
        (("-m", "MODEL", "--checkpoint", "best"), "checkpoint_best.pth"),
        (("-m", "MODEL", "--step-size", "2"), "0 < step <= 1"),
        (("-m", "MODEL", "--part", "3/2"), "--part 3/2: expected 1/2 to 2/2"),
        (("-m", "nowhere"), "-m nowhere: no such folder, and no dataset 'nowhere'"),
        (("-m", "MODEL", "--postprocess", "nothing.json"), "there is no postprocessing.json nothing.json"),
        (("-m", "MODEL", "-np", "-1"), "-np -1"),
        (("-m", "MODEL", "-c", "3d_fullres"), "-c: they choose among the models of a dataset"),
        (("-m", "MODEL", "-device", "gpu"), "'gpu' is unknown"),
        (("-d", "77"), "no dataset '77'"),
        (("-d", "991", "-c", "3d_lowres"), "no model with -c 3d_lowres; there is"),
    ],
)
def test_one_clear_line_for_what_is_wrong(model, images, tmp_path, capsys, words, message):
    words = [model if word == "MODEL" else word for word in words]
    assert predict("-i", images, "-o", tmp_path / "out", *words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("-m", "a", "-d", "1"), (), ("-m", "a", "--overwrite", "--continue")])
def test_flags_that_exclude_each_other(words, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        predict("-i", "x", "-o", "y", *words)
    assert stopped.value.code == 2
