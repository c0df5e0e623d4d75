"""FOMO's networks: masked autoencoders (AMAES) on a residual U-Net, and FOMO25's baseline U-Nets (unet_b, unet_xl).

FOMO-MRI/AMAES_resenc_b_fomo300k and fomo260k are Lightning files of asparagus, whose network is gardening_tools'
ResidualEncoderUNet without skip connections. Its encoder is that of dynamic_network_architectures under other names and computes
the same. In its decoder a dropout stands between convolution and normalisation, so that the normalisation is the third of
``all_modules``.

FOMO25/baseline_pretrained_models are Lightning files too. Their U-Net pools by maxima; gardening_tools has the same class, whose
layers stand in the file twice.

Names, patches and networks are those of the published code. That images are RAS arrays in the order (x, y, z), as asparagus reads
them, is second-hand: no weight file was seen.
"""

from __future__ import annotations

from typing import Any

from torch import equal

from nnssl_adapt.errors import UnreadableCheckpoint
from nnssl_adapt.weights.families.family import Facts, Family, KeyMap
from nnssl_adapt.weights.network.network_parts import Tensors

_LAYER = r"(weight|bias)"
_BLOCK = r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv[12]|skip\.1)"
_DECODED = r"decoder\.decoder_convs\.(\d+)\.conv1"

FOMO_AMAES = Family(
    name="a masked autoencoder of FOMO (AMAES, residual U-Net)",
    key_map=KeyMap(
        marker=r"encoder\.stem\.conv1\.norm_op\.weight",
        rules=(
            (rf"encoder\.stem\.conv1\.(conv|all_modules\.[01])\.{_LAYER}", r"encoder.stem.convs.0.\1.\2"),
            (rf"encoder\.stem\.conv1\.norm_op\.{_LAYER}", r"encoder.stem.convs.0.norm.\1"),
            (rf"{_BLOCK}\.(conv|all_modules\.[01])\.{_LAYER}", r"encoder.stages.\1.blocks.\2.\3.\4.\5"),
            (rf"{_BLOCK}\.norm_op\.{_LAYER}", r"encoder.stages.\1.blocks.\2.\3.norm.\4"),
            (rf"decoder\.upsample_layers\.(\d+)\.{_LAYER}", r"decoder.transpconvs.\1.\2"),
            (rf"{_DECODED}\.(conv|all_modules\.0)\.{_LAYER}", r"decoder.stages.\1.convs.0.\2.\3"),
            (rf"{_DECODED}\.norm_op\.{_LAYER}", r"decoder.stages.\1.convs.0.norm.\2"),
            (rf"{_DECODED}\.all_modules\.2\.{_LAYER}", r"decoder.stages.\1.convs.0.all_modules.1.\2"),
            (r"decoder\.(out_conv|ds_out_convs)\..+", None),
            (r"mask_token", None),
        ),
    ),
    facts=Facts(
        patch_size=(160, 160, 160),
        supervised=False,
        axes="xyz",
        citations=(
            {
                "type": "Pretraining",
                "name": "FOMO300K",
                "apa_citations": ["FOMO-MRI/AMAES_resenc_b_fomo300k, Hugging Face."],
            },
        ),
        told="its spacing is not known: choose -am median or fixed. That it was trained on (x, y, z) arrays of RAS images is "
        "taken from its authors' code",
    ),
)


# -- FOMO25's baseline -------------------------------------------------------------------------------------------------

_OURS = {"in_conv": "encoder.stages.0", **{f"encoder_conv{n}": f"encoder.stages.{n}" for n in range(1, 5)}}
_HEADS = r"(?:decoder|rec_head|pred_head)"


def _baseline_rules() -> tuple[tuple[str, str | None], ...]:
    """Names of the baseline's code, and of gardening_tools' class, where every layer stands twice."""
    rules: list[tuple[str, str | None]] = []
    theirs = {rf"encoder\.{name}": ours for name, ours in _OURS.items()}
    theirs |= {rf"{_HEADS}\.decoder_conv{n}": f"decoder.stages.{n - 1}" for n in range(1, 5)}
    for there, here in theirs.items():
        for conv in (0, 1):
            layer = rf"{there}\.conv{conv + 1}"
            rules += [
                (rf"{layer}\.conv\.{_LAYER}", rf"{here}.convs.{conv}.conv.\1"),
                (rf"{layer}\.norm(?:_op)?\.{_LAYER}", rf"{here}.convs.{conv}.norm.\1"),
                (rf"{layer}\.all_modules\.0\.{_LAYER}", rf"{here}.convs.{conv}.conv{_TWICE}.\1"),
                (rf"{layer}\.all_modules\.[12]\.{_LAYER}", rf"{here}.convs.{conv}.norm{_TWICE}.\1"),
            ]
    rules += [(rf"{_HEADS}\.upsample{n}\.{_LAYER}", rf"decoder.transpconvs.{n - 1}.\1") for n in range(1, 5)]
    rules += [(rf"{_HEADS}\.out_conv\.{_LAYER}", r"decoder.seg_layers.3.\1")]
    rules += [(rf"{_HEADS}\.ds_out_conv\d\..+", None), (r"mask_token", None)]
    return tuple(rules)


_TWICE = "@twice"


def once(tensors: Tensors) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors without the second names that gardening_tools' layers have."""
    second = {name: name.replace(_TWICE, "") for name in tensors if _TWICE in name}
    differing = [here for name, here in second.items() if here in tensors and not equal(tensors[name], tensors[here])]
    if differing:
        raise UnreadableCheckpoint(f"{differing[0]} has two values under its two names: the file is damaged")
    kept = {second.get(name, name): tensor for name, tensor in tensors.items()}
    note = f"{len(second)} second names of its layers left out, whose values are the same"
    return kept, (note,) if second else ()


FOMO25_BASELINE = Family(
    name="a baseline U-Net of FOMO25 (max pooling)",
    key_map=KeyMap(marker=r"encoder\.in_conv\.conv1\.conv\.weight", rules=_baseline_rules()),
    arguments={"norm": "instance", "slope": 0.01, "narrows": True},
    prepare=once,
    facts=Facts(
        spacing=(1.0, 1.0, 1.0),
        patch_size=(96, 96, 96),
        orientation="LPI",
        supervised=False,
        axes="xyz",
        citations=(
            {
                "type": "Pretraining",
                "name": "FOMO25 baseline",
                "apa_citations": ["FOMO25/baseline_pretrained_models, Hugging Face."],
            },
        ),
        told="spacing (1 mm), patch and orientation (RAS) of its authors' code; z-score over each whole image",
        second_hand=("how its file is wrapped",),
    ),
)
