from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnssl_adapt.errors import CaseError, OutputError, PreprocessingError
from nnssl_adapt.machine.workers import over_cases

HELPERS = """
import os, signal, sys, time
from nnssl_adapt.errors import CaseError, OutputError

def work(number):
    if number == 3:
        raise CaseError("three is bad")
    if number == 4:
        raise MemoryError
    return number * number

def fill_the_disk(number):
    raise OutputError("disk full")

def be_killed(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)

def sleep_long(folder):
    with open(os.path.join(folder, str(os.getpid())), "w"):
        pass
    time.sleep(60)

if __name__ == "__main__":
    from nnssl_adapt.machine.workers import over_cases
    list(over_cases(sleep_long, [("a", (sys.argv[1],)), ("b", (sys.argv[1],))], workers=2))
"""


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that worker processes can import."""
    (tmp_path / "over_cases_helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("over_cases_helpers", None)
    import over_cases_helpers

    return over_cases_helpers


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_case_does_not_stop_the_others(helpers, workers: int) -> None:
    tasks = [(f"case {n}", (n,)) for n in range(6)]
    outcomes = {o.identifier: o for o in over_cases(helpers.work, tasks, workers)}
    assert {name for name, o in outcomes.items() if o.error is None} == {"case 0", "case 1", "case 2", "case 5"}
    assert outcomes["case 5"].value == 25
    assert isinstance(outcomes["case 3"].error, CaseError) and outcomes["case 3"].complaint == "three is bad"
    assert "not enough memory" in outcomes["case 4"].complaint


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_to_do(helpers, workers: int) -> None:
    assert list(over_cases(helpers.work, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_can_not_be_written_stops_everything(helpers, workers: int) -> None:
    with pytest.raises(OutputError, match="disk full"):
        list(over_cases(helpers.fill_the_disk, [("a", (1,)), ("b", (2,)), ("c", (3,))], workers))


def test_a_killed_worker_is_blamed_on_memory(helpers) -> None:
    with pytest.raises(PreprocessingError, match=r"killed.*case 1.*memory.*fewer than 2 workers"):
        list(over_cases(helpers.be_killed, [(f"case {n}", (n,)) for n in range(4)], 2))


def test_the_progress_bar_names_cases(helpers, capsys: pytest.CaptureFixture[str]) -> None:
    list(over_cases(helpers.work, [("case 1", (1,)), ("case 3", (3,))], 1, "Doing", progress=True))
    shown = capsys.readouterr().err
    assert "Doing" in shown and "2/2" in shown and "case 3 FAILED" in shown
    list(over_cases(helpers.work, [("case 1", (1,))], 1, "Doing"))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(helpers, tmp_path: Path, kind: signal.Signals) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    path = os.pathsep.join([str(Path(__file__).parents[3]), str(tmp_path)])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "over_cases_helpers.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = wait_until(lambda: [int(p.name) for p in folder.iterdir()] if len(list(folder.iterdir())) == 2 else None)
    if kind == signal.SIGINT:
        os.killpg(parent.pid, kind)  # as a terminal does on Ctrl-C: to the workers as well
    else:
        parent.send_signal(kind)
    _, errors = parent.communicate(timeout=20)
    wait_until(lambda: not any(alive(pid) for pid in workers))
    assert "SpawnProcess" not in errors  # the workers have nothing to say


def wait_until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    if Path("/proc").is_dir():  # a zombie that nobody has collected yet is dead
        try:
            return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
