"""From files, folders and arrays to segmentations; and what happens to images that are no good."""

import logging
import sys
import threading

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.synthetic import make_case, write_image

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.errors import (
    CaseError,
    ConfigurationError,
    DeviceUnavailable,
    ModelFolderError,
    OutputError,
    PredictionError,
)
from nnssl_adapt.inference import fold_networks, steps, task
from nnssl_adapt.inference.fold_networks import FoldNetworks
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.precision import predicting_precision, trained_precision
from nnssl_adapt.inference.predictor import Predictor

SPACING = (3.0, 1.2, 0.8)  # Z, Y, X


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def images(tmp_path):
    """Two images of different shapes, with one channel."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, shape in (("a", (14, 30, 40)), ("b", (16, 28, 44))):
        image, _ = make_case(np.random.default_rng(0), shape, 1, 3)
        write_image(folder / f"{name}_0000.nii.gz", image[0].astype(np.int16), SPACING)
    return folder


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_folder(model, images, tmp_path):
    predictor = Predictor(model, device="cpu")
    written = predictor.predict(images, tmp_path / "out")
    assert written == [tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "b.nii.gz"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.nii.gz",
        "b.nii.gz",
        "dataset.json",
        "plans.json",
        "predicted.jsonl",
    ]
    for name in "ab":
        image, labels = (
            sitk.ReadImage(str(path)) for path in (images / f"{name}_0000.nii.gz", tmp_path / "out" / f"{name}.nii.gz")
        )
        assert labels.GetSize() == image.GetSize()
        for part in ("Spacing", "Origin", "Direction"):
            assert getattr(labels, f"Get{part}")() == pytest.approx(getattr(image, f"Get{part}")())
        assert labels.GetPixelID() == sitk.sitkUInt8
        assert set(np.unique(sitk.GetArrayFromImage(labels))) == {0, 1, 2}
    together = predictor.predict(images)
    assert together.keys() == {"a", "b"}
    assert np.array_equal(together["b"], read(written[1]))


def test_every_way_to_give_an_image_gives_the_same(model, images, tmp_path):
    predictor = Predictor(ModelFolder.open(model), device="cpu", step=1.0, tta=False)
    file = images / "a_0000.nii.gz"
    labels = predictor.predict(file)
    assert labels.dtype == np.uint8
    assert np.array_equal(predictor.predict([str(file)]), labels)
    array = read(file).astype(np.float64)
    kept = array.copy()
    assert np.array_equal(predictor.predict(array, spacing=SPACING), labels)
    assert np.array_equal(predictor.predict_array(array[None], spacing=SPACING), labels)
    assert np.array_equal(array, kept)
    geometry = ImageGeometry(SPACING, (1.0, 2.0, 3.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1), array.shape)
    named = tmp_path / "deep" / "result.nii.gz"
    assert predictor.predict(array, named, geometry=geometry) == [named]
    assert np.array_equal(read(named), labels) and sitk.ReadImage(str(named)).GetOrigin() == (1, 2, 3)
    assert predictor.predict(file, tmp_path / "out") == [tmp_path / "out" / "a.nii.gz"]


def test_folds_are_averaged_and_chosen(make_model, images):
    model = make_model(folds=(0, 1, "all"))
    assert Predictor(model, device="cpu").folds == (0, 1)
    predictor = Predictor(model, device="cpu", tta=False)
    image = torch.randn(1, 16, 24, 40, generator=torch.Generator().manual_seed(0))
    both = predictor.predict_logits(image)
    first, second = (Predictor(model, folds=f, device="cpu", tta=False).predict_logits(image) for f in ("0", 1))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(both, (first + second) / 2)
    torch.testing.assert_close(predictor.predict_logits(image), both)
    assert Predictor(model, folds="all", device="cpu").folds == ("all",)
    calls = []
    predictor.predict_logits(image, progress=lambda *c: calls.append(c))
    assert calls[0] == (1, 4) and calls[-1] == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"folds": 3}, ModelFolderError, "no fold_3"),
        ({"folds": "first"}, ConfigurationError, "'first': expected a number"),
        ({"folds": []}, ConfigurationError, "once each"),
        ({"folds": [0, "0"]}, ConfigurationError, "once each"),
        ({"checkpoint": "best"}, ModelFolderError, r"checkpoint_best\.pth; trained folds: 0 \(final\)"),
        ({"step": 0}, ConfigurationError, "0 < step <= 1"),
        ({"device": "cuda:77"}, DeviceUnavailable, "cuda"),
    ],
)
def test_impossible_wishes_are_refused_before_any_work(model, arguments, error, message):
    with pytest.raises(error, match=message):
        Predictor(model, **{"device": "cpu", **arguments})


def test_mirroring_follows_the_checkpoint_and_the_caller(make_model):
    model = make_model(mirror_axes=(0, 2))
    assert Predictor(model, device="cpu").mirror_axes == (0, 2)
    assert Predictor(model, device="cpu", tta=False).mirror_axes == ()


def test_a_bad_image_is_reported_and_the_rest_goes_on(model, images, tmp_path, caplog):
    truncated = images / "aa_0000.nii.gz"
    truncated.write_bytes((images / "a_0000.nii.gz").read_bytes()[:2000])
    write_image(images / "c_0000.nii.gz", np.full((14, 30, 40), np.nan, np.float32), SPACING)
    with caplog.at_level(logging.ERROR), pytest.raises(PredictionError) as caught:
        Predictor(model, device="cpu", tta=False).predict(images, tmp_path / "out")
    message = str(caught.value)
    assert "2 of 4 images could not be predicted" in message and f"the others are in {tmp_path / 'out'}" in message
    assert str(truncated) in message and "NaN" in message and str(truncated) in caplog.text
    assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}


def test_one_bad_image_by_itself_raises_its_own_error(model, images):
    with pytest.raises(CaseError, match="no such file"):
        Predictor(model, device="cpu").predict(images / "z_0000.nii.gz")
    (images / "a_0000.nii.gz").write_bytes(b"")
    with pytest.raises(CaseError, match=r"a_0000\.nii\.gz"):
        Predictor(model, device="cpu").predict(images / "a_0000.nii.gz")


def test_several_channels(make_model, tmp_path):
    model = make_model(channels=2)
    image, _ = make_case(np.random.default_rng(0), (14, 30, 40), 2, 3)
    files = [tmp_path / f"sub_{name}.nii.gz" for name in ("t1", "t2")]
    for channel, file in enumerate(files):
        write_image(file, image[channel].astype(np.float32), SPACING)
    predictor = Predictor(model, device="cpu", tta=False)
    labels = predictor.predict(files)
    assert np.array_equal(labels, predictor.predict(image.astype(np.float32), spacing=SPACING))
    assert not np.array_equal(labels, predictor.predict(files[::-1]))
    expected = "2 channel.*_0000 = MR0, _0001 = MR1"
    with pytest.raises(CaseError, match=expected):
        predictor.predict(files[0])
    with pytest.raises(CaseError, match=expected):
        predictor.predict([*files, files[0]])
    with pytest.raises(CaseError, match=expected):
        predictor.predict(image[:1], spacing=SPACING)
    folder = tmp_path / "images"
    folder.mkdir()
    write_image(folder / "a_0000.nii.gz", image[0].astype(np.float32), SPACING)
    with pytest.raises(CaseError, match=expected) as caught:
        predictor.predict(folder, tmp_path / "out")
    assert "a_0001.nii.gz" in str(caught.value)


def test_images_are_never_overwritten(model, images, tmp_path):
    predictor = Predictor(model, device="cpu")
    plain = tmp_path / "scan.nii.gz"
    plain.write_bytes((images / "a_0000.nii.gz").read_bytes())
    for output in (plain, tmp_path):  # scan.nii.gz, predicted into its own folder, would be called scan.nii.gz
        with pytest.raises(ConfigurationError, match="is the image itself"):
            predictor.predict(plain, output)
    with pytest.raises(ConfigurationError, match="is the folder of the images"):
        predictor.predict(images, images)
    with pytest.raises(ConfigurationError, match="output folder"):
        predictor.predict(images, tmp_path / "out.nii.gz")


def test_segmentations_may_go_into_a_dataset_without_changing_its_json(model, images, tmp_path, caplog):
    out = tmp_path / "labelsTs"
    out.mkdir()
    (out / "dataset.json").write_text("somebody's")
    for _ in range(2):
        caplog.clear()
        Predictor(model, device="cpu", tta=False).predict(images, out)
        assert (out / "dataset.json").read_text() == "somebody's"
        assert f"{out / 'dataset.json'} stays as it was; it is not the model's" in caplog.text


def test_another_model_brings_its_own_dataset_json(make_model, images, tmp_path, caplog):
    """Evaluation would judge its labels by those of the model before."""
    out = tmp_path / "out"
    first = make_model()
    labels = {"labels": {"background": 0, "lung": 1, "heart": 2}}
    second = make_model(name="nnUNetTrainer__other__3d_fullres", labels=labels)
    for model in (first, second, first):
        Predictor(model, device="cpu", tta=False).predict(images, out)
        for name in ("dataset.json", "plans.json"):
            assert (out / name).read_bytes() == (model / name).read_bytes()
    assert "stays as it was" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigurationError, "needs its spacing"),
        ({"spacing": (1, 1)}, ConfigurationError, "needs its spacing"),
        ({"spacing": (1, 1, 0)}, ConfigurationError, "needs its spacing"),
        ({"spacing": (1, 1, 1), "output": "out"}, ConfigurationError, "an array has no name"),
        ({"spacing": (1, 1, 1), "save_probabilities": True}, ConfigurationError, "give an output"),
    ],
)
def test_arrays_need_their_spacing_and_a_name(model, arguments, error, message):
    with pytest.raises(error, match=message):
        Predictor(model, device="cpu").predict(np.ones((14, 30, 40)), **arguments)


def test_arrays_that_are_no_image(model, images):
    predictor = Predictor(model, device="cpu")
    geometry = ImageGeometry(SPACING, (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1), (14, 30, 41))
    with pytest.raises(CaseError, match="NaN"):
        predictor.predict(np.full((14, 30, 40), np.nan), spacing=SPACING)
    with pytest.raises(CaseError, match=r"got \(30, 40\)"):
        predictor.predict(np.ones((30, 40)), spacing=SPACING)
    with pytest.raises(CaseError, match="of \\(14, 30, 41\\) voxels"):
        predictor.predict(np.ones((14, 30, 40)), geometry=geometry)
    with pytest.raises(ConfigurationError, match="files have their own"):
        predictor.predict(images, spacing=SPACING)


def test_a_full_disk_stops_the_work_at_once(model, images, tmp_path, monkeypatch):
    calls = []

    def full(path, *_):
        calls.append(path)
        raise OutputError(f"no space left while writing {path}")

    monkeypatch.setattr(steps, "write_labels", full)
    with pytest.raises(OutputError, match="no space left"):
        Predictor(model, device="cpu", tta=False).predict(images, tmp_path / "out")
    assert calls == [tmp_path / "out" / "a.nii.gz"]


def test_the_next_image_is_prepared_while_one_is_predicted(model, images, monkeypatch):
    second_is_read = threading.Event()
    read_image, logits_by_tiles = task.read_image, FoldNetworks.logits_by_tiles

    def reading(paths, *arguments):
        if paths[0].name.startswith("b"):
            second_is_read.set()
        return read_image(paths, *arguments)

    def predicting(self, *arguments):
        assert second_is_read.wait(30)
        return logits_by_tiles(self, *arguments)

    monkeypatch.setattr(task, "read_image", reading)
    monkeypatch.setattr(FoldNetworks, "logits_by_tiles", predicting)
    assert len(Predictor(model, device="cpu", tta=False).predict(images)) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_counts_tiles_of_all_folds_and_names_images(
    make_model, images, tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    model = make_model(folds=(0, 1))
    with pytest.raises(PredictionError):
        (images / "c_0000.nii.gz").write_bytes(b"nothing")
        Predictor(model, device="cpu", tta=False).predict(images, tmp_path / "out", progress=True)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    tiles = 2 * (2 + 3)  # two folds; of the two good images, as they are cropped
    assert f" {tiles}/{tiles} " in last[-1] and "3/3 images" in last[-1] and "100%" in last[-1]
    assert (len(last) > 5) == terminal  # a line for every tile would fill log files


@pytest.mark.parametrize("folds", ["0", None])
def test_labels_made_where_the_logits_are(make_model, images, monkeypatch, folds):
    """By the way that a GPU goes, on tensors of the CPU: the same labels, in memory and in files."""
    predictor = Predictor(make_model(), folds=folds, device="cpu", tta=False)
    expected = predictor.predict(images)
    decided = []

    def watched(logits, *arguments, original=fold_networks.decided_on_device):
        decided.append(original(logits, *arguments))
        return decided[-1]

    monkeypatch.setattr(FoldNetworks, "decides_on_device", True)
    monkeypatch.setattr(fold_networks, "decided_on_device", watched)
    found = predictor.predict(images)
    assert found.keys() == expected.keys() and len(decided) == 2
    assert all(labels.dtype == torch.uint8 and labels.ndim == 3 for labels in decided)
    for name, labels in expected.items():
        assert np.array_equal(found[name], labels) and len(np.unique(labels)) > 1
    image = np.random.default_rng(0).normal(size=(1, 14, 30, 40)).astype(np.float32)
    in_memory = predictor.predict_array(image, spacing=SPACING)
    assert len(decided) == 3
    monkeypatch.setattr(FoldNetworks, "decides_on_device", False)
    assert np.array_equal(predictor.predict_array(image, spacing=SPACING), in_memory)


def test_labels_are_made_on_the_cpu_where_a_gpu_is_too_small(make_model, images, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("no memory")

    predictor = Predictor(make_model(), device="cpu", tta=False)
    expected = predictor.predict(images)
    monkeypatch.setattr(FoldNetworks, "decides_on_device", True)
    monkeypatch.setattr("nnssl_adapt.inference.export.labels_on_device", too_large)
    found = predictor.predict(images)
    assert all(np.array_equal(found[name], labels) for name, labels in expected.items())


@pytest.mark.parametrize(
    ("asked", "trained", "native", "expected"),
    [
        (None, "auto", True, "bf16"),
        (None, "bf16", True, "bf16"),
        (None, "bf16", False, "fp16"),
        (None, "fp16", True, "fp16"),
        (None, "fp32", True, "fp32"),
        ("fp16", "bf16", True, "fp16"),
        ("bf16", "fp32", False, "bf16"),
    ],
)
def test_the_precision_is_that_of_training(monkeypatch, asked, trained, native, expected):
    kind = torch.bfloat16 if native else torch.float16
    monkeypatch.setattr("nnssl_adapt.inference.precision.half_precision", lambda device: kind)
    assert predicting_precision(asked, trained, torch.device("cuda")) == expected
    assert predicting_precision(asked, trained, torch.device("cpu")) == "fp32"


def test_what_a_checkpoint_says_of_its_precision():
    assert trained_precision({"nnssl_adapt": {"recipe": {"precision": "bf16"}}}) == "bf16"
    for content in ({}, {"nnssl_adapt": None}, {"nnssl_adapt": {"recipe": {"precision": "fp8"}}}):
        assert trained_precision(content) == "fp16"
