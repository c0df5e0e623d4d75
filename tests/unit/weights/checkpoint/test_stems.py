"""Networks with one stem a dataset: one is chosen, or those of one shape are averaged, and the others stay visible."""

import pytest
import torch
from support.nnssl_files import plan, state_dict, write_checkpoint

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.checkpoint.stems import choose_stem, is_other_stem

IDS = ("Dataset003_Liver", "stem", "17")


def several_stems(channels=(1, 1, 1), network="encoder"):
    tensors = {name: t for name, t in state_dict().items() if ".stem." not in name and "decoder." not in name}
    for index, (stem, count) in enumerate(zip(IDS, channels, strict=True)):
        for name, tensor in state_dict(channels=count, seed=10 + index).items():
            if name.startswith("encoder.stem."):
                tensors[f"{network}.stem.{stem}.{name.removeprefix('encoder.stem.')}"] = tensor
    return tensors


@pytest.mark.parametrize("stem", IDS)
def test_the_stem_asked_for_gets_the_plain_name_and_the_others_keep_theirs(stem):
    tensors = several_stems()
    chosen, notes = choose_stem(tensors, stem, "file.pth")
    for layer in ("conv.weight", "conv.bias", "norm.weight", "all_modules.0.weight"):
        assert chosen[f"encoder.stem.convs.0.{layer}"] is tensors[f"encoder.stem.{stem}.convs.0.{layer}"]
    others = {name for name in tensors if ".stem." in name and f".stem.{stem}." not in name}
    assert {name for name in chosen if is_other_stem(name)} == others
    assert notes == [
        f"it has one stem a dataset: took that of {stem}; left out: " + ", ".join(i for i in IDS if i != stem)
    ]


@pytest.mark.parametrize("asked", [None, "mean"])
def test_without_a_choice_stems_of_one_shape_are_averaged(asked):
    tensors = several_stems(channels=(2, 1, 1))
    chosen, notes = choose_stem(tensors, asked, "file.pth")
    name = "convs.0.conv.weight"
    expected = (tensors[f"encoder.stem.stem.{name}"].double() + tensors[f"encoder.stem.17.{name}"].double()) / 2
    assert torch.allclose(chosen[f"encoder.stem.{name}"].double(), expected, atol=1e-7)
    assert chosen["encoder.stem.convs.0.all_modules.0.weight"] is chosen[f"encoder.stem.{name}"]
    assert chosen["encoder.stem.Dataset003_Liver.convs.0.conv.bias"].shape == (4,)
    assert "mean of stem, 17" in notes[0] and "left out: Dataset003_Liver" in notes[0]
    assert ("--stem ID" in notes[0]) == (asked is None)


def test_half_precision_is_averaged_in_float32():
    tensors = {name: tensor.half() for name, tensor in several_stems().items()}
    chosen, _ = choose_stem(tensors, None, "file.pth")
    result = chosen["encoder.stem.convs.0.conv.weight"]
    members = [tensors[f"encoder.stem.{stem}.convs.0.conv.weight"].float() for stem in IDS]
    assert result.dtype == torch.float32
    assert torch.allclose(result, sum(members) / 3, atol=1e-7)


def test_an_unknown_stem_is_an_error_that_lists_them():
    with pytest.raises(ConfigurationError, match=r"has no stem '18'; it has Dataset003_Liver, stem, 17 \(or mean\)"):
        choose_stem(several_stems(), "18", "file.pth")


def test_a_network_with_one_stem_has_nothing_to_choose():
    tensors = state_dict()
    assert choose_stem(tensors, None, "file.pth") == (tensors, [])
    with pytest.raises(ConfigurationError, match="single stem: leave out the choice of 'mean'"):
        choose_stem(tensors, "mean", "file.pth")


def test_untrained_aliases_are_not_mixed_with_trained_ones():
    tensors = several_stems()
    for stem in IDS:
        tensors[f"encoder.stem.{stem}.convs.0.norm.weight"] = torch.ones(4)
    chosen, _ = choose_stem(tensors, None, "file.pth")
    assert torch.equal(chosen["encoder.stem.convs.0.norm.weight"], torch.ones(4))
    trained = [tensors[f"encoder.stem.{stem}.convs.0.all_modules.1.weight"] for stem in IDS]
    assert torch.allclose(chosen["encoder.stem.convs.0.all_modules.1.weight"], sum(trained) / 3, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("network", ["encoder", "network.encoder"])
def test_the_plan_of_the_opened_file_names_the_chosen_stem(tmp_path, prefix, network):
    tensors = {
        prefix + (name if name.startswith(network) else name.replace("encoder", network)): tensor
        for name, tensor in several_stems(network=network).items()
    }
    path = write_checkpoint(tmp_path, tensors, embedded=plan())
    checkpoint = open_checkpoint(path, stem="17")
    assert checkpoint.plan.key_to_stem == f"{network}.stem"
    assert f"{network}.stem.convs.0.conv" in checkpoint.plan.keys_to_in_proj
    assert checkpoint.choices == {"stem": "17"}
    assert not any("contradicts" in note for note in checkpoint.notes)
