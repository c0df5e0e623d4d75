"""Networks that nnU-Net trained: their plans are nnU-Net's own files, so that only what is not in them stands here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.network.stu_net import steps_of_plans

NNUNET_CITATION: dict[str, Any] = {
    "type": "Framework",
    "name": "nnU-Net",
    "apa_citations": [
        "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a self-configuring "
        "method for deep learning-based biomedical image segmentation. Nature Methods, 18(2), 203–211."
    ],
}


PRIMUS_TRAINERS = {
    **{f"Primus{size}": f"nnUNet_Primus_{size}_Trainer" for size in "SBML"},
    **{f"PrimusV{v}{size}": f"nnUNet_PrimusV{v}{size}_Trainer" for v in (2, 3) for size in "SBML"},
}
"""nnU-Net's trainers (2.8) that build a Primus whatever their plans say: preset → trainer. Variants of a trainer have a
longer name (``nnUNet_Primus_M_Trainer_BS8``)."""


STU_NET_TRAINERS = {
    "STUNetTrainer": "STUNetB",
    **{
        f"STUNetTrainer_{word}{end}": f"STUNet{word[0].upper()}"
        for word in ("small", "base", "large", "huge")
        for end in ("", "_ft")
    },
}
"""Trainers of STU-Net's authors for nnU-Net 2 → preset. Of the plans they take the steps between the resolutions."""


def architecture_of_trainer(
    trainer_name: object, planned: Callable[[], Architecture] | None = None
) -> Architecture | None:
    """The network that a trainer builds whatever its plans say (a Primus, a STU-Net); None for all that follow the plans.

    ``planned`` gives the plans' own network, whose strides a STU-Net has; without it a STU-Net is None.
    """
    if not isinstance(trainer_name, str):
        return None
    for preset, trainer in PRIMUS_TRAINERS.items():
        if trainer_name == trainer or trainer_name.startswith(f"{trainer}_"):
            return architecture_of_preset(preset)
    if trainer_name in STU_NET_TRAINERS and planned is not None:
        network = architecture_of_preset(STU_NET_TRAINERS[trainer_name])
        return replace(network, kwargs={**network.kwargs, "strides": steps_of_plans(planned().strides)})
    return None


def architecture_of_preset(preset: str) -> Architecture:
    """The network that nnU-Net's trainers of this preset build."""
    return Architecture.named(preset)


def trained_by_nnunet(trainer_name: object) -> bool:
    """Whether a trainer of this name is one of nnU-Net's."""
    return isinstance(trainer_name, str) and (
        trainer_name.startswith(("nnUNetTrainer", "nnUNet_")) or trainer_name in STU_NET_TRAINERS
    )


# -- when it was trained -----------------------------------------------------------------------------------------------

FIRST_WHD, WHD_RELEASED = date(2025, 10, 29), date(2026, 1, 23)
"""Since when dynamic-network-architectures flattens a Primus's tokens (w h d) instead of (h w d): in its repository, and as
a release (0.4.3). Read off the files of its releases: 0.4.1 and 0.4.2 (June 2025) have (h w d), 0.4.3 and 0.4.4 (w h d)."""


def token_order_by_date(ended: date | None) -> tuple[str, str, bool]:
    """Token order of a Primus V1 that nnU-Net trained until a day, the reason, and whether that is certain."""
    what = "dynamic-network-architectures"
    if ended is None:
        return "whd", f"nnU-Net trained it, with {what} 0.4.3 (January 2026) or later", False
    if ended < FIRST_WHD:
        return "hwd", f"nnU-Net trained it until {ended}, when {what} had no other order", True
    if ended < WHD_RELEASED:
        return "hwd", f"nnU-Net trained it until {ended}, when all releases of {what} had this order", False
    return "whd", f"nnU-Net trained it until {ended}, and {what} has this order since {WHD_RELEASED}", False
