"""How much memory may be used: the machine's and the job's limits, in the files that Linux shows them in."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnssl_adapt.machine import memory


def write(folder: Path, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_machines_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemAvailable:    700 kB\n")
    assert memory._machine_memory(tmp_path / "meminfo") == 700 * 1024
    assert memory._machine_memory(tmp_path / "missing") is None


def test_the_tightest_group_of_version_2_counts(tmp_path):
    (tmp_path / "membership").write_text("0::/slurm/job_7/step\n")
    write(tmp_path / "slurm" / "job_7", memory__max=5000, memory__current=3000, memory__stat="anon 1\nfile 1000")
    write(tmp_path / "slurm" / "job_7" / "step", memory__max="max", memory__current=3000)
    write(tmp_path / "slurm", memory__max=9000, memory__current=3000)
    assert memory._cgroup_memory(tmp_path, tmp_path / "membership") == 3000


def test_groups_of_version_1(tmp_path):
    (tmp_path / "membership").write_text("5:cpu:/other\n4:memory:/slurm/uid_1/job_7\n")
    folder = tmp_path / "memory" / "slurm" / "uid_1" / "job_7"
    write(folder, memory__limit_in_bytes=8000, memory__usage_in_bytes=2000)
    write(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=2000)
    assert memory._cgroup_memory(tmp_path, tmp_path / "membership") == 6000


def test_without_limits(tmp_path):
    (tmp_path / "membership").write_text("0::/\n")
    assert memory._cgroup_memory(tmp_path, tmp_path / "membership") is None
    assert memory._cgroup_memory(tmp_path, tmp_path / "missing") is None


def test_the_least_is_available(monkeypatch):
    monkeypatch.setattr(memory, "_machine_memory", lambda: 10)
    monkeypatch.setattr(memory, "_cgroup_memory", lambda: 7)
    assert memory.available_memory() == 7
    monkeypatch.setattr(memory, "_cgroup_memory", lambda: None)
    assert memory.available_memory() == 10


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def use_and_free() -> tuple[int, int]:
    """Resident bytes after an array was freed, above the start: kept for the next, and given back."""
    if not memory.reuse_freed_memory():
        return -1, -1
    start = resident()
    array = np.ones(200 << 17)  # 200 MB
    del array
    kept = resident() - start
    memory.give_back_freed_memory()
    return kept, resident() - start


def test_freed_memory_is_kept_for_the_next_array_until_it_is_given_back():
    """In a process of its own, whose allocator it changes."""
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import test_memory; print(*test_memory.use_and_free())"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, after = map(int, answer.stdout.split())
    if kept == -1:
        pytest.skip("another C library than glibc")
    assert kept > 150 << 20 and after < 50 << 20
