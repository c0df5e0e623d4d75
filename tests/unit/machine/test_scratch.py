"""Folders for half-written files: whose they are, and when they may be removed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nnssl_adapt.machine.scratch as module
from nnssl_adapt.machine.scratch import remove_abandoned, workplace


def test_every_one_is_another_and_vanishes(tmp_path: Path) -> None:
    with workplace(tmp_path / "new" / "unfinished") as one, workplace(tmp_path / "new" / "unfinished") as other:
        (one / "a").touch()
        assert one != other and not list(other.iterdir())
        remove_abandoned(one.parent)
        assert (one / "a").exists() and other.exists()
    assert not list((tmp_path / "new" / "unfinished").iterdir())
    remove_abandoned(tmp_path / "nowhere")


@pytest.mark.skipif(os.name == "nt", reason="asks for a process by its number")
def test_that_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    left = "from nnssl_adapt.machine.scratch import workplace; import os, pathlib; "
    left += f"held = workplace(pathlib.Path({str(tmp_path)!r})); (held.__enter__() / 'half.b2nd').touch(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", left], check=False).returncode == 9
    (tmp_path / "half.b2nd").touch()  # as earlier versions left it
    assert len(list(tmp_path.rglob("half.b2nd"))) == 2
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_that_of_another_machine_is_removed_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_machine", lambda: "node-17.cluster")
    held = workplace(tmp_path)
    place = held.__enter__()
    monkeypatch.setattr(module, "_machine", lambda: "node-18.cluster")
    remove_abandoned(tmp_path)
    assert place.is_dir()
    os.utime(place, (time.time() - 2 * 24 * 3600,) * 2)
    remove_abandoned(tmp_path)
    assert not place.exists()
