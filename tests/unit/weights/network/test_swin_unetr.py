"""Our Swin UNETR computes what MONAI's computes, with the merging of patches that MONAI had before and has since 1.5."""

import pytest
import torch
from support.monai_files import swin_decoded, swin_hidden, swin_names, swin_unetr

from nnssl_adapt.errors import ArchitectureError, ConfigurationError
from nnssl_adapt.weights.modules.swin_unetr import PatchMerging
from nnssl_adapt.weights.network.architectures import Architecture, build_network

TINY = {"feature_size": 12, "version": 1, "patch_merging": "old"}


@pytest.mark.parametrize(("version", "channels", "merging"), [(1, 1, "old"), (2, 3, "new")])
def test_every_stage_and_the_output_equal_monais(version, channels, merging):
    theirs = swin_unetr(channels, 5, version, merging)
    ours = build_network(
        Architecture("SwinUNETR", {**TINY, "version": version, "patch_merging": merging}), channels, 5, (32, 64, 32)
    ).eval()
    ours.load_state_dict({swin_names(name): tensor for name, tensor in theirs.state_dict().items()})
    image = torch.randn(1, channels, 32, 64, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        skips, _ = swin_hidden(theirs, image)
        found = ours.encoder(image)
        for stage, (features, expected) in enumerate(zip(found, skips, strict=True)):
            assert (features - expected).abs().max() <= 1e-5 * expected.abs().max(), stage
        expected = swin_decoded(theirs, skips)
        assert (ours.decoder(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_two_ways_to_merge_patches_differ():
    """The same weights, another function: no key and no shape would tell."""
    image = torch.randn(1, 8, 6, 4, 12, generator=torch.Generator().manual_seed(3))
    outputs = []
    for merging in ("old", "new"):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(PatchMerging(12, merging)(image))
    assert outputs[0].shape == (1, 4, 3, 2, 24)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1 * outputs[0].abs().max()


def test_what_it_can_not_be_is_named():
    with pytest.raises(ArchitectureError, match="multiple of 12"):
        Architecture("SwinUNETR", {**TINY, "feature_size": 16})
    with pytest.raises(ArchitectureError, match="old or new"):
        Architecture("SwinUNETR", {**TINY, "patch_merging": "both"})
    with pytest.raises(ArchitectureError, match="single output"):
        build_network(Architecture("SwinUNETR", TINY), 1, 2, (64, 32, 32), deep_supervision=True)
    with pytest.raises(ArchitectureError, match="64×32×96"):
        build_network(Architecture("SwinUNETR", TINY), 1, 2, (64, 32, 100))


def test_without_monai_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nnssl_adapt.weights.modules.swin_unetr", None)
    with pytest.raises(ConfigurationError, match="monai") as raised:
        build_network(Architecture("SwinUNETR", TINY), 1, 2, (64, 32, 32))
    assert raised.value.next_command == "pip install 'nnssl-adapt[monai]'"
