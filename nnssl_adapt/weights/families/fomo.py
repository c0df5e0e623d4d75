"""FOMO's masked autoencoder (AMAES) on a residual U-Net: FOMO-MRI/AMAES_resenc_b_fomo300k and fomo260k.

Lightning files of asparagus, whose network is gardening_tools' ResidualEncoderUNet without skip connections. Its encoder is
that of dynamic_network_architectures under other names and computes the same. In its decoder a dropout stands between
convolution and normalisation, so that the normalisation is the third of ``all_modules``.

Names, patch and network are those of the published code. That images are RAS arrays in the order (x, y, z), as asparagus reads
them, is second-hand: no weight file was seen.
"""

from nnssl_adapt.weights.families.family import Facts, Family, KeyMap

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
