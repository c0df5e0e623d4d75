"""Files that are whole, and hold something else than a network's weights: each gives one clear line."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import save_file
from support.nnssl_files import plan, state_dict

from nnssl_adapt.errors import CheckpointError, NnsslAdaptError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights


def one_line(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 700, text
    return text


def sparse():
    return torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (3,), check_invariants=True)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        (7, "holds a int"),
        (None, "holds a NoneType"),
        ({"network_weights": {"a": {"b": torch.zeros(2)}}}, "has a dict under 'a'"),
        ({"state_dict": {"state_dict": {"a": torch.zeros(2)}}}, "'state_dict' has a dict under 'state_dict'"),
        ({"a": {"b": {"c": torch.zeros(2)}}}, "has no 'network_weights'"),
        ({"network_weights": {("a", 1): torch.zeros(2)}}, "has the key .'a', 1., expected text"),
        ({1: torch.zeros(2), 2: torch.zeros(2)}, "has the key 1, expected text"),
        ({"network_weights": {"a\nb": 3}}, r"'a\\nb'"),
        ({"network_weights": {"a": sparse()}}, "layout torch.sparse_coo"),
        ({"network_weights": {"a": torch.zeros(2, device="meta")}}, "meta device"),
        ({"network_weights": {"a": torch.zeros(2, dtype=torch.complex64)}}, "a tensor of torch.complex64"),
        ({"network_weights": {"a": torch.zeros(2).to(torch.float8_e4m3fn)}}, "a tensor of torch.float8_e4m3fn"),
        (
            {"network_weights": {"a": quantized()}},
            "a quantized tensor",
        ),
        ({"network_weights": {"module.a.b": torch.zeros(2), "_orig_mod.module.a.b": torch.ones(2)}}, "twice"),
        ({"state_dict": {"net.encoder.a": torch.zeros(2), "encoder.a": torch.zeros(2)}}, "no adaptation plan"),
    ],
    ids=range(17),
)
def test_what_is_no_state_dict_is_named(tmp_path, content, message):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "checkpoint_final.pth" in one_line(caught.value)


@pytest.mark.parametrize(
    ("class_name", "patch", "name", "change"),
    [
        ("PlainConvUNet", (8, 12, 16), "encoder.stages.0.0.convs.0.", lambda t: t.flatten()),
        ("PlainConvUNet", (8, 12, 16), "encoder.stages.0.0.convs.0.", lambda t: t[..., 0]),
        ("PlainConvUNet", (8, 12, 16), "encoder.stages.1.0.convs.0.", lambda t: t.sum()),
        ("ResidualEncoderUNet", (8, 12, 16), "encoder.stem.", lambda t: t.reshape(-1, 1)),
        ("ResidualEncoderUNet", (8, 12, 16), "encoder.stages.2.", lambda t: t[None]),
        ("Primus", (4, 12, 16), "eva.pos_embed", lambda t: t[0]),
        ("Primus", (4, 12, 16), "eva.pos_embed", lambda t: t.sum()),
        ("Primus", (4, 12, 16), "down_projection.proj.weight", lambda t: t.flatten(1)),
        ("Primus", (4, 12, 16), "eva.blocks.1.attn.q_proj.weight", lambda t: t.flatten()),
    ],
)
def test_tensors_of_another_rank_never_pass_for_weights(tmp_path, class_name, patch, name, change):
    tensors = state_dict(class_name, patch)
    tensors = {
        key: change(value) if key.startswith(name) and key.endswith(("weight", "embed")) else value
        for key, value in tensors.items()
        if not key.startswith("decoder.encoder.")  # the same tensors again, which would be taken instead
    }
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": tensors, "nnssl_adaptation_plan": plan(class_name, patch)}, path)
    with pytest.raises(NnsslAdaptError) as caught:
        checkpoint = open_checkpoint(path)
        transfer_weights(checkpoint, build_network(checkpoint.architecture, 1, 2, patch))
    assert str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_count_only_where_they_would_be_used(tmp_path, value):
    path = tmp_path / "checkpoint_final.pth"
    for name, used in (("decoder.seg_layers.0.weight", False), ("encoder.stages.1.blocks.0.conv1.norm.bias", True)):
        tensors = state_dict()
        tensors[name].flatten()[1] = value
        torch.save({"network_weights": tensors, "nnssl_adaptation_plan": plan()}, path)
        checkpoint = open_checkpoint(path)
        network = build_network(checkpoint.architecture, 1, 2, (8, 12, 16))
        if not used:
            transfer_weights(checkpoint, network)
            continue
        with pytest.raises(NnsslAdaptError, match="NaN or infinite"):
            transfer_weights(checkpoint, network)


def test_a_plan_in_metadata_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"encoder.a": torch.zeros(2)}, path, metadata={"adaptation_plan": "{" * 50_000})
    with pytest.raises(CheckpointError, match="the adaptation plan is a str") as caught:
        open_checkpoint(path)
    one_line(caught.value)


@pytest.mark.parametrize("value", [torch.zeros(3), 7, "text", [torch.zeros(2)], {}, {"name": 3}, [None]])
@pytest.mark.parametrize("key", ["citations", "trainer_name", "init_args", "nnssl_adaptation_plan", "logging"])
def test_other_entries_may_be_anything(tmp_path, key, value):
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": state_dict(), "nnssl_adaptation_plan": plan(), key: value}, path)
    try:
        assert open_checkpoint(path).tensors
    except NnsslAdaptError as error:
        assert key == "nnssl_adaptation_plan"
        one_line(error)
