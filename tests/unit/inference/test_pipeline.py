"""Images on their way through worker processes; what is known of them beforehand; what is remembered of them afterwards."""

import json
import logging
import shutil
import threading
import time

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support import worker_traps
from support.model_folders import plans_content
from support.synthetic import make_case, write_image

from nnssl_adapt.data.images import ImageGeometry, read_geometry
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess_cases import Shard
from nnssl_adapt.errors import CaseError, OutputError, PredictionError
from nnssl_adapt.inference import pipeline
from nnssl_adapt.inference.fold_networks import FoldNetworks
from nnssl_adapt.inference.pipeline import Pipeline
from nnssl_adapt.inference.predictor import Predictor
from nnssl_adapt.inference.record import PredictionRecord
from nnssl_adapt.inference.steps import PreparedImage, SharedMemory, Steps
from nnssl_adapt.inference.task import ImageTask, count_tiles, foresee, network_shape
from nnssl_adapt.planning.plan import FinetunePlan

SPACING = (3.0, 1.2, 0.8)  # Z, Y, X
SCHEME = LabelScheme.from_dataset_json({"labels": {"background": 0, "cord": 1, "lesion": 2}})

needs_processes = pytest.mark.skipif(not SharedMemory.is_available(), reason="needs Linux")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, shape in (("a", (14, 30, 40)), ("b", (16, 28, 44)), ("c", (11, 33, 37))):
        image, _ = make_case(np.random.default_rng(ord(name)), shape, 1, 3)
        write_image(folder / f"{name}_0000.nii.gz", image[0].astype(np.int16), SPACING)
    return folder


@pytest.fixture
def predictor(make_model):
    return Predictor(make_model(), device="cpu", tta=False)


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


# -- worker processes --------------------------------------------------------------------------------------------------


@needs_processes
def test_processes_give_what_threads_give_and_go_on_after_a_bad_image(predictor, images, tmp_path):
    (images / "bad_0000.nii.gz").write_bytes((images / "a_0000.nii.gz").read_bytes()[:900])
    for folder, workers in (("threads", 0), ("processes", 2)):
        with pytest.raises(PredictionError, match=r"1 of 4 images.*\n  bad: .*bad_0000\.nii\.gz"):
            predictor.predict(images, tmp_path / folder, save_probabilities=True, workers=workers)
    for name in "abc":
        one, other = tmp_path / "threads" / f"{name}.nii.gz", tmp_path / "processes" / f"{name}.nii.gz"
        assert np.array_equal(read(one), read(other)) and set(np.unique(read(one))) == {0, 1, 2}
        probabilities = [np.load(p.with_name(f"{name}.npz"))["probabilities"] for p in (one, other)]
        assert np.array_equal(*probabilities)
    assert not list((tmp_path / "processes").glob("bad*")) and not list((tmp_path / "processes").glob(".unfinished*"))


@needs_processes
def test_a_killed_worker_is_a_clear_error_and_finished_images_stay(predictor, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline, "export_in_worker", worker_traps.export_or_die)
    with pytest.raises(PredictionError, match=r"killed.*b.*--continue.*fewer workers"):
        predictor.predict(images, out, workers=2)
    assert read(out / "a.nii.gz").shape == (14, 30, 40) and not (out / "b.nii.gz").exists()
    kept = (out / "a.nii.gz").stat().st_mtime_ns
    monkeypatch.undo()
    predictor.predict(images, out, overwrite=False, workers=0)
    assert (out / "a.nii.gz").stat().st_mtime_ns == kept
    assert read(out / "b.nii.gz").shape == (16, 28, 44)
    assert not list(out.glob(".unfinished*"))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=needs_processes)])
def test_what_is_done_is_on_record_while_the_next_image_is_at_work(predictor, images, tmp_path, monkeypatch, workers):
    """Images take hours on a CPU: a run that is killed then must not have forgotten the ones before."""
    out, calls, real = tmp_path / "out", [], FoldNetworks.logits_by_tiles

    def killed_in_the_second(self, image, allocate, keep):
        calls.append(image.shape)
        if len(calls) == 1:
            return (yield from real(self, image, allocate, keep))
        for _ in range(600):
            yield 1, 1000
            if (out / "predicted.jsonl").exists() and '"image": "a"' in (out / "predicted.jsonl").read_text():
                raise KeyboardInterrupt
            time.sleep(0.05)
        raise AssertionError("not on record")

    monkeypatch.setattr(FoldNetworks, "logits_by_tiles", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        predictor.predict(images, out, workers=workers)
    assert read(out / "a.nii.gz").shape == (14, 30, 40) and not (out / "b.nii.gz").exists()


@needs_processes
def test_a_full_disk_in_a_worker_stops_the_work(predictor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "export_in_worker", worker_traps.export_or_fill_the_disk)
    with pytest.raises(OutputError, match=r"no space left while writing .*b\.nii\.gz"):
        predictor.predict(images, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "a.nii.gz").is_file() and not (tmp_path / "out" / "c.nii.gz").exists()


GRID = ImageGeometry((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), (2, 3, 4))


class FullDisk:
    """Steps of a pipeline: ``a`` finds the disk full while ``b`` is being written."""

    def __init__(self):
        self.b_begun, self.a_failed = threading.Event(), threading.Event()

    def prepare(self, task):
        return PreparedImage(np.zeros((1, 2, 3, 4), np.float32), {}, GRID)

    def export(self, task, logits, prepared):
        if task.identifier == "a":
            assert self.b_begun.wait(60)
            self.a_failed.set()
            raise OutputError("no space left")
        self.b_begun.set()
        assert self.a_failed.wait(60)
        return np.zeros((2, 3, 4), np.uint8)


def test_what_is_written_beside_the_one_that_found_the_disk_full_is_told():
    told = []

    def network(task, image, allocate):
        yield 1, 1
        return torch.zeros(2, 2, 3, 4)

    tasks = [ImageTask(name, (), None) for name in "ab"]
    with pytest.raises(OutputError, match="no space left"):
        list(Pipeline(FullDisk(), network, settle=told.append).run(tasks))
    assert [(result.task.identifier, result.error) for result in told] == [("b", None)]


def test_a_record_that_cannot_be_written_stops_the_work(predictor, images, tmp_path, monkeypatch):
    def full(self, line):
        raise OutputError(f"no space left while writing {self.folder}")

    monkeypatch.setattr(PredictionRecord, "_append", full)
    with pytest.raises(OutputError, match="no space left while writing"):
        predictor.predict(images, tmp_path / "out")


@needs_processes
def test_shared_memory_is_seen_by_others_and_outlives_its_closing():
    memory = SharedMemory()
    array = memory.array((3, 4, 5), np.float32, new=True)
    assert not array.any()
    array[1, 2, 3] = 7
    assert memory.array((3, 4, 5), np.float32)[1, 2, 3] == 7
    memory.close()
    memory.close()
    assert array[1, 2, 3] == 7


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_more_images_are_under_way_than_fit_into_memory(predictor, images, monkeypatch):
    """Two need more than there is: the next is read only when the one before it is written."""
    from nnssl_adapt.machine import workers as parallel

    monkeypatch.setattr(parallel, "available_memory", lambda: 1000)
    tasks = [ImageTask(n, (images / f"{n}_0000.nii.gz",), None) for n in "abc"]
    events = []

    class Watching(Steps):
        def prepare(self, task):
            events.append(f"read {task.identifier}")
            return super().prepare(task)

        def export(self, task, *arguments):
            labels = super().export(task, *arguments)
            events.append(f"done {task.identifier}")
            return labels

    def predict(task, image, allocate):
        yield 1, 1
        return torch.zeros(3, *image.shape[1:])

    steps = Watching(predictor.plan, SCHEME, 1, "")
    for need, expected in ((600, "read a done a read b done b read c done c"), (100, None)):
        events.clear()
        results = list(Pipeline(steps, predict, 0, dict.fromkeys("abc", need)).run(tasks))
        assert sorted(result.task.identifier for result in results) == ["a", "b", "c"]
        if expected is not None:
            assert " ".join(events) == expected
        else:
            assert sorted(events) == sorted(f"{what} {n}" for n in "abc" for what in ("read", "done"))


def test_what_is_foreseen_is_what_comes_if_nothing_is_cropped(tmp_path):
    path = tmp_path / "x_0000.nii.gz"
    write_image(path, np.ones((14, 30, 40), np.int16), SPACING)
    task = ImageTask("x", (path,), None)
    for content in (plans_content(), plans_content(keep_grid=True), plans_content(transpose=(2, 0, 1))):
        plan = FinetunePlan(content)
        prepared = Steps(plan, SCHEME, 1, "").prepare(task)
        assert network_shape(read_geometry(path), plan) == prepared.data.shape[1:]
    foreseen = foresee(task, plan, SCHEME, 0.5)
    assert foreseen.memory > 4 * 4 * np.prod(prepared.data.shape)
    assert foresee(task, plan, SCHEME, 0.5, with_probabilities=True).memory > foreseen.memory
    assert count_tiles((20, 24, 70), (16, 24, 32), 0.5) == 2 * 1 * 4
    (tmp_path / "y_0000.nii.gz").write_bytes(b"")
    assert foresee(ImageTask("y", (tmp_path / "y_0000.nii.gz",), None), plan, SCHEME, 0.5).memory == 0


# -- going on ----------------------------------------------------------------------------------------------------------


def made_again(predictor, images, out, caplog, **arguments):
    """Names of the images that are predicted when it goes on, and what is said."""
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    caplog.clear()
    with caplog.at_level(logging.INFO):
        predictor.predict(images, out, overwrite=False, **arguments)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    return "".join(n[0] for n in sorted(after) if after[n] != before.get(n)), caplog.text


def test_going_on_trusts_only_what_is_whole_and_known(predictor, images, tmp_path, caplog):
    out = tmp_path / "out"
    predictor.predict(images, out)
    assert made_again(predictor, images, out, caplog)[0] == ""
    whole = (out / "a.nii.gz").read_bytes()
    (out / "a.nii.gz").write_bytes(whole[: len(whole) // 2])  # a copy that broke off
    again, said = made_again(predictor, images, out, caplog)
    assert again == "a" and "not known to be whole" in said and "2 of 3 images are already predicted" in said
    assert (out / "a.nii.gz").read_bytes() == whole
    write_image(images / "b_0000.nii.gz", np.ones((16, 28, 44), np.int16), SPACING)  # another image of this name
    assert made_again(predictor, images, out, caplog)[0] == "b"
    with (out / "predicted.jsonl").open("a") as record:
        record.write('\n{"image": "c", "settings_id"')  # killed in the middle of a line
    assert made_again(predictor, images, out, caplog)[0] == ""
    (out / "predicted.jsonl").unlink()  # as nnU-Net leaves it: nothing says what made the files
    assert made_again(predictor, images, out, caplog)[0] == "abc"


def test_probabilities_that_are_missing_are_made(predictor, images, tmp_path, caplog):
    out = tmp_path / "out"
    predictor.predict(images, out)
    assert made_again(predictor, images, out, caplog, save_probabilities=True)[0] == "abc"
    probabilities = np.load(out / "b.npz")["probabilities"]
    assert probabilities.shape == (3, 16, 28, 44)
    assert np.array_equal(probabilities.argmax(0), read(out / "b.nii.gz"))
    assert (out / "b.pkl").is_file()
    (out / "c.npz").unlink()
    assert made_again(predictor, images, out, caplog)[0] == ""
    assert made_again(predictor, images, out, caplog, save_probabilities=True)[0] == "c"


def test_another_model_or_another_setting_is_noticed(make_model, images, tmp_path, caplog):
    out, model = tmp_path / "out", make_model(folds=(0, 1))
    Predictor(model, folds=0, device="cpu", tta=False).predict(images, out)
    coarser = Predictor(model, folds=0, device="cpu", tta=False, step=1.0)
    again, said = made_again(coarser, images, out, caplog)
    assert again == "abc" and "made with other step" in said
    other_fold = Predictor(model, folds=1, device="cpu", tta=False, step=1.0)
    again, said = made_again(other_fold, images, out, caplog)
    assert again == "abc" and "made with other checkpoints" in said
    # The weights decide, not where they lie.
    moved = tmp_path / "elsewhere" / model.name
    shutil.copytree(model, moved)
    assert made_again(Predictor(moved, folds=1, device="cpu", tta=False, step=1.0), images, out, caplog)[0] == ""
    settings = [json.loads(line) for line in (out / "predicted.jsonl").read_text().split("\n") if '"settings":' in line]
    assert [entry["settings"]["step"] for entry in settings] == [0.5, 1.0, 1.0]


def test_parts_share_a_folder_and_leave_nothing_out(predictor, images, tmp_path, caplog):
    out = tmp_path / "out"
    first = predictor.predict(images, out, part=Shard(1, 2))
    assert [path.name for path in first] == ["a.nii.gz", "c.nii.gz"] and not (out / "b.nii.gz").exists()
    predictor.predict(images, out, part=Shard.parse("2/2"))
    assert made_again(predictor, images, out, caplog)[0] == ""
    assert predictor.predict(images, out, part=Shard(4, 4)) == []


def test_an_unreadable_channel_does_not_hide_which_file_it_is(predictor, images):
    write_image(images / "a_0000.nii.gz", np.full((14, 30, 40), np.inf, np.float32), SPACING)
    with pytest.raises(CaseError, match=r"a_0000\.nii\.gz"):
        predictor.predict(images / "a_0000.nii.gz")
