"""Copying onto a disk that others fill, too."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.machine import copying
from nnssl_adapt.machine.copying import Order, Stage, carry_out


@pytest.fixture
def order(tmp_path):
    """Three files of 10, 20 and 30 bytes."""
    for size in (10, 20, 30):
        (tmp_path / f"file_{size}").write_bytes(bytes(range(size)))
    groups = tuple(((str(tmp_path / f"file_{size}"), None),) for size in (10, 20, 30))
    (tmp_path / "disk").mkdir()
    return Order(str(tmp_path / "disk" / "copies"), groups, spare=100)


def done(order, seen=lambda folder: None):
    """What is told when the order is carried out; ``seen`` looks at the copies before they vanish."""
    told, over = [], threading.Event()

    def tell(message):
        told.append(message)
        if "ended" in message:
            seen(Path(order.folder))
            over.set()

    carry_out(order, tell, over)
    assert not Path(order.folder).exists()
    return told


def test_an_order_survives_its_journey_as_text(order):
    assert Order.from_json(order.to_json()) == order


def test_as_much_as_fits_is_copied_and_some_of_the_disk_is_left(order, monkeypatch):
    def usage(path):  # of a disk of 135 bytes
        return SimpleNamespace(free=135 - sum(p.stat().st_size for p in Path(path).glob("**/file_*")))

    names = []
    monkeypatch.setattr(copying.shutil, "disk_usage", usage)
    begins, ended = done(order, lambda folder: names.extend(sorted(path.name for path in folder.glob("f*"))))
    assert begins["begins"] == {"groups": 3, "bytes": 60, "free": 135}
    assert ended["ended"]["groups"] == 2 and ended["ended"]["reason"] == "full"
    assert names == ["file_10", "file_20"]


def test_a_disk_that_is_full_although_it_said_otherwise(order, monkeypatch):
    def full(*arguments):
        raise OSError(copying.errno.EDQUOT, "over quota")

    monkeypatch.setattr(copying, "_copy", full)
    _, ended = done(order)
    assert ended["ended"]["groups"] == 0 and ended["ended"]["reason"] == "full"


def test_a_copy_that_reads_differently_is_not_used(order, monkeypatch):
    monkeypatch.setattr(copying, "_crc_of", lambda path: 1)
    names = []
    _, ended = done(order, lambda folder: names.extend(path.name for path in folder.glob("*file*")))
    assert "reads differently" in ended["ended"]["reason"] and not names


def test_what_stage_means():
    environment = {"SLURM_TMPDIR": "/local/job_1"}
    assert Stage.of(None, {}) is None
    assert Stage.of("none", environment) is None
    assert Stage.of(None, environment) == Stage(Path("/local/job_1"), whole=True)
    assert Stage.of("/scratch", environment) == Stage(Path("/scratch"))
    for wrong in ("scratch", "$NO_SUCH_VARIABLE/x"):
        with pytest.raises(ConfigurationError, match="--stage"):
            Stage.of(wrong, environment)
