"""The contrast-agnostic spinal cord network of the Spinal Cord Toolbox, known by its size.

Its sources are listed in its project (sct-pipeline/contrast-agnostic-softseg-spinalcord). It was trained with MONAI on
(x, y, z) arrays; releases from v3 on are nnU-Net model folders, which have plans of their own.
"""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.families.family import Facts, Family
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION
from nnssl_adapt.weights.network.topology import Topology

CITATION: dict[str, Any] = {
    "type": "Pretraining",
    "name": "contrast-agnostic spinal cord segmentation",
    "apa_citations": [
        "Bédard, S., Karthik, E. N., Tsagkas, C., et al. (2025). Towards contrast-agnostic soft segmentation of the spinal "
        "cord. Medical Image Analysis."
    ],
}


def is_contrast_agnostic(topology: Topology) -> bool:
    """Whether it is the contrast-agnostic network by its size; an older release has 384 features at the bottom."""
    kwargs = topology.architecture.kwargs
    if topology.architecture.class_name != "PlainConvUNet":
        return False
    features = kwargs["features_per_stage"]
    return (
        features[:4] == [32, 64, 128, 256]
        and len(features) == 6
        and set(features[4:]) <= {320, 384}
        and topology.channels == 1
        and kwargs["n_conv_per_stage"] == [2] * 6
        and kwargs["strides"] == [[1, 1, 1], *([[2, 2, 2]] * 4), [1, 2, 2]]
    )


CONTRAST_AGNOSTIC = Family(
    name="the contrast-agnostic spinal cord network",
    facts=Facts(
        spacing=(1.0, 1.0, 1.0),
        patch_size=(64, 192, 320),
        orientation="RPI",
        supervised=True,
        axes="xyz",
        citations=(NNUNET_CITATION, CITATION),
        told="it has the contrast-agnostic network's size: took its spacing (1 mm), patch and orientation (RPI)",
    ),
    recognises=is_contrast_agnostic,
)
