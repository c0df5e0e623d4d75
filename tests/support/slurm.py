"""A real Slurm with two nodes on this machine: its daemons in a temporary folder, on ports of their own.

Needs slurmctld, slurmd, munged and the client commands (Debian: ``apt-get install slurmctld slurmd slurm-client munge``), and
root, since slurmd starts jobs. There is no accounting database, so no ``sacct``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATIENCE = 240.0  # seconds that anything is waited for at most: on a busy machine Python alone starts in half a minute


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"needs Slurm: {', '.join(missing)} not installed"
    return None if os.geteuid() == 0 else "needs root, as slurmd does"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def eventually(
    condition: Callable[[], object], what: str | Callable[[], str] = "", patience: float = PATIENCE
) -> object:
    """Wait until ``condition()`` is true and return what it gave; ``what`` is said when that takes too long."""
    until = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < until, f"waited in vain {what() if callable(what) else what}"
        time.sleep(0.1)
    return value


@dataclass
class Slurm:
    """The cluster: partitions ``low`` (preemptible) and ``high``, nodes n1 and n2 with 8 cores and 4 GPUs in name."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The tests' own, with what Slurm's commands need."""
        path = f"{os.environ['PATH']}:/usr/sbin"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def run(self, *words: str, check: bool = True, **environment: str) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            words, env={**self.environment, **environment}, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str | Path, *flags: str, **environment: str) -> str:
        """The number of a job that was submitted."""
        return self.run("sbatch", "--parsable", *flags, str(script), **environment).split(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job (``scontrol show job``); empty when it has forgotten it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job, check=False)))

    def state(self, job: str) -> str:
        return self.facts(job).get("JobState", "")

    def seconds_left(self, job: str) -> float:
        """Of a running job's time; endless for one that does not run."""
        facts = self.facts(job)
        if facts.get("JobState") != "RUNNING":
            return float("inf")
        return (datetime.fromisoformat(facts["EndTime"]) - datetime.now()).total_seconds()

    def wait_for(self, job: str, *states: str, patience: float = PATIENCE) -> str:
        """Until a job is in one of these states; a job that was queued again is made to start at once."""

        def reached() -> str:
            self.hurry()
            state = self.state(job)
            return state if state in states else ""

        return str(eventually(reached, f"for job {job} to be {' or '.join(states)}", patience))

    def hurry(self) -> None:
        """Start jobs soon that were queued again, and would wait for two minutes.

        Not at once: a node refuses a job that it has killed within the same second.
        """
        for line in self.run("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i %r", check=False).splitlines():
            job, _, reason = line.partition(" ")
            if reason != "BeginTime" or (start := self.facts(job).get("EligibleTime", "")) in ("", "Unknown"):
                continue
            if (datetime.fromisoformat(start) - datetime.now()).total_seconds() > 10:
                self.run("scontrol", "update", f"jobid={job}", "starttime=now+4", check=False)

    def clear(self) -> None:
        """No jobs, and both nodes in service."""
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        eventually(lambda: not self.run("squeue", "-h", check=False), "for the jobs to end")
        for node in ("n1", "n2"):
            if self.node_state(node) != "IDLE":
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        eventually(lambda: {self.node_state(node) for node in ("n1", "n2")} == {"IDLE"}, "for two idle nodes")

    def node_state(self, node: str) -> str:
        return re.findall(r"State=(\S+)", self.run("scontrol", "show", "node", node))[0]

    def kill_node(self, node: str) -> None:
        """What a power failure does: all that runs there is gone, and nobody answers."""
        daemon = self.nodes[node]
        daemon.kill()
        daemon.wait()
        for job in self.run("squeue", "-h", "-w", node, "-o", "%A", check=False).split():
            for pid in self._started_by(job):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def _started_by(self, job: str) -> list[int]:
        """Processes of a job, by their environment, and its slurmstepds, by their names."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                of_job = f"SLURM_JOB_ID={job}".encode() in variables
                of_job |= f"slurmstepd: [{job}.".encode() in (process / "cmdline").read_bytes()
                if of_job and f"SLURM_CONF={self.folder}/slurm.conf".encode() in variables:
                    found.append(int(process.name))
        return found

    def start_node(self, node: str) -> None:
        """Its daemon, of a new node or of one that was killed."""
        command = [_program("slurmd"), "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        self.nodes[node] = self._start(command, f"slurmd_{node}")

    def _start(self, command: list[str | None], name: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "log" / f"{name}_daemon.txt").open("ab")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)  # type: ignore[arg-type]
        self.processes.append(process)
        return process


@contextmanager
def real_slurm(folder: Path) -> Iterator[Slurm]:
    """Start it, and end it with everything that it started."""
    for part in ("state", "spool", "munge", "log"):
        (folder / part).mkdir()
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    for gpu in range(4):
        (folder / f"gpu{gpu}").touch()
    ports = _free_ports(3)
    (folder / "slurm.conf").write_text(_configuration(folder, *ports))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-3]\n")
    slurm = Slurm(folder)
    conf = str(folder / "slurm.conf")
    munged = [_program("munged"), "--foreground", "--force", f"--socket={folder}/munge/socket"]
    munged += [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    try:
        slurm._start(munged, "munged")
        eventually((folder / "munge" / "socket").exists, "for munged")
        slurm._start([_program("slurmctld"), "-D", "-c", "-f", conf], "slurmctld")
        for node in ("n1", "n2"):
            slurm.start_node(node)
        eventually(lambda: slurm.run("sinfo", "-h", "-o", "%T", check=False) == "idle", "for two idle nodes")
        yield slurm
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            slurm.clear()
        for process in reversed(slurm.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(slurm.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _configuration(folder: Path, control: int, first: int, second: int) -> str:
    host = socket.gethostname()
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN"
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.txt
SlurmdLogFile={folder}/log/slurmd.%n.txt
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
OverTimeLimit=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 Port={first} {node}
NodeName=n2 Port={second} {node}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""
