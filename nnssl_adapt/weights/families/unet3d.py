"""UNet3D: Models Genesis (``Genesis_Chest_CT.pt``), SuPreM's (``supervised_suprem_unet_2100.pth``), and fine-tuned ones.

Its normalisation (``ContBatchNorm3d``) goes by the statistics of what passes through it, in evaluation too: those that it
stores are never used, and are left behind. Ours does so over the batch in training, and over each image alone in evaluation,
which is the same for a batch of one: a prediction does not depend on the tiles that are computed along with it.

Names, sizes and activation are those of the published code; no weight file was seen. Kernels are symmetric in their axes, so
that those of (x, y, z) arrays are turned, exactly.
"""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.families.family import Facts, Family, KeyMap, Window
from nnssl_adapt.weights.families.swin_unetr import SUPREM
from nnssl_adapt.weights.network.network_parts import Tensors

_WRAPPERS = r"(?:(?:module|backbone|network|model|net)\.)*"
_LAYER = r"(weight|bias)"
_DOWN, _UP = ("64", "128", "256", "512"), ("256", "128", "64")

Rules = tuple[tuple[str, str | None], ...]


def _stage_rules(there: str, here: str) -> Rules:
    return (
        (rf"{_WRAPPERS}{there}\.ops\.([01])\.conv1\.{_LAYER}", rf"{here}.convs.\1.conv.\2"),
        (rf"{_WRAPPERS}{there}\.ops\.([01])\.bn1\.{_LAYER}", rf"{here}.convs.\1.norm.\2"),
    )


_RULES: Rules = (
    *(rule for s, width in enumerate(_DOWN) for rule in _stage_rules(f"down_tr{width}", f"encoder.stages.{s}")),
    *(rule for s, width in enumerate(_UP) for rule in _stage_rules(f"up_tr{width}", f"decoder.stages.{s}")),
    *((rf"{_WRAPPERS}up_tr{w}\.up_conv\.{_LAYER}", rf"decoder.transpconvs.{s}.\1") for s, w in enumerate(_UP)),
    (rf"{_WRAPPERS}out_tr\.final_conv\.{_LAYER}", r"decoder.seg_layers.2.\1"),
    (rf"{_WRAPPERS}(?:down|up)_tr\d+\.ops\.[01]\.bn1\.(?:running_mean|running_var|num_batches_tracked)", None),
    (rf"{_WRAPPERS}(?:precls_conv|GAP|controller|organ_embedding|text_to_vision)(?:\..+)?", None),
)
_MARKER = rf"{_WRAPPERS}down_tr64\.ops\.0\.conv1\.weight"
_ARGUMENTS: dict[str, Any] = {"norm": "own_statistics", "slope": 0.0, "narrows": False}

GENESIS: dict[str, Any] = {
    "type": "Pretraining",
    "name": "Models Genesis",
    "apa_citations": ["Zhou, Z., et al. (2021). Models Genesis. Medical Image Analysis, 67, 101840."],
}

_STATISTICS = "its normalisation goes by the images' own statistics: stored ones are left behind"


def _outputs(tensors: Tensors) -> int:
    """0 where there is no output layer."""
    return next((len(t) for name, t in tensors.items() if name.endswith("out_tr.final_conv.weight")), 0)


MODELS_GENESIS = Family(
    name="a UNet3D of Models Genesis",
    key_map=KeyMap(_MARKER, _RULES),
    fits=lambda tensors: _outputs(tensors) == 1,
    arguments=_ARGUMENTS,
    facts=Facts(
        patch_size=(64, 64, 32),
        window=Window(-1000.0, 1000.0),
        axes="xyz",
        supervised=False,
        citations=(GENESIS,),
        told="it was trained on chest CT at each image's own spacing: choose -am no_resample, median or fixed; its decoder has "
        f"learned to reconstruct images: --scope encoder+decoder takes it too; {_STATISTICS}",
        second_hand=("that a UNet3D with a single output is Models Genesis'",),
    ),
)
SUPREM_UNET = Family(
    name="a UNet3D of SuPreM",
    key_map=KeyMap(_MARKER, _RULES),
    fits=lambda tensors: any(name.rpartition(".")[2] == "organ_embedding" for name in tensors),
    arguments=_ARGUMENTS,
    facts=Facts(
        spacing=(1.5, 1.5, 1.5),
        patch_size=(96, 96, 96),
        window=Window(-175.0, 250.0),
        orientation="LPI",
        axes="xyz",
        supervised=True,
        citations=(SUPREM,),
        told="spacing (1.5 mm) and window of SuPreM's code; the file has no output layer of an ordinary kind; "
        f"{_STATISTICS}",
    ),
)
ANY_UNET3D = Family(
    name="a UNet3D",
    key_map=KeyMap(_MARKER, _RULES),
    arguments=_ARGUMENTS,
    facts=Facts(
        axes="xyz",
        told="who trained it, on which images, is not in the file: its axes are taken to be (x, y, z), as of Models Genesis; "
        f"choose -am median or fixed, and --normalization; {_STATISTICS}",
    ),
)

UNET3DS = (SUPREM_UNET, MODELS_GENESIS, ANY_UNET3D)
