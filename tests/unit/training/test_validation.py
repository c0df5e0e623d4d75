"""The cases of a validation are shared among ranks, each predicted once, whoever stopped in between."""

import json
import math
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from support.tiny_plans import PATCH

from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import PredictionError, TrainingError, TrainingStopped
from nnssl_adapt.training import validation as validation_module
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.optimise.out_of_memory import explained_validation_memory
from nnssl_adapt.training.run.stopping import StopRequest
from nnssl_adapt.training.starting_weights import build_initial_network
from nnssl_adapt.training.validation import FoldValidation

CASES = tuple(f"case_{number:02d}" for number in range(4))


@dataclass(frozen=True)
class WithOthers(Ranks):
    """The main of two ranks; the other one does its part (``other``) while this one waits for it."""

    other: object = None
    other_stopped: bool = False

    def barrier(self):
        if self.other is not None:
            self.other()

    def any(self, flag):
        return flag or self.other_stopped

    def from_main(self, value):
        return value


class Killed(BaseException):
    """Nothing runs after it."""


@dataclass(frozen=True)
class KilledWhenDone(Ranks):
    """One of two ranks that begin together, killed when it has predicted its part and waits for the other."""

    def barrier(self):
        raise Killed

    def from_main(self, value):
        return []  # of the cases: none was done when they began


class StopAfter(StopRequest):
    """Is asked to stop after so many tiles."""

    def __init__(self, tiles):
        super().__init__()
        self.tiles = tiles

    def asked(self):
        self.tiles -= 1
        if self.tiles < 0:
            self.reason = "SIGTERM"
        return self.tiles < 0

    __bool__ = asked


@pytest.fixture
def network(plan):
    return build_initial_network(plan, plan.labels.num_heads, seed=4)


@pytest.fixture
def validation(plan, tmp_path):
    return FoldValidation(
        plan=plan,
        labels=plan.labels,
        file_ending=".nii.gz",
        store=CaseStore(plan.store_folder),
        cases=CASES,
        references=plan.dataset_folder / "gt_segmentations",
        folder=tmp_path / "fold_0",
        fold=0,
        device=torch.device("cpu"),
    )


def predicted(validation):
    """What was written, by name."""
    return {path.name: path.read_bytes() for path in validation.output.glob("*.nii.gz")}


def record(validation):
    return json.loads((validation.folder / "validation_done.json").read_text())


def do_part(validation, rank, network, weights="digest", stop=None):
    """What a rank of two predicts before it meets the other one."""
    with pytest.raises(Killed):
        alone = replace(validation, ranks=KilledWhenDone(rank, 2, rank, 2, "gloo"))
        alone.run(network, (0,), weights, stop or StopRequest())


def as_main(validation, network, stop=None):
    """The validation as the main of two ranks sees it; the other one does its part meanwhile, until ``stop``."""

    def work():
        do_part(validation, 1, network, stop=stop)

    return replace(validation, ranks=WithOthers(0, 2, 0, 2, "gloo", other=work))


def test_two_ranks_predict_and_judge_what_one_does(validation, network, tmp_path):
    alone = replace(validation, folder=tmp_path / "alone")
    expected = alone.run(network, (0,), "digest", StopRequest())
    main = as_main(validation, network)
    summary = main.run(network, (0,), "digest", StopRequest())
    assert summary.foreground_mean == expected.foreground_mean
    assert set(predicted(main)) == set(predicted(alone)) == {f"{case}.nii.gz" for case in CASES}
    assert predicted(main) == predicted(alone)
    assert {path.name for path in main.output.iterdir()} == {path.name for path in alone.output.iterdir()}
    assert record(main) == record(alone) == {"weights": "digest", "cases": list(CASES)}


def test_each_rank_predicts_its_own_cases(validation, network, package_log):
    do_part(validation, 0, network)
    first = set(predicted(validation))
    do_part(validation, 1, network)
    assert len(first) == 2 and len(predicted(validation)) == 4
    assert "(2/2)" in package_log.text
    sizes = {case: math.prod(validation.store.open(case).data.shape) for case in CASES}
    assert min(sizes.values()) >= math.prod(PATCH) and len(set(sizes.values())) == 3
    loads = [
        sum(sizes[name.removesuffix(".nii.gz")] for name in names)
        for names in (first, set(predicted(validation)) - first)
    ]
    assert max(loads) - min(loads) < max(sizes.values()) - min(sizes.values())


def test_what_a_rank_had_done_when_it_was_killed_is_not_done_again(validation, network, package_log):
    do_part(validation, 1, network)
    done = set(predicted(validation))
    assert not (validation.folder / "validation_done.json").exists()
    package_log.clear()
    validation.run(network, (0,), "digest", StopRequest())
    assert {case for case in CASES if f"validating {case}" in package_log.text} == {
        case for case in CASES if f"{case}.nii.gz" not in done
    }
    assert len(done) == 2 and record(validation)["cases"] == list(CASES)
    assert not list(validation.output.glob(".done_*"))


def test_other_weights_do_all_of_it_again(validation, network, package_log):
    do_part(validation, 1, network, weights="of other weights")
    package_log.clear()
    validation.run(network, (0,), "digest", StopRequest())
    assert all(f"validating {case}" in package_log.text for case in CASES)


def test_all_leave_when_one_is_stopped(validation, network):
    main = as_main(validation, network, stop=StopAfter(tiles=0))
    main = replace(main, ranks=replace(main.ranks, other_stopped=True))
    with pytest.raises(TrainingStopped, match="another process.*2 of 4 cases.*--val"):
        main.run(network, (0,), "digest", StopRequest())
    assert len(record(main)["cases"]) == 2 and not (main.output / "summary.json").exists()


def test_stopped_within_a_case_leaves_it_undone(validation, network):
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM in validation, 0 of 4 cases done"):
        validation.run(network, (0,), "digest", StopAfter(tiles=1))
    assert predicted(validation) == {}


def test_files_of_other_machines_are_waited_for(validation, network, monkeypatch):
    main = as_main(validation, network)
    there, not_seen_yet = validation.output / "case_03.nii.gz", validation.output / "not_seen_yet"

    def work():
        do_part(validation, 1, network)
        there.rename(not_seen_yet)

    monkeypatch.setattr("nnssl_adapt.training.validation.time.sleep", lambda seconds: not_seen_yet.rename(there))
    main = replace(main, ranks=replace(main.ranks, local_size=1, other=work))
    assert len(main.run(network, (0,), "digest", StopRequest()).cases) == 4
    assert there.is_file() and record(main)["cases"] == list(CASES)


def test_one_case_is_exported_while_the_next_is_predicted(validation, network, monkeypatch):
    threads, events = set(), []
    write, tiles = validation_module.write_labels, validation_module.logits_by_tiles

    def writing(path, *arguments):
        threads.add(threading.current_thread())
        assert next_began.wait(60) or path.name.startswith(CASES[-1])
        write(path, *arguments)

    def predicting(*arguments, **options):
        events.append("network")
        if len(events) == 2:
            next_began.set()
        return tiles(*arguments, **options)

    next_began = threading.Event()
    monkeypatch.setattr(validation_module, "write_labels", writing)
    monkeypatch.setattr(validation_module, "logits_by_tiles", predicting)
    assert len(validation.run(network, (), "digest", StopRequest()).cases) == 4
    assert threading.main_thread() not in threads


def test_cases_are_predicted_in_the_precision_of_training_and_in_float32_where_it_overflows(
    validation, network, monkeypatch, caplog
):
    tried = []
    exact = replace(validation, folder=validation.folder / "exact").run(network, (), "digest", StopRequest())
    original = validation_module.logits_by_tiles

    def overflowing(*arguments, device, autocast_dtype, **options):
        tried.append(autocast_dtype)
        if autocast_dtype is not None:
            raise PredictionError("the network's output is NaN or infinite")
        return original(*arguments, device="cpu", autocast_dtype=None, **options)

    monkeypatch.setattr(validation_module, "logits_by_tiles", overflowing)
    of_gpu = replace(validation, device=torch.device("cuda"), autocast_dtype=torch.bfloat16)
    summary = of_gpu.run(network, (), "digest", StopRequest())
    assert tried == [torch.bfloat16, None] * len(CASES)
    assert caplog.text.count("again in float32") == len(CASES)
    assert summary.foreground_mean == exact.foreground_mean


def test_too_little_memory_in_validation_is_not_blamed_on_the_training_batch(plan):
    with pytest.raises(TrainingError, match="--val") as caught, explained_validation_memory(plan, torch.device("cuda")):
        raise torch.OutOfMemoryError("no memory")
    assert "weights are saved" in str(caught.value) and "batch" not in str(caught.value)
