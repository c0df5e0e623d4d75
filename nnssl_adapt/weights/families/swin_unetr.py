"""Swin UNETR as published: NVIDIA's, VoCo and VoComni, SuPreM, BrainSegFounder, and files of unknown origin.

All have MONAI's names under different wrappers; some hold the Swin transformer alone. All were trained with MONAI up to 1.4,
whose merging of patches is kept (``patch_merging: old``). A file of unknown origin doesn't tell: it is asked for. Two have
nothing of their own but their layout, and are known by the name of the file or in the catalogue.

MONAI reads images as (x, y, z) arrays, oriented RAS (``LPI`` in the words of
:mod:`nnssl_adapt.geometry.orientation`). The network is not symmetric in its axes, so that images are turned, not weights.

Names, sizes and wrappers are those of the published code (MONAI's ``load_from`` and ``filter_swinunetr``, the loaders of VoCo and
SuPreM, BrainSegFounder's pre-training); no weight file was seen. What else is second-hand stands with each family.
"""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.families.family import Facts, Family, KeyMap, Window
from nnssl_adapt.weights.network.network_parts import Tensors

_WRAPPERS = r"(?:(?:module|backbone|network|model|net)\.)*"
_SWIN = rf"{_WRAPPERS}(?:(?:swinViT|swin_vit)\.)?"
_LAYER = r"(weight|bias)"
_BLOCKS_BESIDE = {"1": 0, "2": 1, "3": 2, "4": 3, "10": 5}
"""MONAI's number of an encoder block → the stage whose skip it makes."""


def _swin_rules(swin: str, layers: str) -> list[tuple[str, str | None]]:
    """Of the transformer; ``swin`` stands before its names, ``layers`` between a stage's number and what is in it."""
    rules: list[tuple[str, str | None]] = [(rf"{swin}patch_embed\.proj\.{_LAYER}", r"encoder.stem.\1")]
    for level in (1, 2, 3, 4):
        stage = f"encoder.stages.{level + 1}"
        mlp = rf"{swin}layers{level}{layers}(blocks\.\d+\.mlp)\.(?:fc|linear)([12])\.{_LAYER}"
        rules += [
            (mlp, rf"{stage}.swin.\1.linear\2.\3"),
            (rf"{swin}layers{level}{layers}((?:blocks|downsample)\..+)", rf"{stage}.swin.\1"),
            (rf"{swin}layers{level}c\.0\.layer\.(.+)", rf"{stage}.conv.\1"),
        ]
    return rules


def _rules() -> tuple[tuple[str, str | None], ...]:
    rules = _swin_rules(_SWIN, r"\.0\.")
    for number, stage in _BLOCKS_BESIDE.items():
        rules.append((rf"{_WRAPPERS}encoder{number}\.layer\.(.+)", rf"encoder.stages.{stage}.residual.\1"))
    for stage in range(5):
        rules += [
            (rf"{_WRAPPERS}decoder{5 - stage}\.transp_conv\.conv\.(.+)", rf"decoder.transpconvs.{stage}.\1"),
            (rf"{_WRAPPERS}decoder{5 - stage}\.conv_block\.(.+)", rf"decoder.stages.{stage}.\1"),
        ]
    rules.append((rf"{_WRAPPERS}out\.conv\.conv\.{_LAYER}", r"decoder.seg_layers.4.\1"))
    # What only pre-training needs: heads of NVIDIA's and BrainSegFounder's tasks, VoCo's projections, SuPreM's text heads.
    rules.append((rf"{_WRAPPERS}(?:rotation_head|rotation_pre|contrastive_head|contrastive_pre|conv)\..+", None))
    rules.append((rf"{_WRAPPERS}(?:student|teacher|proj|head|projection|mask_token)(?:\..+)?", None))
    rules.append((rf"{_WRAPPERS}(?:precls_conv|GAP|controller|organ_embedding|text_to_vision)(?:\..+)?", None))
    rules.append((rf"{_SWIN}norm\.{_LAYER}", None))
    return tuple(rules)


_RULES = _rules()
_DISRUPTIVE_RULES = (
    *_swin_rules(r"encoder\.", r"\.0\.0\."),
    (r"encoder\.(?:mask_token|norm\..+)", None),
    (rf"(?!encoder\.){_WRAPPERS}\w+(?:\..+)?", None),
)

_QKV = r"layers1\.0\.blocks\.0\.attn\.qkv\.weight"
_ANY = rf"{_SWIN}{_QKV}"
_CT = Window(-175.0, 250.0)
_RAS = "LPI"
_OLD = {"patch_merging": "old"}

TANG: dict[str, Any] = {
    "type": "Pretraining",
    "name": "Swin UNETR, self-supervised",
    "apa_citations": [
        "Tang, Y., Yang, D., Li, W., et al. (2022). Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image "
        "Analysis. CVPR."
    ],
}
VOCO: dict[str, Any] = {
    "type": "Pretraining",
    "name": "VoCo",
    "apa_citations": ["Wu, L., et al. (2026). Large-Scale 3D Medical Image Pre-training. IEEE TPAMI."],
}
SUPREM: dict[str, Any] = {
    "type": "Pretraining",
    "name": "SuPreM",
    "apa_citations": ["Li, W., et al. (2024). How Well Do Supervised Models Transfer to 3D Image Segmentation? ICLR."],
}
BRAIN_SEG_FOUNDER: dict[str, Any] = {
    "type": "Pretraining",
    "name": "BrainSegFounder",
    "apa_citations": ["Cox, J., et al. (2024). BrainSegFounder. arXiv 2406.10395."],
}

VOCOMNI_LABELS = (
    *("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "veins", "pancreas", "right adrenal gland", "left adrenal gland", "liver tumor"),
    *("pancreas tumor", "kidney tumor", "covid", "colon", "colon cancer", "lung cancer"),
)
BTCV_LABELS = (
    *("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland"),
)


def _facts(told: str, *second_hand: str, **changes: Any) -> Facts:
    """CT as MONAI's tutorials prepare it, with what a family has otherwise."""
    usual: dict[str, Any] = {
        "spacing": (1.5, 1.5, 1.5),
        "patch_size": (96, 96, 96),
        "window": _CT,
        "orientation": _RAS,
        "supervised": False,
        "axes": "xyz",
    }
    return Facts(**{**usual, **changes}, told=told, second_hand=second_hand)


_MERGING = "that its patch merging is MONAI's old one (told by its date)"
_CT_WINDOW = "that it saw CT in this window"


def _has_heads(tensors: Tensors, count: int) -> bool:
    return any(name.endswith("out.conv.conv.weight") and len(tensor) == count for name, tensor in tensors.items())


def _is_second_version(tensors: Tensors) -> bool:
    return any(".layers1c.0.layer." in f".{name}" for name in tensors)


NVIDIA = Family(
    name="NVIDIA's self-supervised Swin transformer (model_swinvit.pt)",
    key_map=KeyMap(rf"{_SWIN}layers1\.0\.blocks\.0\.mlp\.fc1\.weight", _RULES),
    arguments=_OLD,
    facts=_facts(
        "spacing (1.5 mm), patch and window of MONAI's tutorials of it",
        _MERGING,
        _CT_WINDOW,
        citations=(TANG,),
    ),
)
DISRUPTIVE = Family(
    name="NVIDIA's Swin transformer of a disruptive autoencoder (ssl_pretrained_weights.pth)",
    key_map=KeyMap(r"encoder\.layers1\.0\.0\.blocks\.0\.attn\.qkv\.weight", _DISRUPTIVE_RULES),
    arguments=_OLD,
    facts=_facts("spacing (1.5 mm), patch and window of MONAI's tutorials", _MERGING, "its spacing and window"),
)
VOCO_SSL = Family(
    name="a Swin UNETR of VoCo",
    key_map=KeyMap(_ANY, _RULES),
    fits=lambda tensors: any(".student." in f".{name}" or ".teacher." in f".{name}" for name in tensors),
    arguments=_OLD,
    facts=_facts("spacing (1.5 mm) and window of VoCo's code; it saw crops of 64 voxels", _MERGING, citations=(VOCO,)),
)
VOCOMNI = Family(
    name="a Swin UNETR of VoComni",
    key_map=KeyMap(_ANY, _RULES),
    fits=lambda tensors: _is_second_version(tensors) and _has_heads(tensors, len(VOCOMNI_LABELS)),
    arguments=_OLD,
    facts=_facts(
        "spacing (1.5 mm), window and labels of VoCo's code",
        _MERGING,
        citations=(VOCO,),
        supervised=True,
        labels=VOCOMNI_LABELS,
    ),
)
SUPREM_SWIN = Family(
    name="a Swin UNETR of SuPreM",
    key_map=KeyMap(_ANY, _RULES),
    fits=lambda tensors: any(name.rpartition(".")[2] == "organ_embedding" for name in tensors),
    arguments=_OLD,
    facts=_facts(
        "spacing (1.5 mm) and window of SuPreM's code; the file has no output layer of an ordinary kind",
        "that its patch merging is MONAI's old one (its authors' copy of MONAI has it)",
        citations=(SUPREM,),
        supervised=True,
    ),
)
BRAINSEGFOUNDER = Family(
    name="a Swin transformer of BrainSegFounder",
    key_map=KeyMap(_ANY, _RULES),
    fits=lambda tensors: any(".rotation_head." in f".{name}" for name in tensors),
    arguments=_OLD,
    facts=_facts(
        "its spacing is not known: choose -am median or fixed",
        _MERGING,
        "of UK Biobank's MR, T1 and T2 where it has two channels",
        spacing=None,
        window=None,
        unlike="its code scales −1000 … 1000 to 0 … 1 unless told otherwise; whether MR was, is not known",
        citations=(BRAIN_SEG_FOUNDER,),
    ),
)
VOCO_10K = Family(
    name="the first Swin UNETR of VoCo (VoCo_10k.pt)",
    key_map=KeyMap(_ANY, _RULES),
    named=r"(?i)voco_10k.*",
    fits=_is_second_version,
    arguments=_OLD,
    facts=_facts(
        "it is VoCo_10k by its name and layout: took the window of VoCo's code; its spacing is not known: choose -am median or "
        "fixed",
        _MERGING,
        _CT_WINDOW,
        spacing=None,
        patch_size=(64, 64, 64),
        citations=(VOCO,),
    ),
)
BTCV = Family(
    name="NVIDIA's Swin UNETR of BTCV (base_5000ep)",
    key_map=KeyMap(_ANY, _RULES),
    named=r"(?i)swin_unetr\.base_5000ep.*",
    fits=lambda tensors: not _is_second_version(tensors) and _has_heads(tensors, len(BTCV_LABELS)),
    arguments=_OLD,
    facts=_facts(
        "it is NVIDIA's base_5000ep by its name and layout: took spacing (1.5 × 1.5 × 2 mm), patch and window of its tutorial",
        _MERGING,
        "its spacing",
        "its labels",
        spacing=(1.5, 1.5, 2.0),
        citations=(TANG,),
        supervised=True,
        labels=BTCV_LABELS,
    ),
)
ANY_SWIN_UNETR = Family(
    name="a Swin UNETR",
    key_map=KeyMap(_ANY, _RULES),
    facts=Facts(
        patch_size=(96, 96, 96),
        axes="xyz",
        told="who trained it, on which images, is not in the file: its axes are taken to be MONAI's (x, y, z); choose -am median "
        "or fixed, and --normalization",
    ),
)

SWIN_UNETRS = (NVIDIA, DISRUPTIVE, VOCO_SSL, VOCOMNI, SUPREM_SWIN, BRAINSEGFOUNDER, VOCO_10K, BTCV, ANY_SWIN_UNETR)
