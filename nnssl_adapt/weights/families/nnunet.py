"""Networks that nnU-Net trained: their plans are nnU-Net's own files, so that only what is not in them stands here."""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.network.architectures import Architecture

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


def architecture_of_trainer(trainer_name: object) -> Architecture | None:
    """The Primus that a trainer of nnU-Net's builds whatever its plans say; None for all that follow the plans."""
    if not isinstance(trainer_name, str):
        return None
    for preset, trainer in PRIMUS_TRAINERS.items():
        if trainer_name == trainer or trainer_name.startswith(f"{trainer}_"):
            return architecture_of_preset(preset)
    return None


def architecture_of_preset(preset: str) -> Architecture:
    """The network that nnU-Net's trainers of this preset build."""
    return Architecture.named(preset)


def trained_by_nnunet(trainer_name: object) -> bool:
    """Whether a trainer of this name is one of nnU-Net's."""
    return isinstance(trainer_name, str) and trainer_name.startswith(("nnUNetTrainer", "nnUNet_"))
