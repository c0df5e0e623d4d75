"""STU-Net (uni-medical/STU-Net): S, B, L and H, supervised on TotalSegmentator's 104 classes with nnU-Net version 1.

Files of nnU-Net version 1 (``base_ep4k.model`` with ``base_ep4k.model.pkl`` beside it), and model folders of nnU-Net version 2,
whose trainers (``STUNetTrainer_small``, …) keep the network's names. Names, network, labels and the plan's numbers are those of
the published code and files; no weight file was seen.
"""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.families import nnunet_v1
from nnssl_adapt.weights.families.family import Facts, Family, KeyMap
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION
from nnssl_adapt.weights.network.stu_net import STRIDES, steps_of_plans

_LAYER = r"(weight|bias)"
_BLOCK = r"(\d+)\.(\d+)\.(conv[123]|norm[12])"

CITATION: dict[str, Any] = {
    "type": "Pretraining",
    "name": "STU-Net",
    "apa_citations": [
        "Huang, Z., Wang, H., Deng, Z., et al. (2023). STU-Net: Scalable and Transferable Medical Image Segmentation Models "
        "Empowered by Large-Scale Supervised Pre-training. arXiv:2304.06716."
    ],
}

_SIDES = ("left", "right")
_RIBS = [1, 10, 11, 12, *range(2, 10)]
_THORACIC = [1, 10, 11, 12, *range(2, 10)]

LABELS = (
    "background",
    *(f"adrenal_gland_{side}" for side in _SIDES),
    "aorta",
    *(f"autochthon_{side}" for side in _SIDES),
    "brain",
    *(f"clavicula_{side}" for side in _SIDES),
    *("colon", "duodenum", "esophagus", "face"),
    *(f"femur_{side}" for side in _SIDES),
    "gallbladder",
    *(f"gluteus_{part}_{side}" for part in ("maximus", "medius", "minimus") for side in _SIDES),
    *(f"heart_atrium_{side}" for side in _SIDES),
    "heart_myocardium",
    *(f"heart_ventricle_{side}" for side in _SIDES),
    *(f"{bone}_{side}" for bone in ("hip", "humerus") for side in _SIDES),
    *(f"iliac_{vessel}_{side}" for vessel in ("artery", "vena") for side in _SIDES),
    *(f"iliopsoas_{side}" for side in _SIDES),
    "inferior_vena_cava",
    *(f"kidney_{side}" for side in _SIDES),
    "liver",
    *("lung_lower_lobe_left", "lung_lower_lobe_right", "lung_middle_lobe_right"),
    *("lung_upper_lobe_left", "lung_upper_lobe_right"),
    *("pancreas", "portal_vein_and_splenic_vein", "pulmonary_artery"),
    *(f"rib_{side}_{number}" for side in _SIDES for number in _RIBS),
    "sacrum",
    *(f"scapula_{side}" for side in _SIDES),
    *("small_bowel", "spleen", "stomach", "trachea", "urinary_bladder"),
    *(f"vertebrae_C{number}" for number in range(1, 8)),
    *(f"vertebrae_L{number}" for number in range(1, 6)),
    *(f"vertebrae_T{number}" for number in _THORACIC),
)
"""Of the 105 outputs, in the order of the authors' ``label_orders.json``: the alphabet's."""


def trained_as(content: Any, where: str, folder: str) -> dict[str, Any]:
    """As :func:`nnunet_v1.trained_as`, with the strides, which the network's tensors don't tell."""
    found = nnunet_v1.trained_as(content, where, folder)
    planned = [[1, 1, 1], *nnunet_v1.pooling(content, where, folder)]
    return {**found, "arguments": {"strides": steps_of_plans(planned)}}


STU_NET = Family(
    name="a STU-Net",
    key_map=KeyMap(
        marker=r"conv_blocks_context\.0\.0\.conv1\.weight",
        rules=(
            (rf"conv_blocks_context\.{_BLOCK}\.{_LAYER}", r"encoder.stages.\1.blocks.\2.\3.\4"),
            (rf"conv_blocks_localization\.{_BLOCK}\.{_LAYER}", r"decoder.stages.\1.blocks.\2.\3.\4"),
            (rf"upsample_layers\.(\d+)\.conv\.{_LAYER}", r"decoder.transpconvs.\1.\2"),
            (rf"seg_outputs\.(\d+)\.{_LAYER}", r"decoder.seg_layers.\1.\2"),
        ),
    ),
    facts=Facts(
        spacing=(1.5, 1.5, 1.5),
        patch_size=(128, 128, 128),
        supervised=True,
        labels=LABELS,
        citations=(NNUNET_CITATION, CITATION),
        told="its .model.pkl is not beside it: took the published plan (1.5 mm, patch 128³, z-score although CT, strides "
        "1-2-2-2-2-[1,1,2])",
    ),
    arguments={"strides": STRIDES},
    beside=trained_as,
)
