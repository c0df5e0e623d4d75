"""nnInteractive (nnInteractive/nnInteractive): nnU-Net's ResEncL with eight input channels, of which the first is the image.

The others are what a user has drawn (the last segmentation; boxes or lassos, points, scribbles, each positive and negative) and
are zero where nobody draws. Without them the network computes what it computes from the image's channel alone, so that this one
is kept and the others are left behind. The network has two outputs whatever its dataset.json says.
"""

from typing import Any

from nnssl_adapt.weights.families.family import Facts, Family

CITATION: dict[str, Any] = {
    "type": "Pretraining",
    "name": "nnInteractive",
    "apa_citations": [
        "Isensee, F., Rokuss, M., Krämer, L., et al. (2025). nnInteractive: Redefining 3D Promptable Segmentation. "
        "arXiv:2503.08373."
    ],
}

NNINTERACTIVE = Family(
    name="nnInteractive",
    facts=Facts(supervised=True, citations=(CITATION,)),
    dataset=r"Dataset\d+_nnInteractive.*",
    image_channels=(0,),
)
