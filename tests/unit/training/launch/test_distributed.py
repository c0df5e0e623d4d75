"""Two processes on the CPU learn what one does from the combined batch."""

import sys
from pathlib import Path

import pytest
import torch
from support import rank_program
from torch import nn

from nnssl_adapt.errors import ConfigurationError, DeviceUnavailable, OtherRankFailed
from nnssl_adapt.training.launch.distributed import Ranks, distributed, explained_loss_of_ranks, ranks_in
from nnssl_adapt.training.launch.launch import run_ranks

PROGRAM = (sys.executable, str(Path(rank_program.__file__)))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks([str(folder), "learn"], 2, "cpu", PROGRAM) == 0
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def test_they_talk(two_ranks):
    main, other = (found["talk"] for found in two_ranks)
    assert main.pop("ranks") == [0, 2, 0, 2, "cpu"]
    assert other.pop("ranks") == [1, 2, 1, 2, "cpu"]
    # total = main * 1 + other * 2; of 2 total² on the main rank and 3 total² on the other the gradient is 10 total.
    assert main.pop("gradient") == [10 * 9.0, 10 * 4.0]
    assert other.pop("gradient") == [2 * 10 * 9.0, 2 * 10 * 4.0]
    assert (
        main
        == other
        == {"total": [9.0, 4.0], "counts": [[2, 4], [1, 10]], "any": [False, True, True], "from_main": {"of": 0}}
    )


def test_their_losses_and_weights_are_those_of_one_process_with_the_combined_batch(two_ranks):
    # Five samples for two ranks, Dice over the batch, two micro-batches a step, heads without a part in the loss, and
    # weights that are frozen at first.
    alone = rank_program.train(Ranks())
    main, other = (found["trained"] for found in two_ranks)
    assert main["losses"] == other["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert len(set(alone["losses"])) == len(alone["losses"])
    start = rank_program.Net(seed=3).state_dict()
    for name, weight in alone["network"].items():
        assert torch.equal(main["network"][name], other["network"][name]), name
        torch.testing.assert_close(main["network"][name], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, start[name]) == name.startswith(("unused_head", "other_head", "encoder.0.bias")), (
            name
        )


def test_resumed_ranks_end_with_the_same_bits(two_ranks):
    for found in two_ranks:
        assert found["resumed"]["losses"] == found["trained"]["losses"][-2:]
        for name, weight in found["trained"]["network"].items():
            assert torch.equal(found["resumed"]["network"][name], weight), name


def test_alone_everything_is_a_no_op():
    ranks, network, tensor = Ranks(), nn.Conv3d(1, 1, 1), torch.tensor([2.0, 3.0])
    assert ranks.is_main
    assert ranks.wrap(network) is network
    assert ranks.sum(tensor) is tensor
    assert [ranks.any(True), ranks.any(False)] == [True, False]
    assert ranks.from_main("mine") == "mine"
    assert ranks.share_of(["b", "a"]) == ["b", "a"]
    assert list(ranks.samples(1)) == [0]
    assert [ranks.device(name) for name in ("cuda:1", "mps", "cpu")] == ["cuda:1", "mps", "cpu"]
    ranks.barrier()


def test_no_environment_means_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed("cpu") as ranks:
        assert ranks == Ranks()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("batch", "size", "shares"),
    [(2, 2, [[0], [1]]), (5, 2, [[0, 1, 2], [3, 4]]), (8, 3, [[0, 1, 2], [3, 4, 5], [6, 7]]), (3, 1, [[0, 1, 2]])],
)
def test_ranks_share_the_samples_of_a_batch(batch, size, shares):
    assert [list(Ranks(rank, size).samples(batch)) for rank in range(size)] == shares


def test_fewer_samples_than_ranks_is_an_error():
    with pytest.raises(ConfigurationError, match=r"batch of 2 .* 4 processes.*--batch 4"):
        Ranks(3, 4).samples(2)


def test_shares_are_alike_in_cost_and_keep_the_order():
    costs = {"a": 3, "b": 9, "c": 1, "d": 4, "e": 5}
    shares = [Ranks(rank, 2).share_of(list(costs), list(costs.values())) for rank in range(2)]
    assert shares == [["a", "b"], ["c", "d", "e"]]  # 12 and 10
    assert [Ranks(rank, 3).share_of("abcde") for rank in range(3)] == [["a", "d"], ["b", "e"], ["c"]]
    assert Ranks(2, 3).share_of(["a", "b"]) == []


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_what_torchrun_sets_is_understood():
    assert ranks_in(TORCHRUN) == Ranks(5, 8, 1, 4)
    assert ranks_in({**TORCHRUN, "LOCAL_WORLD_SIZE": ""}) == Ranks(5, 8, 1, 8)
    assert ranks_in({}) == ranks_in({"WORLD_SIZE": "1"}) == Ranks()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "8"}, "RANK below WORLD_SIZE, got RANK=8, WORLD_SIZE=8"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK=one"),
    ],
)
def test_half_an_environment_is_an_error(change, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        ranks_in({**TORCHRUN, **change})


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Ranks(rank, 4, rank % 2, 2).device("cuda") for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    with pytest.raises(DeviceUnavailable, match=r"rank 2 needs GPU 2.*2 processes"):
        Ranks(2, 3, 2, 3).device("cuda")
    with pytest.raises(ConfigurationError, match="cuda:1"):
        Ranks(1, 2, 1, 2).device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as srun --gpus-per-task=1 shows them
    assert Ranks(1, 2, 1, 2).device("cuda") == "cuda:0"


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]:55214",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_the_loss_of_another_rank_is_explained(text):
    with (
        pytest.raises(OtherRankFailed, match=r"rank 1 of 2 .*(closed by peer|timed out).*--c"),
        explained_loss_of_ranks(Ranks(1, 2)),
    ):
        raise RuntimeError(text)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"), explained_loss_of_ranks(Ranks(1, 2)):
        raise RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="closed by peer"), explained_loss_of_ranks(Ranks()):
        raise RuntimeError("Connection closed by peer")
