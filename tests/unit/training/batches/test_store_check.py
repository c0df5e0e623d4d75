"""Damage in the preprocessed cases is told by the case's name, not by a traceback."""

import threading
import time

import pytest
from support.training_runs import trainer_of

from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import CaseError
from nnssl_adapt.training.batches import store_check
from nnssl_adapt.training.batches.store_check import explained_damage, store_compared

CASES = ["case_00", "case_01", "case_02"]


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_changed_bytes_are_found_in_the_background(plan):
    store = CaseStore(plan.store_folder)
    with store_compared(store, CASES) as watch:
        watch()
    change_a_byte(plan.store_folder / "case_01_seg.b2nd")
    with pytest.raises(CaseError) as error, store_compared(store, CASES) as watch:
        for _ in range(1000):
            watch()
            time.sleep(0.01)
    assert "case_01" in str(error.value) and "case_00" not in str(error.value) and "--check" in str(error.value)
    with store_compared(store, ["case_00", "case_02"]) as watch:
        watch()


def test_large_stores_are_left_out_and_say_so(plan, package_log):
    change_a_byte(plan.store_folder / "case_01.b2nd")
    with store_compared(CaseStore(plan.store_folder), CASES, most_bytes=1000) as watch:
        watch()
    assert "--check" in package_log.text


def test_the_end_of_a_run_does_not_wait_for_it(plan, monkeypatch):
    store, begun = CaseStore(plan.store_folder), threading.Event()
    looked_at = []

    def slow(self, case, **how):
        looked_at.append(case)
        begun.set()
        ended.wait(10)
        return True

    ended = threading.Event()
    monkeypatch.setattr(CaseStore, "is_complete", slow)
    with store_compared(store, CASES):
        begun.wait(10)
        threading.Timer(0.2, ended.set).start()
    assert looked_at == ["case_00"]


def test_a_training_ends_when_it_learns_of_it(plan, recipe, monkeypatch):
    trainer = trainer_of(plan, recipe)
    change_a_byte(plan.store_folder / "case_00.pkl")
    monkeypatch.setattr(store_check, "MOST_BYTES", 2**40)
    with pytest.raises(CaseError, match="case_00"):
        trainer.run()
    assert not (trainer.folder.path / "checkpoint_final.pth").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_is_cut_short_while_it_is_used(plan, recipe, monkeypatch, workers):
    trainer = trainer_of(plan, recipe, workers=workers)
    for case in trainer.training_cases:
        path = plan.store_folder / f"{case}.b2nd"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CaseError) as error:
        trainer.run()
    assert "--check" in str(error.value) and "case_" in str(error.value)


def test_blosc2s_errors_name_the_case(plan):
    case = CaseStore(plan.store_folder).open("case_02")
    with pytest.raises(CaseError, match="case_02") as error, explained_damage(case):
        raise RuntimeError("Error while getting slice")
    assert error.value.path == plan.store_folder / "case_02.b2nd"
