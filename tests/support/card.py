"""What tests of a GPU build with. It needs no image library, so that they run on a machine with little installed."""

import contextlib
import os

import torch

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.inference.convolutions import exact_float32
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.optimise.adapters import add_adapters
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.loss_choice import choose_loss
from nnssl_adapt.training.optimise.network_options import to_device, training_forward
from nnssl_adapt.training.optimise.optimizer import build_optimizer
from nnssl_adapt.training.optimise.schedule import prepare_epoch
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import TrainingState
from nnssl_adapt.weights.network.architectures import Architecture, build_network

PATCH = (8, 8, 16) if os.environ.get("NNSSL_ADAPT_REHEARSE_CUDA") == "1" else (16, 24, 32)
LABELS = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "c": 3}})
RESENC = Architecture.named(
    "ResEncL",
    n_stages=3,
    features_per_stage=[6, 8, 12],
    kernel_sizes=[[3, 3, 3]] * 3,
    strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    n_blocks_per_stage=[1, 1, 1],
    n_conv_per_stage_decoder=[1, 1],
)
PRIMUS = Architecture.named("PrimusS", embed_dim=72, eva_depth=2, eva_numheads=3, drop_path_rate=0.0)


def recipe_of(**fields):
    """Constant learning rate from the first step."""
    return Recipe(
        **{
            "learning_rate": 0.02,
            "warmup_epochs": 0,
            "momentum": 0.9,
            "compile": "off",
            "channels_last": False,
            "fused_norm": "off",
            **fields,
        }
    )


def network_of(architecture=RESENC):
    """The same each time; on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(architecture, 1, LABELS.num_heads, PATCH)


def batch_of(samples=2, seed=0):
    """Something to be learnt: brighter voxels have higher labels. On the CPU."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(samples, 1, *PATCH, generator=random)
    return {"image": image, "target": (image * 1.3 + 1).clamp(0, 3).to(torch.int16)}


class Training:
    """A training without files: ``step`` takes steps on given batches.

    Attributes:
        state: as the trainer has it.
    """

    def __init__(self, device, recipe, architecture=RESENC, half=None, scaler=None, ranks=None, batch_size=2):
        self.device, self.recipe = device, recipe
        network = network_of(architecture)
        add_adapters(network, recipe)
        network = to_device(network, recipe, device).train()
        average = None if recipe.ema_decay is None else WeightAverage(network, recipe.ema_decay)
        self.state = TrainingState(network, build_optimizer(network, recipe, device), scaler, average)
        prepare_epoch(network, self.state.optimizer, 0, recipe)
        more = {} if ranks is None else {"ranks": ranks}
        sums = {} if ranks is None else {"reduce": ranks.sum}
        self.loop = TrainingLoop(
            recipe, choose_loss(recipe, LABELS, False, **sums), LABELS, batch_size, device, half, **more
        )
        wrapped = network if ranks is None else ranks.wrap(network, find_unused=False)
        self.forward = training_forward(wrapped, recipe, device)

    def step(self, *batches):
        """A step on each batch; the losses so far."""
        for batch in batches:
            self.loop.step(self.state, [batch], self.forward)
        self.loop.settle(self.state)
        return self.state.losses

    @torch.no_grad()
    def logits(self):
        """Of a batch that was not trained on, by the network as it is now; on the CPU."""
        network = self.state.network.eval()
        with exact_float32(self.device):
            found = network(batch_of(seed=99)["image"].to(self.device)).float().cpu()
        network.train()
        return found

    def weights(self):
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state.network.state_dict().items()}


def assert_close(found, expected, **tolerances):
    """Two sets of weights by name."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@contextlib.contextmanager
def memory_limited_to(size, device):
    """The card seems to have room for no more than so many bytes beside what is in use; a CPU as ever."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    limit = min(1.0, (torch.cuda.memory_reserved(device) + size) / total)
    torch.cuda.set_per_process_memory_fraction(limit)  # of the present card; it refuses a device without a number
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
