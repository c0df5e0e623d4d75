"""What a network computes, beside what the network that a checkpoint was saved from computed."""

from __future__ import annotations

import torch
from support.nnssl_families import FAMILIES

from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights

TRANSFORMERS = [name for name in FAMILIES if "Primus" in name or "Eva" in name or "SimMIM" in name or "token" in name]
CNNS = [name for name in FAMILIES if name not in TRANSFORMERS]


def picture(channels, patch, seed=5):
    """A structured image with another scale along every axis."""
    axes = [torch.linspace(0, 1, n) for n in patch]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    smooth = torch.stack([torch.sin(4 * z + c) + 2 * y * x - torch.cos(7 * x) * (c + 1) for c in range(channels)])
    return (smooth + 0.5 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(seed)))[None]


def computed(network, image):
    """What the network's encoder computes, under the names that ``Family.features`` has."""
    network = network.eval()
    found = {}
    hooks = []
    with torch.no_grad():
        if hasattr(network, "encoder"):
            return {f"stage {i}": skip for i, skip in enumerate(network.encoder(image))}

        def keep(name, to_places):
            def hook(_module, _inputs, output):
                found[name] = to_places(output)

            return hook

        def places(tokens):  # the installed Primus flattens (w h d)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            grid = found["patch embedding"].shape[2:]
            return tokens.reshape(1, *grid, -1).permute(0, 4, 1, 2, 3)

        hooks.append(network.down_projection.register_forward_hook(keep("patch embedding", lambda volume: volume)))
        for i, block in enumerate(network.eva.blocks):
            hooks.append(block.register_forward_hook(keep(f"block {i}", places)))
        hooks.append(network.eva.norm.register_forward_hook(keep("last norm", places)))
        network(image)
        for hook in hooks:
            hook.remove()
    return found


def assert_same(found, truth, tolerance=2e-5):
    assert found
    for name, features in found.items():
        assert features.shape == truth[name].shape, name
        error = ((features - truth[name]).norm() / truth[name].norm()).item()
        assert error < tolerance, f"{name} is off by {error:.1e}"


def moved(checkpoint, channels, patch, **settings):
    network = build_network(checkpoint.architecture, channels, 3, patch)
    report = transfer_weights(checkpoint, network, **settings)
    assert report.coverage == 1
    return network


def report_of(checkpoint, network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(checkpoint, network)
    after = network.state_dict()
    for row in report.rows:
        if row.fate == "fresh":
            assert row.reason, row
            assert torch.equal(before[row.name], after[row.name]), f"{row.name} is reported fresh and was changed"
    return report, after
