"""Networks of published sizes, by the names they are known by.

ResEnc-L as in "Revisiting MAE pre-training for 3D medical image segmentation" (arXiv 2410.23132), Primus-S/B/M/L as in the
Primus paper (arXiv 2503.01835).
"""

from __future__ import annotations

from typing import Any

from nnssl_adapt.weights.network import stu_net

_RES_ENC_L = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "Conv3d",
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2, 2, 2],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1, 1, 1, 1, 1],
    "conv_bias": True,
    "norm_op": "InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def _primus(embed_dim: int, depth: int, heads: int) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "patch_embed_size": [8, 8, 8],
        "eva_depth": depth,
        "eva_numheads": heads,
        "drop_path_rate": 0.2,
        "init_values": 0.1,
        "scale_attn_inner": True,
    }


_PRIMUS_SIZES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
"""Width, blocks and attention heads of the published networks. V2 and V3 have other tokenizers (several convolutions)."""

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResEncL": ("ResidualEncoderUNet", _RES_ENC_L),
    # Pre-trained without skip connections; its encoder is ResEnc-L's, and fine-tuning adds the skips.
    "NoSkipResEncL": ("ResidualEncoderUNet", _RES_ENC_L),
    **{
        f"Primus{version}{letter}": (f"Primus{version}", _primus(*size))
        for version in ("", "V2", "V3")
        for letter, size in _PRIMUS_SIZES.items()
    },
    **{f"STUNet{letter}": (stu_net.CLASS_NAME, stu_net.published(letter)) for letter in stu_net.SIZES},
}
"""Name → name of the class, and its arguments."""
