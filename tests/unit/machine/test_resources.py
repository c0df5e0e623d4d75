"""How many workers a job may have: from folders and variables that look like a scheduler's."""

import logging

import pytest

from nnssl_adapt.machine import resources
from nnssl_adapt.machine.resources import (
    Resources,
    cgroup_cores,
    default_data_workers,
    memory_kills,
    why_a_worker_died,
)

GB = 1 << 30


def written(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_quotas_of_version_2(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/slurm/job_7/step_0\n")
    root = tmp_path / "fs"
    written(root / "slurm/job_7/step_0", cpu__max="max 100000\n")
    assert cgroup_cores(root, membership) is None
    written(root / "slurm/job_7", cpu__max="650000 100000\n")
    written(root / "slurm", cpu__max="3200000 100000\n")
    assert cgroup_cores(root, membership) == 6.5


def test_quotas_of_version_1(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n3:cpuset:/\n")
    root = tmp_path / "fs"
    written(root / "cpu,cpuacct/job", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cgroup_cores(root, membership) is None
    written(root / "cpu,cpuacct/job", cpu__cfs_quota_us="400000\n")
    written(root / "memory/job", cpu__cfs_quota_us="1\n", cpu__cfs_period_us="100000\n")
    assert cgroup_cores(root, membership) == 4
    assert cgroup_cores(root, tmp_path / "nothing") is None


def cores(monkeypatch, environment, ranks=1, affinity=64, quota=None):
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(resources, "cgroup_cores", lambda: quota)
    return resources._cores(environment, ranks)


def test_the_least_of_affinity_quota_and_slurm(monkeypatch):
    assert cores(monkeypatch, {}) == 64
    assert cores(monkeypatch, {}, quota=6.5) == 6
    assert cores(monkeypatch, {}, quota=0.5) == 1
    assert cores(monkeypatch, {}, affinity=4, quota=6.5) == 4
    assert cores(monkeypatch, {"SLURM_CPUS_PER_TASK": "12"}) == 12
    assert cores(monkeypatch, {"SLURM_CPUS_ON_NODE": "8"}) == 8
    assert cores(monkeypatch, {"SLURM_CPUS_PER_TASK": "", "SLURM_CPUS_ON_NODE": "nonsense"}) == 64


def test_ranks_share_what_is_theirs_together(monkeypatch):
    assert cores(monkeypatch, {}, ranks=4) == 16
    assert cores(monkeypatch, {}, ranks=4, quota=18) == 4
    # torchrun: one task of 32 cores started four ranks. srun: four tasks of 8 cores each.
    assert cores(monkeypatch, {"SLURM_CPUS_PER_TASK": "32", "SLURM_TASKS_PER_NODE": "1(x2)"}, ranks=4) == 8
    tasks = {"SLURM_CPUS_PER_TASK": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_ON_NODE": "32"}
    assert cores(monkeypatch, tasks, ranks=4) == 8
    assert cores(monkeypatch, tasks, ranks=4, affinity=8) == 8  # bound to its own


@pytest.mark.parametrize(
    "have, device, batch, expected",
    [
        (Resources(64, None, None), "cuda", 0, 12),
        (Resources(8, None, None), "cuda", 0, 7),
        (Resources(1, None, None), "cuda", 0, 1),
        (Resources(2, None, None), "cpu", 0, 0),
        (Resources(3, None, None), "cpu", 0, 2),
        (Resources(64, 4 * GB, None), "cuda", 0, 6),
        (Resources(64, 8 * GB, None), "cuda", GB // 4, 2),
        (Resources(64, 64 * GB, 64 << 20), "cuda", 50 << 20, 0),
        (Resources(64, 64 * GB, 2 * GB), "cuda", 100 << 20, 5),
    ],
)
def test_workers(have, device, batch, expected):
    assert have.workers(device, batch) == expected


def test_the_users_word_wins(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "37")
    assert default_data_workers("cpu") == default_data_workers("cuda", 4, 1 << 40) == 37
    monkeypatch.setenv("nnUNet_n_proc_DA", "many")
    monkeypatch.setattr(Resources, "here", classmethod(lambda cls, ranks: cls(8 // ranks, None, None)))
    assert default_data_workers("cuda", ranks_on_machine=2) == 3


def test_kills_are_counted(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job\n")
    root = tmp_path / "fs"
    assert memory_kills(root, membership) == 0
    written(root / "job", memory__events="low 0\nhigh 0\nmax 4\noom 2\noom_kill 5\n")
    assert memory_kills(root, membership) == 5
    membership.write_text("7:memory:/job\n")
    written(root / "memory/job", memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert memory_kills(root, membership) == 2


def test_why_a_worker_died(monkeypatch):
    monkeypatch.setattr(resources, "memory_kills", lambda: 4)
    monkeypatch.setattr(resources, "_shared_memory", lambda: 64_000_000)
    killed = "DataLoader worker (pid 7) is killed by signal: Killed."
    assert "killed for memory: the job's limit was reached (1 time(s)" in why_a_worker_died(killed, 3)
    assert "most likely the system for want of memory" in why_a_worker_died(killed, 4)
    bus = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    )
    assert why_a_worker_died(bus, 3).startswith("shared memory is full (/dev/shm has")
    assert "the usual cause" in why_a_worker_died("DataLoader worker (pid(s) 7) exited unexpectedly", 4)


def test_too_little_shared_memory_for_workers_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert Resources(cores=8, memory=None, shared_memory=64 << 20).workers("cuda", batch_bytes=100 << 20) == 0
    assert "/dev/shm has 64.0 MiB free" in caplog.text and "no data worker instead of 7" in caplog.text
    caplog.clear()
    assert Resources(cores=8, memory=None, shared_memory=64 << 30).workers("cuda", batch_bytes=100 << 20) == 7
    assert not caplog.text
