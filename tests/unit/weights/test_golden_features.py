"""Networks pre-trained by nnssl compute downstream what they computed there, to 1e-5.

The checkpoints and features were written by nnssl itself; see the README beside them.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.proof.reference_encoder import pretrained_network, pretrained_token_features
from nnssl_adapt.weights.transfer.token_order import file_order
from nnssl_adapt.weights.transfer.transfer import transfer_weights

DATA = Path(__file__).parents[2] / "data" / "nnssl_checkpoints"
NAMES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())


def golden(name):
    features = load_file(DATA / name / "golden_features.safetensors")
    if name != "small_spark":
        return load_file(DATA / "golden_input_32.safetensors")["input"], features
    torch.manual_seed(7)
    image = torch.randn(1, 1, 64, 64, 64)
    assert image.double().sum().item() == pytest.approx(551.6456278378159, abs=1e-6), "torch draws other numbers now"
    return image, features


def encode(network, image):
    """What the encoder computes: skips of a CNN, or the tokens of a Primus in their places (B, C, Z, Y, X)."""
    network.eval()
    with torch.no_grad():
        if hasattr(network, "encoder"):
            return {f"features_{i}": skip for i, skip in enumerate(network.encoder(image))}
        seen = {}
        hook = network.up_projection.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
        network(image)
        hook.remove()
        return seen


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_downstream_encoder_computes_what_nnssl_computed(name, channels):
    image, expected = golden(name)
    checkpoint = open_checkpoint(DATA / name)
    network = build_network(checkpoint.architecture, channels, 3, image.shape[2:])
    report = transfer_weights(checkpoint, network)
    computed = encode(network, image.repeat(1, channels, 1, 1, 1))
    assert report.coverage == 1
    for key, features in expected.items():
        error = (computed[key] - features).norm() / features.norm()
        assert error < 1e-5, f"{key} is off by {error:.1e}"


def test_all_six_are_there():
    assert NAMES == [
        "small_plainconv",
        "small_primus_mae",
        "small_primus_simmim",
        "small_resenc",
        "small_resenc_noresample",
        "small_spark",
    ]


def test_the_wrong_token_order_would_be_seen():
    image, expected = golden("small_primus_mae")
    checkpoint = open_checkpoint(DATA / "small_primus_mae")
    network = build_network(checkpoint.architecture, 1, 3, image.shape[2:])
    transfer_weights(checkpoint, network, token_order="whd")
    error = (encode(network, image)["features"] - expected["features"]).norm() / expected["features"].norm()
    assert error > 1e-3


def test_spark_is_read_from_the_names_that_were_trained():
    checkpoint = open_checkpoint(DATA / "small_spark")
    names = ("encoder.stem.convs.0.conv.weight", "encoder.stem.convs.0.all_modules.0.weight")
    untrained, trained = (checkpoint.tensors[name] for name in names)
    assert not torch.equal(untrained, trained)
    network = build_network(checkpoint.architecture, 1, 3, (32, 32, 32))
    report = transfer_weights(checkpoint, network)
    assert torch.equal(network.get_parameter(names[0]), trained)
    fates = {row.name: (row.fate, row.reason) for row in report.source_rows}
    assert fates[names[0]] == ("dropped", "untrained second name; all_modules is what was trained")
    assert fates[names[1]][0] == "used"


def test_the_bundled_demo_checkpoint_opens_and_moves():
    import nnssl_adapt

    checkpoint = open_checkpoint(Path(nnssl_adapt.__file__).parent / "assets" / "demo_resenc_mae")
    network = build_network(checkpoint.architecture, 1, 3, (64, 64, 64))
    report = transfer_weights(checkpoint, network)
    assert report.coverage == 1
    assert checkpoint.trainer_name == "BaseMAETrainer"
    assert len(checkpoint.citation_names) == 2
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_transfer_is_proven_against_is_what_nnssl_computed(name):
    """The other side of :func:`prove_transfer`: the file's own tensors, run without any rule of a transfer."""
    image, expected = golden(name)
    checkpoint = open_checkpoint(DATA / name)
    with torch.no_grad():
        if checkpoint.architecture.is_transformer:
            order, _ = file_order(checkpoint, "auto")
            found = pretrained_token_features(checkpoint, image, checkpoint.plan.token_grid, order, [])
            computed = {"features": found["last norm"]}
        else:
            network = pretrained_network(checkpoint, image.shape[2:])
            computed = {f"features_{i}": skip for i, skip in enumerate(network.encoder(image))}
    for key, features in expected.items():
        assert (computed[key] - features).norm() / features.norm() < 1e-5, key


@pytest.mark.parametrize("name", NAMES)
def test_the_transfer_of_a_real_file_is_proven(name):
    checkpoint = open_checkpoint(DATA / name)
    network = build_network(checkpoint.architecture, 3, 2, (32, 32, 32))
    transfer_weights(checkpoint, network)
    proof = prove_transfer(checkpoint, network)
    assert proof.passed, str(proof)
    assert len(proof.stages) >= 4
