"""SegResNets as published: CT-FM, SuPreM, VISTA3D's encoder, and those of unknown origin.

MONAI has two classes, ``SegResNet`` (``convInit``, ``down_layers``) and ``SegResNetDS`` (``conv_init``, ``layers``), whose
encoders compute the same. Kernels are symmetric in their axes, so that those of (x, y, z) arrays are turned, exactly.

Batch normalisation (CT-FM) keeps the statistics of pre-training, in training too: the two patches of a batch say too little.
A fresh decoder has no statistics and is normalised by instance.

Names and sizes are those of MONAI's classes and of the published code; no weight file was seen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnssl_adapt.weights.families.family import Facts, Family, KeyMap, Window
from nnssl_adapt.weights.families.swin_unetr import SUPREM
from nnssl_adapt.weights.network.network_parts import Tensors

_WRAPPERS = r"(?:(?:module|backbone|network|model|net)\.)*"
_STAGES = 8
_BLOCKS = 16
"""More than any SegResNet has."""
_OUTPUT = "decoder.seg_layers.last"

Rules = tuple[tuple[str, str | None], ...]


def _encoder_rules(before: str) -> Rules:
    """Of ``SegResEncoder``; the step down belongs to the stage that it leads to."""
    return (
        (rf"{before}conv_init\.weight", r"encoder.stem.weight"),
        (rf"{before}layers\.(\d+)\.blocks\.(.+)", r"encoder.stages.\1.blocks.\2"),
        *(
            (rf"{before}layers\.{stage}\.downsample\.weight", f"encoder.stages.{stage + 1}.down.weight")
            for stage in range(_STAGES)
        ),
    )


_DS_RULES: Rules = (
    *_encoder_rules(rf"{_WRAPPERS}(?:encoder\.)?"),
    (rf"{_WRAPPERS}up_layers\.(\d+)\.upsample\.(?:deconv|preconv)\.weight", r"decoder.transpconvs.\1.weight"),
    (rf"{_WRAPPERS}up_layers\.(\d+)\.blocks\.(.+)", r"decoder.stages.\1.\2"),
    (rf"{_WRAPPERS}up_layers\.(\d+)\.head\.(.+)", r"decoder.seg_layers.\1.\2"),
)

_VISTA_RULES: Rules = (
    *_encoder_rules(rf"{_WRAPPERS}image_encoder\.encoder\."),
    (rf"{_WRAPPERS}(?:image_encoder\.up_layers|image_encoder\.up_layers_auto|class_head|point_head)\..+", None),
)

_PLAIN_RULES: Rules = (
    (rf"{_WRAPPERS}convInit\.conv\.weight", r"encoder.stem.weight"),
    (rf"{_WRAPPERS}down_layers\.(\d+)\.0\.conv\.weight", r"encoder.stages.\1.down.weight"),
    *(
        (
            rf"{_WRAPPERS}down_layers\.(\d+)\.{block}\.(norm[12]|conv[12])(?:\.conv)?\.(.+)",
            rf"encoder.stages.\1.blocks.{block - 1}.\2.\3",
        )
        for block in range(1, _BLOCKS + 1)
    ),
    (rf"{_WRAPPERS}up_layers\.(\d+)\.(\d+)\.(norm[12]|conv[12])(?:\.conv)?\.(.+)", r"decoder.stages.\1.\2.\3.\4"),
    (rf"{_WRAPPERS}up_samples\.(\d+)\.0\.conv\.weight", r"decoder.transpconvs.\1.weight"),
    (rf"{_WRAPPERS}conv_final\.0\.(.+)", r"decoder.final_norm.\1"),
    (rf"{_WRAPPERS}conv_final\.2\.conv\.(.+)", rf"{_OUTPUT}.\1"),
    (rf"{_WRAPPERS}(?:precls_conv|GAP|controller|organ_embedding|text_to_vision)(?:\..+)?", None),
)

CT_FM: dict[str, Any] = {
    "type": "Pretraining",
    "name": "CT-FM",
    "apa_citations": ["Pai, S., et al. (2025). Vision Foundation Models for Computed Tomography. arXiv 2501.09001."],
}
VISTA: dict[str, Any] = {
    "type": "Pretraining",
    "name": "VISTA3D",
    "apa_citations": [
        "He, Y., et al. (2024). VISTA3D: Versatile Imaging SegmenTation and Annotation model. arXiv 2406.05285."
    ],
}

SUPREM_LABELS = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "postcava"),
    *("portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum"),
    *("hepatic vessel", "right lung", "left lung", "colon", "intestine", "rectum", "bladder", "prostate"),
    *("left head of femur", "right head of femur", "celiac trunk", "kidney tumor", "liver tumor", "pancreas tumor"),
    *("hepatic vessel tumor", "lung tumor", "colon tumor", "kidney cyst"),
)

_DS_MARKER = rf"{_WRAPPERS}(?:encoder\.)?conv_init\.weight"


def numbered_output(tensors: Tensors) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The output layer under the number of the decoder's last stage, which MONAI's name does not tell."""
    stages = {int(name.split(".")[2]) for name in tensors if name.startswith("decoder.stages.")}
    last = f"decoder.seg_layers.{max(stages, default=0)}"
    return {name.replace(_OUTPUT, last, 1): tensor for name, tensor in tensors.items()}, ()


def _statistics_under(tensors: Tensors, part: str) -> bool:
    return any(f".{part}." in f".{name}" and name.endswith("running_mean") for name in tensors)


def _outputs(tensors: Tensors) -> int:
    """Of the finest head of a SegResNetDS; 0 where there is none."""
    heads = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".head.weight")}
    return int(heads[max(heads)]) if heads else 0


_CT_FM_FACTS: dict[str, Any] = {
    "spacing": (3.0, 1.0, 1.0),
    "patch_size": (32, 128, 128),
    "window": Window(-1024.0, 2048.0),
    "orientation": "RAI",
    "citations": (CT_FM,),
}

CT_FM_SSL = Family(
    name="a SegResNet of CT-FM, self-supervised",
    key_map=KeyMap(_DS_MARKER, _DS_RULES),
    fits=lambda tensors: _statistics_under(tensors, "layers") and _outputs(tensors) <= 2,
    facts=Facts(
        **_CT_FM_FACTS,
        supervised=False,
        told="spacing (3 × 1 × 1 mm), patch and orientation (SPL) of CT-FM's code; only its encoder is taken",
        second_hand=(
            "that a SegResNetDS with batch normalisation and at most two outputs is CT-FM's",
            "that its decoder was not trained",
        ),
    ),
)
ANY_DS_WITH_STATISTICS = Family(
    name="a SegResNet of MONAI that segments, with batch normalisation (CT-FM's whole_body_segmentation is one)",
    key_map=KeyMap(_DS_MARKER, _DS_RULES),
    fits=lambda tensors: _statistics_under(tensors, "layers"),
    arguments={"decoder_norm": "batch"},
    facts=Facts(
        **_CT_FM_FACTS,
        supervised=True,
        told="spacing (3 × 1 × 1 mm), patch, window and orientation (SPL) of CT-FM's code",
        second_hand=("that a SegResNetDS with batch normalisation is CT-FM's: check spacing and intensities",),
    ),
)
ANY_DS = Family(
    name="a SegResNetDS of MONAI",
    key_map=KeyMap(_DS_MARKER, _DS_RULES),
    facts=Facts(
        axes="xyz",
        told="who trained it, on which images, is not in the file: its axes are taken to be MONAI's (x, y, z); choose -am median "
        "or fixed, and --normalization",
    ),
)
VISTA3D = Family(
    name="VISTA3D",
    key_map=KeyMap(rf"{_WRAPPERS}image_encoder\.encoder\.conv_init\.weight", _VISTA_RULES),
    arguments={"norm": "instance"},
    facts=Facts(
        spacing=(1.5, 1.5, 1.5),
        patch_size=(128, 128, 128),
        window=Window(-963.8247715525971, 1053.678477684517),
        orientation="LPI",
        axes="xyz",
        supervised=False,
        citations=(VISTA,),
        told="only its encoder is taken: its classes are embeddings that it compares features with, not an output layer. Spacing "
        "(1.5 mm), window and orientation (RAS) are its bundle's",
    ),
)
SUPREM_SEGRESNET = Family(
    name="a SegResNet of SuPreM",
    key_map=KeyMap(rf"{_WRAPPERS}convInit\.conv\.weight", _PLAIN_RULES),
    fits=lambda tensors: any(
        name.endswith("conv_final.2.conv.weight") and len(tensor) in (25, len(SUPREM_LABELS))
        for name, tensor in tensors.items()
    ),
    arguments={"norm": "group"},
    prepare=numbered_output,
    facts=Facts(
        spacing=(1.5, 1.5, 1.5),
        patch_size=(96, 96, 96),
        window=Window(-175.0, 250.0),
        orientation="LPI",
        axes="xyz",
        supervised=True,
        labels=SUPREM_LABELS,
        citations=(SUPREM,),
        told="spacing (1.5 mm), window and labels of SuPreM's code; its outputs were trained as one yes or no each",
        second_hand=("that a SegResNet with 25 or 32 outputs is SuPreM's",),
    ),
)
ANY_SEGRESNET = Family(
    name="a SegResNet of MONAI",
    key_map=KeyMap(rf"{_WRAPPERS}convInit\.conv\.weight", _PLAIN_RULES),
    arguments={"norm": "group"},
    prepare=numbered_output,
    facts=Facts(
        axes="xyz",
        told="who trained it, on which images, is not in the file: its axes are taken to be MONAI's (x, y, z), its normalisation "
        "in groups of 8, as MONAI's class has unless told otherwise; choose -am median or fixed, and --normalization",
    ),
)

SEG_RES_NETS = (CT_FM_SSL, ANY_DS_WITH_STATISTICS, ANY_DS, VISTA3D, SUPREM_SEGRESNET, ANY_SEGRESNET)
