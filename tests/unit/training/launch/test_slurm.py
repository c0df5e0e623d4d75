"""Ranks by Slurm's variables."""

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.launch.distributed import Ranks, ranks_in
from nnssl_adapt.training.launch.slurm import first_host, slurm_ranks, tasks_per_node

TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS_PER_NODE": "",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
    "SLURM_JOB_ID": "1001",
    "SLURM_STEP_ID": "2",
}


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("2(x2)", [2, 2]), ("3,1", [3, 1]), ("4(x2),1", [4, 4, 1])])
def test_tasks_of_each_node(text, counts):
    assert tasks_per_node(text) == counts


def test_what_slurm_never_writes():
    with pytest.raises(ConfigurationError, match=r"SLURM_STEP_TASKS_PER_NODE=2x2"):
        tasks_per_node("2x2")


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[003-005,9],other1", "n003"),
        ("n[2,4]", "n2"),
        ("rack[1-2]n[04-09]", "rack1n04"),
        ("a[1-2].cluster.org,b", "a1.cluster.org"),
    ],
)
def test_the_first_host(names, first):
    assert first_host(names) == first


def test_a_task_is_a_rank():
    ranks = slurm_ranks(TASK)
    assert ranks_in(ranks) == Ranks(rank=3, size=4, local_rank=1, local_size=2)
    assert ranks["MASTER_ADDR"] == "gpu07" and 20000 <= int(ranks["MASTER_PORT"]) < 40000
    assert slurm_ranks({**TASK, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != ranks["MASTER_PORT"]
    assert slurm_ranks({**TASK, "SLURM_PROCID": "0"})["MASTER_PORT"] == ranks["MASTER_PORT"]


def test_nodes_with_unlike_numbers_of_tasks():
    ranks = slurm_ranks({**TASK, "SLURM_STEP_TASKS_PER_NODE": "3,1"})
    assert ranks["LOCAL_WORLD_SIZE"] == "1"


def test_what_is_set_stays():
    ranks = slurm_ranks({**TASK, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5"})
    assert (ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("127.0.0.1", "5")


def test_without_srun():
    with pytest.raises(ConfigurationError, match=r"SLURM_PROCID.*srun"):
        slurm_ranks({"SLURM_JOB_ID": "1"})
