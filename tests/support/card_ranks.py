"""One of two processes that train on the same card: ``python card_ranks.py RANK MEETING RESULT DEVICE``."""

import sys
from pathlib import Path

import torch
from torch import distributed

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # the package and the tests

from support.card import Training, batch_of, recipe_of  # noqa: E402

from nnssl_adapt.training.launch.distributed import Ranks  # noqa: E402

STEPS = 3


def main(rank, meeting, result, device):
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank, 2, "gloo")
    training = Training(torch.device(device), recipe_of(batch_dice=True), ranks=ranks, batch_size=4)
    part = ranks.samples(4)
    for seed in range(STEPS):
        batch = batch_of(4, seed)
        training.step({key: value[part.start : part.stop] for key, value in batch.items()})
    torch.save({"weights": training.weights(), "losses": training.state.losses}, f"{result}{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
