"""The families that are known, and which of them a file is of. A new one is added to :data:`FAMILIES`."""

from __future__ import annotations

from nnssl_adapt.weights.families.contrast_agnostic import CONTRAST_AGNOSTIC
from nnssl_adapt.weights.families.family import Family
from nnssl_adapt.weights.families.fomo import FOMO_AMAES
from nnssl_adapt.weights.families.nnunet_v1 import NNUNET_V1
from nnssl_adapt.weights.families.not_supported import NOT_SUPPORTED
from nnssl_adapt.weights.families.segresnet import SEG_RES_NETS
from nnssl_adapt.weights.families.stu_net import STU_NET
from nnssl_adapt.weights.families.swin_unetr import SWIN_UNETRS
from nnssl_adapt.weights.network.network_parts import Tensors
from nnssl_adapt.weights.network.topology import Topology

FAMILIES: tuple[Family, ...] = (
    CONTRAST_AGNOSTIC,
    FOMO_AMAES,
    NNUNET_V1,
    STU_NET,
    *SWIN_UNETRS,
    *SEG_RES_NETS,
    *NOT_SUPPORTED,
)


def family_of_names(tensors: Tensors) -> Family | None:
    """The family whose files name their tensors in this way, None for names of our own networks."""
    named = (f for f in FAMILIES if f.key_map is not None and f.key_map.fits(tensors))
    return next((f for f in named if f.fits is None or f.fits(tensors)), None)


def family_of_size(topology: Topology) -> Family | None:
    """The family that has networks of exactly this size, None where none is known."""
    return next((f for f in FAMILIES if f.recognises is not None and f.recognises(topology)), None)
