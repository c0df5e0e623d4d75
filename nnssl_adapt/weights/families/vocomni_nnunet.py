"""VoComni's plain U-Net (``VoComni_nnunet.pt`` of Luffy503/VoComni): supervised on pseudo-labels of 20 thousand CT.

The network is nnU-Net's PlainConvUNet of six stages under its own names, so that it is known by its size and by the file's name.
No plan lies beside it. That it was trained with MONAI's preprocessing is its authors' code; the number of its outputs is
second-hand.
"""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.families.family import Facts, Family, Window
from nnssl_adapt.weights.network.topology import Topology

FEATURES = [32, 64, 128, 256, 320, 320]

CITATION: dict[str, Any] = {
    "type": "Pretraining",
    "name": "VoCo",
    "apa_citations": [
        "Wu, L., Zhuang, J., & Chen, H. (2026). Large-Scale 3D Medical Image Pre-training with Geometric Context Priors. "
        "IEEE Transactions on Pattern Analysis and Machine Intelligence."
    ],
}

LABELS = (
    *("background", "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior_vena_cava", "veins", "pancreas", "adrenal_gland_right", "adrenal_gland_left", "liver_tumor"),
    *("pancreas_tumor", "kidney_tumor", "covid", "colon", "colon_cancer", "lung_cancer"),
)


def is_six_stage_plain(topology: Topology) -> bool:
    """Whether it is nnU-Net's plain U-Net of six stages with the usual widths."""
    kwargs = topology.architecture.kwargs
    return topology.architecture.class_name == "PlainConvUNet" and kwargs["features_per_stage"] == FEATURES


VOCOMNI_NNUNET = Family(
    name="VoComni's plain U-Net",
    facts=Facts(
        spacing=(1.5, 1.5, 1.5),
        patch_size=(96, 96, 96),
        window=Window(-175, 250),
        labels=LABELS,
        orientation="LPI",
        supervised=True,
        axes="xyz",
        citations=(CITATION,),
        told="it is VoComni's plain U-Net by its name and size: took 1.5 mm, patch 96³ and orientation RAS (LPI)",
        second_hand=("its spacing and patch", "its 21 outputs"),
    ),
    recognises=is_six_stage_plain,
    named=r"(?i)vocomni.*nnunet.*",
)
