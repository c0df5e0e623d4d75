"""nnU-Net version 1: ``model_final_checkpoint.model``, a state dict of its Generic_UNet.

The network is today's PlainConvUNet under other names (strided convolutions, instance normalisation, leaky ReLU of slope
0.01, transposed convolutions without bias), so that it is taken over exactly. Names as nnunet 1.7.1 writes them. What it was
preprocessed like stands in the ``.model.pkl`` beside it, a pickle, which is not read.
"""

from nnssl_adapt.weights.families.family import Facts, Family, KeyMap
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION

_LAYER = r"(weight|bias)"

NNUNET_V1 = Family(
    name="a network of nnU-Net version 1",
    key_map=KeyMap(
        marker=r"conv_blocks_context\.0\.blocks\.0\.conv\.weight",
        rules=(
            (rf"conv_blocks_context\.(\d+)\.blocks\.(\d+)\.conv\.{_LAYER}", r"encoder.stages.\1.0.convs.\2.conv.\3"),
            (
                rf"conv_blocks_context\.(\d+)\.blocks\.(\d+)\.instnorm\.{_LAYER}",
                r"encoder.stages.\1.0.convs.\2.norm.\3",
            ),
            # The deepest stage is two stacks of one convolution each, and so are all of the decoder's.
            (rf"conv_blocks_context\.(\d+)\.(\d)\.blocks\.0\.conv\.{_LAYER}", r"encoder.stages.\1.0.convs.\2.conv.\3"),
            (
                rf"conv_blocks_context\.(\d+)\.(\d)\.blocks\.0\.instnorm\.{_LAYER}",
                r"encoder.stages.\1.0.convs.\2.norm.\3",
            ),
            (
                rf"conv_blocks_localization\.(\d+)\.(\d)\.blocks\.0\.conv\.{_LAYER}",
                r"decoder.stages.\1.convs.\2.conv.\3",
            ),
            (
                rf"conv_blocks_localization\.(\d+)\.(\d)\.blocks\.0\.instnorm\.{_LAYER}",
                r"decoder.stages.\1.convs.\2.norm.\3",
            ),
            (r"tu\.(\d+)\.weight", r"decoder.transpconvs.\1.weight"),
            (r"seg_outputs\.(\d+)\.weight", r"decoder.seg_layers.\1.weight"),
        ),
    ),
    facts=Facts(
        supervised=True,
        citations=(NNUNET_CITATION,),
        told="the spacing, patch and normalisation of a model of nnU-Net version 1 stand in its .pkl files, which are not read: "
        "choose -am median or fixed, and --normalization",
    ),
)
