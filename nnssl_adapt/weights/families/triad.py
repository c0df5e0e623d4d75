"""Triad's plain encoder (wangshansong1/Triad): PlainConvUNet's, pre-trained on MRI by masking (MAE, SimMIM).

Known by its size and by the file's name. Its weights lie where no program fetches them, and no file was seen: names of tensors,
spacing, patch and normalisation are not known.
"""

from nnssl_adapt.weights.families.family import Facts, Family
from nnssl_adapt.weights.families.vocomni_nnunet import is_six_stage_plain

TRIAD_PLAIN = Family(
    name="Triad's plain encoder",
    facts=Facts(
        supervised=False,
        citations=(
            {
                "type": "Pretraining",
                "name": "Triad",
                "apa_citations": [
                    "Wang, S., Safari, M., Li, Q., et al. (2025). Triad: Vision Foundation Model for 3D Magnetic Resonance "
                    "Imaging. arXiv:2502.14064."
                ],
            },
        ),
        told="it is Triad's plain encoder by its name and size; its spacing is not known: choose -am median or fixed",
        second_hand=("that its images were z-scored (z, y, x) arrays",),
    ),
    recognises=is_six_stage_plain,
    named=r"(?i).*triad.*",
)
