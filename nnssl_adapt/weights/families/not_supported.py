"""Published networks that are known by the names of their tensors and can't be used yet: a file is called what it is."""

from nnssl_adapt.weights.families.family import Facts, Family, KeyMap

_INSTEAD = "only ResEnc and plain U-Nets, Primus, Swin UNETR and SegResNet can be fine-tuned here (docs/weights.md)"


def _named(name: str, marker: str) -> Family:
    return Family(name, Facts(), KeyMap(marker, ()), refusal=_INSTEAD)


NOT_SUPPORTED = (
    _named("a UNet3D of Models Genesis", r"(?:.+\.)?down_tr64\.ops\.0\.conv1\.weight"),
    _named("a U-Net with max pooling (FOMO25's baseline)", r"(?:.+\.)?encoder\.in_conv\.conv1\.conv\.weight"),
)
