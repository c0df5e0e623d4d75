"""Networks that nnU-Net trained: their plans are nnU-Net's own files, so that only what is not in them stands here."""

from __future__ import annotations

from typing import Any

NNUNET_CITATION: dict[str, Any] = {
    "type": "Framework",
    "name": "nnU-Net",
    "apa_citations": [
        "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a self-configuring "
        "method for deep learning-based biomedical image segmentation. Nature Methods, 18(2), 203–211."
    ],
}


def trained_by_nnunet(trainer_name: object) -> bool:
    """Whether a trainer of this name is one of nnU-Net's."""
    return isinstance(trainer_name, str) and trainer_name.startswith(("nnUNetTrainer", "nnUNet_"))
