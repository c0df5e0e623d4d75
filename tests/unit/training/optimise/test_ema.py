"""The running average of weights."""

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER

from nnssl_adapt.errors import TrainingError
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.weights.network.architectures import build_network


def network_of(architecture=CNN, seed=0):
    torch.manual_seed(seed)
    return build_network(architecture, 1, 3, PATCH)


def step(network, number):
    """Change every weight in a way that depends on the step."""
    with torch.no_grad():
        for index, weight in enumerate(network.parameters()):
            weight.add_(torch.sin(weight * 7 + number + 0.1 * index))


def test_the_average_is_what_the_formula_says():
    network = network_of()
    average = WeightAverage(network, decay=0.3)
    name = "decoder.stages.0.convs.0.conv.weight"
    expected = network.state_dict()[name].double()
    for number, decay in enumerate([2 / 11, 3 / 12, 0.3, 0.3]):  # (1 + n) / (10 + n), then the one asked for
        step(network, number)
        average.update(network)
        expected = decay * expected + (1 - decay) * network.state_dict()[name].double()
    torch.testing.assert_close(average.weights()[name].double(), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(average.weights()[name], network.state_dict()[name])


@pytest.mark.parametrize("architecture", [CNN, TRANSFORMER], ids=str)
def test_a_run_that_was_interrupted_averages_bit_for_bit_alike(architecture, tmp_path):
    network = network_of(architecture)
    average = WeightAverage(network, decay=0.9)
    for number in range(3):
        step(network, number)
        average.update(network)
    torch.save({"average": average.state_dict(), "weights": network.state_dict()}, tmp_path / "c.pth")
    for number in range(3, 6):
        step(network, number)
        average.update(network)

    content = torch.load(tmp_path / "c.pth", weights_only=True)
    network = network_of(architecture, seed=5)
    network.load_state_dict(content["weights"])
    resumed = WeightAverage(network, decay=0.9)
    resumed.load_state_dict(content["average"])
    for number in range(3, 6):
        step(network, number)
        resumed.update(network)
    assert resumed.updates == average.updates == 6
    for name, tensor in average.weights().items():
        assert torch.equal(tensor, resumed.weights()[name]), name


def test_the_network_can_load_it_and_it_is_not_the_network():
    network = network_of()
    average = WeightAverage(network, 0.9)
    assert list(average.weights()) == list(network.state_dict())
    alias, first = "decoder.encoder.stem.convs.0.conv.weight", "encoder.stem.convs.0.conv.weight"
    assert average.weights()[alias] is average.weights()[first]
    kept = average.weights()[first].clone()
    step(network, 1)
    assert torch.equal(average.weights()[first], kept)
    network.load_state_dict(average.weights())
    assert torch.equal(network.state_dict()[first], kept)


def test_numbers_that_are_no_fractions_are_copied():
    network = network_of()
    network.register_buffer("seen", torch.tensor(1))
    average = WeightAverage(network, 0.9)
    network.seen += 6
    average.update(network)
    assert average.weights()["seen"] == 7


def test_another_networks_average_is_refused():
    state = WeightAverage(network_of(TRANSFORMER), 0.9).state_dict()
    with pytest.raises(TrainingError, match="of another network"):
        WeightAverage(network_of(), 0.9).load_state_dict(state)


def test_names_are_walked_once(monkeypatch):
    network = network_of()
    average = WeightAverage(network, 0.9)
    average.update(network)
    walks = []
    state_dict = type(network).state_dict
    monkeypatch.setattr(
        type(network), "state_dict", lambda self, *args, **kwargs: walks.append(1) or state_dict(self, *args, **kwargs)
    )
    average._averages = _NotWalked(average._averages)
    for number in range(3):
        step(network, number)
        average.update(network)
    assert not walks
    network.state_dict()
    assert walks == [1]  # and the count counts


class _NotWalked(dict):
    """Names whose walk is an error."""

    def __iter__(self):
        raise AssertionError("all names are walked in a step")

    items = keys = values = __iter__
