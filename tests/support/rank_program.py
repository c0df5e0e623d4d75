"""What each of several processes does in the tests: ``python rank_program.py FOLDER WHAT``; it leaves its results in FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package, where it is not installed

from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError, TrainingStopped
from nnssl_adapt.training.launch.distributed import distributed
from nnssl_adapt.training.launch.launch import end_with_launcher, note_error

BATCH, STEPS = 5, 4


class Net(nn.Module):
    """A tiny network with three heads: one for the loss, one for an output without a part in it, one for nothing."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU())
        self.decoder = nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Conv3d(4, 3, 1)
        self.other_head = nn.Conv3d(4, 3, 1)
        self.unused_head = nn.Conv3d(4, 3, 1)

    def forward(self, image):
        features = functional.leaky_relu(self.decoder(self.encoder(image)))
        return [self.head(features), self.other_head(features)]


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(BATCH, 2, 6, 7, 8, generator=generator)
    return image, torch.randint(0, 3, (BATCH, 6, 7, 8), generator=generator)


def loss_of(logits, labels, ranks):
    """Cross-entropy, and Dice over the batch of all ranks."""
    probabilities = logits.softmax(1)[:, 1:]
    truth = functional.one_hot(labels, 3).movedim(-1, 1)[:, 1:]
    shared, both = (ranks.sum(x.sum((0, 2, 3, 4))) for x in (probabilities * truth, probabilities + truth))
    return functional.cross_entropy(logits, labels) - (2 * shared / (both + 1e-5)).mean()


def train(ranks, first=0, state=None, halfway=None):
    """Losses, and the state after the last step. The first two steps leave the encoder alone; all take two micro-batches.

    ``state``: what to go on from at step ``first``; ``halfway``: where to leave it after three steps.
    """
    network = Net(seed=3 + ranks.rank)  # unlike on each rank: the main one's weights are to count
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    samples, losses = list(ranks.samples(BATCH)), []
    for step in range(first, STEPS):
        if step in (first, 2):
            for parameter in network.encoder.parameters():
                parameter.requires_grad_(step >= 2)
            forward = ranks.wrap(network)
        optimizer.zero_grad()
        for part in range(2):
            image, labels = batch_of(2 * step + part)
            loss = loss_of(forward(image[samples])[0], labels[samples], ranks) * (len(samples) * ranks.size / BATCH / 2)
            loss.backward()
            losses.append(float(ranks.sum(loss.detach()) / ranks.size))
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if halfway is not None and step == 2:
            torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, halfway)
    return {"losses": losses, "network": network.state_dict()}


def talk(ranks):
    """What the ranks say to each other."""
    own = (
        torch.tensor([1.0, -2.0], requires_grad=True) if ranks.is_main else torch.tensor([4.0, 3.0], requires_grad=True)
    )
    total = ranks.sum(own * (ranks.rank + 1))  # main: 1, -2; other: 8, 6
    ((ranks.rank + 2) * total**2).sum().backward()
    ranks.barrier()
    return {
        "total": total.tolist(),
        "gradient": own.grad.tolist(),
        "counts": ranks.sum(torch.tensor([[1, ranks.rank], [2, 5]]).T).tolist(),
        "any": [ranks.any(False), ranks.any(ranks.rank == 1), ranks.any(ranks.is_main)],
        "from_main": ranks.from_main({"of": ranks.rank}),
        "ranks": [ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, ranks.device("cpu")],
    }


def learn(ranks, folder):
    halfway = folder / f"halfway_{ranks.rank}.pt"
    result = {"talk": talk(ranks), "trained": train(ranks, halfway=halfway)}
    result["resumed"] = train(ranks, first=3, state=torch.load(halfway))
    torch.save(result, folder / f"rank_{ranks.rank}.pt")


def wait_for_stop(ranks, folder):
    """Until any rank is asked to stop."""
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    (folder / f"ready_{ranks.rank}").write_text(str(os.getpid()))
    while not ranks.any(bool(asked)):
        time.sleep(0.02)
    (folder / f"stopped_{ranks.rank}").write_text(" ".join(signal.Signals(number).name for number in asked))
    raise TrainingStopped("stopped as asked")


def fail(ranks, folder):
    if ranks.rank == 1:
        raise ConfigurationError("only this one knows why")
    ranks.barrier()


def fail_alike(ranks, folder):
    raise ConfigurationError("all know why")


def die(ranks, folder):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        ranks.sum(torch.zeros(3))


def hang(ranks, folder):
    """The main one is busy with something that knows nothing of the others, and lets nobody interrupt it."""
    (folder / f"pid_{ranks.rank}").write_text(str(os.getpid()))
    if ranks.rank == 1:
        sys.stdout.write("last words")
        sys.stdout.flush()
        os._exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def main():
    folder, what = Path(sys.argv[1]), sys.argv[2]
    end_with_launcher()
    try:
        with distributed("cpu") as ranks:
            globals()[what](ranks, folder)
    except NnsslAdaptError as error:
        note_error(error)
        sys.stderr.write(f"error: {error}\n")
        return 75 if isinstance(error, TrainingStopped) else 1
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
