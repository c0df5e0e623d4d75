"""The published networks in their real size, by names and shapes only: torch's meta device has no memory behind them.

The numbers are those of the published files: nnFoundationCNN 410 MB, nnFoundationViT 2.7 GB (674 M numbers, with the masked
autoencoder's second transformer), and the layout of their state dicts.
"""

from __future__ import annotations

import math

import pytest
import torch

from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.plan_check import positions_grid, reconcile
from nnssl_adapt.weights.checkpoint.state_dict import unwrap
from nnssl_adapt.weights.checkpoint.stems import choose_stem
from nnssl_adapt.weights.network.architectures import Architecture, outline
from nnssl_adapt.weights.network.network_parts import NetworkParts, below, find_prefix, find_source, fits
from nnssl_adapt.weights.network.topology import read_topology

# Its trainer's name says the sizes: BaseEvaMAETrainer_BS96_192ps_2500ep_40_16_8_16_1056_lr2e3, that is blocks and heads of
# the encoder, blocks and heads of the second transformer, and the width. So does that of the small one, …_16_12_4_12_864_….
FOUNDATION_VIT = {
    "input_channels": 1,
    "embed_dim": 1056,
    "patch_embed_size": (8, 8, 8),
    "output_channels": 1,
    "input_shape": (192, 192, 192),
    "encoder_eva_depth": 40,
    "encoder_eva_numheads": 16,
    "decoder_eva_depth": 8,
    "decoder_eva_numheads": 16,
    "patch_drop_rate": 0.75,
    "drop_path_rate": 0.2,
    "attn_drop_rate": 0,
    "init_values": [0.1],
    "scale_attn_inner": True,
}
FOUNDATION_VIT_SMALL = {
    **FOUNDATION_VIT,
    "embed_dim": 864,
    "encoder_eva_depth": 16,
    "encoder_eva_numheads": 12,
    "decoder_eva_depth": 4,
    "decoder_eva_numheads": 12,
    "init_values": None,
    "scale_attn_inner": False,
}


def plan(class_name, kwargs, patch, keys=True, prefix=""):
    transformer = class_name.startswith("Primus")
    content = {
        "architecture_plans": {
            "arch_class_name": class_name,
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": [],
        },
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": list(patch)}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": list(patch),
    }
    if keys:
        content |= {
            "key_to_encoder": prefix + ("eva" if transformer else "encoder.stages"),
            "key_to_stem": prefix + ("down_projection" if transformer else "encoder.stem"),
            "keys_to_in_proj": [prefix + "down_projection.proj"]
            if transformer
            else [prefix + "encoder.stem.convs.0.conv", prefix + "encoder.stem.convs.0.all_modules.0"],
            "key_to_lpe": prefix + "eva.pos_embed" if transformer else None,
        }
    return AdaptationPlan.parse(content, "plan")


def state(architecture, patch):
    return dict(outline(architecture, 1, patch).state_dict(keep_vars=True))


def below_prefix(tensors, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def primus_file(plan, layout):
    """A Primus checkpoint in the layout of its method, on the meta device."""
    tensors = state(plan.architecture, plan.patch_size)
    tensors["mask_token"] = torch.empty(1, 1, plan.architecture.kwargs["embed_dim"], device="meta")
    if layout == "mae":
        second_depth = (plan.raw["architecture_plans"]["arch_kwargs"] or {}).get("decoder_eva_depth", 2)
        kwargs = {**plan.architecture.kwargs, "eva_depth": second_depth}
        second = state(Architecture("Primus", kwargs), plan.patch_size)
        tensors |= {
            f"decoder.{rest}": tensor for name, tensor in second.items() if (rest := below(name, "eva")) is not None
        }
    if layout == "voco":
        tensors = below_prefix({n: t for n, t in tensors.items() if not n.startswith("up_projection")}, "encoder.")
        tensors["projector.0.weight"] = torch.empty(2048, 864, device="meta")
    return tensors


def numbers(tensors):
    """How many, a tensor under two names counted once."""
    return sum({id(tensor): tensor.numel() for tensor in tensors.values()}.values())


def assert_all_fit(plan, tensors):
    """Every tensor of the encoder and the stem has exactly its own in the file, and none there is left over."""
    parts = NetworkParts.of(outline(plan.architecture, plan.num_input_channels, plan.patch_size))
    used = set()
    for target, source in ((parts.encoder, plan.key_to_encoder), (parts.stem, plan.key_to_stem)):
        assert find_prefix(parts, target, tensors, source) == (source, True)
        assert find_prefix(parts, target, tensors, None) == (source, False)
        for tensor in parts.members(target):
            names = find_source(tensor, target, source, tensors)
            assert fits(parts, tensor, names, tensors), tensor.names
            assert not used & set(names)
            used.update(names)
    left = [n for n in tensors if below(n, plan.key_to_encoder) is not None or below(n, plan.key_to_stem) is not None]
    assert used == set(left)


# -- ResEnc-L ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["ResEncL", "NoSkipResEncL"])
def test_resenc_l_is_as_published(class_name):
    content = plan(class_name, None, (160, 160, 160))
    tensors = state(content.architecture, content.patch_size)
    assert numbers(tensors) == 102_348_965  # 409.4 MB in float32
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["encoder.stem.convs.0.all_modules.0.weight"] == (32, 1, 3, 3, 3)
    assert shapes["encoder.stages.3.blocks.5.conv2.all_modules.1.weight"] == (256,)
    assert shapes["encoder.stages.5.blocks.0.conv1.conv.weight"] == (320, 320, 3, 3, 3)
    assert shapes["encoder.stages.4.blocks.0.skip.1.conv.weight"] == (320, 256, 1, 1, 1)
    assert shapes["decoder.encoder.stages.1.blocks.2.conv1.norm.bias"] == (64,)
    assert "encoder.stages.0.blocks.1.conv1.conv.weight" not in shapes
    mended, notes = reconcile(content, tensors, "file.pth")
    assert (mended.model_copy(update={"keys_to_in_proj": content.keys_to_in_proj}), notes) == (content, [])
    assert_all_fit(mended, tensors)


def test_resenc_l_is_found_without_keys_in_a_compiled_and_distributed_file():
    content = plan("ResEncL", None, (192, 192, 192), keys=False)
    tensors = below_prefix(state(content.architecture, content.patch_size), "module._orig_mod.")
    stripped, _ = unwrap(tensors, None, lightning=False)
    mended, notes = reconcile(content, stripped, "file.pth")
    assert mended.key_to_encoder == "encoder.stages"
    assert len(notes) == 3
    assert_all_fit(mended, stripped)


def test_resenc_l_is_read_off_its_tensors():
    architecture = Architecture.named("ResEncL")
    topology = read_topology(state(architecture, (160, 160, 160)))
    assert topology.architecture.kwargs == architecture.kwargs
    assert topology.guessed == ()


def test_a_multi_talent_file_of_twenty_stems_has_one_afterwards():
    content = plan("ResEncL", None, (192, 192, 192))
    tensors = {}
    for name, tensor in state(content.architecture, content.patch_size).items():
        rest = below(name, "encoder.stem")
        copies = [name] if rest is None else [f"encoder.stem.Dataset{index:03d}.{rest}" for index in range(20)]
        tensors.update(dict.fromkeys(copies, tensor))
    chosen, _ = choose_stem(tensors, "Dataset007", "file.pth")
    mended, notes = reconcile(content, chosen, "file.pth")
    assert (mended.key_to_stem, mended.num_input_channels, notes) == ("encoder.stem", 1, [])
    averaged, _ = choose_stem(tensors, None, "file.pth")
    assert averaged["encoder.stem.convs.0.conv.weight"].shape == (32, 1, 3, 3, 3)


# -- Primus ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mae", "plain", "voco"])
def test_primus_m_is_as_published(layout):
    prefix = "encoder." if layout == "voco" else ""
    content = plan("PrimusM", None, (160, 160, 160), prefix=prefix)
    tensors = primus_file(content, layout)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes[f"{prefix}eva.pos_embed"] == (1, 20**3, 864)
    assert shapes[f"{prefix}down_projection.proj.weight"] == (864, 1, 8, 8, 8)
    assert shapes[f"{prefix}eva.blocks.15.mlp.fc1_g.weight"] == (2304, 864)
    assert f"{prefix}eva.blocks.16.norm1.weight" not in shapes
    encoder = {
        name: t for name, t in tensors.items() if name.startswith((f"{prefix}eva.", f"{prefix}down_projection."))
    }
    assert numbers(encoder) == 150_997_536
    mended, notes = reconcile(content, tensors, "file.pth")
    assert notes == []
    assert_all_fit(mended, tensors)


def test_a_crop_in_the_plan_gives_way_to_the_positions():
    """The published SimCLR and VoCo files have positions for 160³ and name the crop that they trained on."""
    content = plan("PrimusM", None, (64, 64, 64), prefix="encoder.")
    tensors = primus_file(plan("PrimusM", None, (160, 160, 160)), "voco")
    mended, notes = reconcile(content, tensors, "file.pth")
    assert mended.patch_size == (160, 160, 160)
    assert len(notes) == 1 and "8000 positions" in notes[0]


def test_the_foundation_vit_is_as_published():
    content = plan("PrimusX", FOUNDATION_VIT, (192, 192, 192))
    tensors = primus_file(content, "mae")
    assert round(numbers(tensors) / 1e6) == 674  # one block more or less would be 13 M
    assert round(numbers(tensors) * 4 / 1e8) == 27
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["eva.pos_embed"] == shapes["decoder.pos_embed"] == (1, 24**3, 1056)
    assert shapes["eva.blocks.39.attn.q_proj.weight"] == (1056, 1056)
    assert shapes["decoder.blocks.7.attn.norm.weight"] == (1056,)
    assert shapes["eva.blocks.0.gamma_1"] == (1056,)
    # A block has 12 squares of its width (attention 4, gated MLP 8), the rest is vectors.
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("eva.blocks.3."))
    assert block == 12 * 1056**2 + 23_936
    mended, notes = reconcile(content, tensors, "file.pth")
    assert notes == []
    assert mended.key_to_lpe == "eva.pos_embed"
    assert positions_grid(tensors["eva.pos_embed"], tensors, mended) == (0, (24, 24, 24))
    assert_all_fit(mended, tensors)


def test_the_small_foundation_vit_has_neither_layer_scale_nor_inner_norm():
    content = plan("PrimusX", FOUNDATION_VIT_SMALL, (192, 192, 192))
    tensors = primus_file(content, "mae")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["eva.pos_embed"] == (1, 24**3, 864)
    assert "decoder.blocks.3.norm1.weight" in shapes and "decoder.blocks.4.norm1.weight" not in shapes
    assert not [name for name in shapes if "gamma" in name or "attn.norm" in name]
    mended, notes = reconcile(content, tensors, "file.pth")
    assert notes == []
    assert_all_fit(mended, tensors)
    # As it is if the plan's preset or a plan of the large one's options stands beside it.
    wrong = plan("PrimusX", {**FOUNDATION_VIT_SMALL, "init_values": [0.1], "scale_attn_inner": True}, (192, 192, 192))
    assert reconcile(wrong, tensors, "file.pth")[0].architecture == content.architecture


@pytest.mark.parametrize("missing", ["init_values", "scale_attn_inner"])
def test_the_foundation_vit_is_read_off_its_tensors_where_its_plan_is_wrong(missing):
    right = plan("PrimusX", FOUNDATION_VIT, (192, 192, 192))
    tensors = primus_file(right, "mae")
    wrong = plan("PrimusX", {**FOUNDATION_VIT, missing: None, "encoder_eva_depth": 24}, (192, 192, 192))
    mended, notes = reconcile(wrong, tensors, "file.pth")
    assert mended.architecture == right.architecture
    assert len(notes) == 1 and "eva_depth 24 → 40" in notes[0]
