"""The families that are known, and which of them a file is of. A new one is added to :data:`FAMILIES`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from nnssl_adapt.errors import UnreadableCheckpoint
from nnssl_adapt.weights.families.contrast_agnostic import CONTRAST_AGNOSTIC
from nnssl_adapt.weights.families.family import Family
from nnssl_adapt.weights.families.fomo import FOMO25_BASELINE, FOMO_AMAES
from nnssl_adapt.weights.families.nninteractive import NNINTERACTIVE
from nnssl_adapt.weights.families.nnunet_v1 import NNUNET_V1
from nnssl_adapt.weights.families.segresnet import SEG_RES_NETS
from nnssl_adapt.weights.families.stu_net import STU_NET
from nnssl_adapt.weights.families.swin_unetr import SWIN_UNETRS
from nnssl_adapt.weights.families.triad import TRIAD_PLAIN
from nnssl_adapt.weights.families.unet3d import UNET3DS
from nnssl_adapt.weights.families.vocomni_nnunet import VOCOMNI_NNUNET
from nnssl_adapt.weights.network.topology import Topology

FAMILIES: tuple[Family, ...] = (
    VOCOMNI_NNUNET,
    TRIAD_PLAIN,
    CONTRAST_AGNOSTIC,
    NNINTERACTIVE,
    FOMO_AMAES,
    FOMO25_BASELINE,
    NNUNET_V1,
    STU_NET,
    *SWIN_UNETRS,
    *SEG_RES_NETS,
    *UNET3DS,
)


def in_our_names(
    tensors: Mapping[str, Tensor], where: str, filenames: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Family | None, list[str]]:
    """The tensors under the names that our networks have, the family whose files have others (else None), and notes.

    ``filenames`` are those that the file is known by: its own, and the catalogue's.
    Raises UnreadableCheckpoint, naming the file (``where``), for a family that can't be used and for a name that it doesn't
    have.
    """
    family = next((f for f in FAMILIES if f.names_tensors(tensors, filenames)), None)
    if family is None or family.key_map is None:
        return dict(tensors), None, []
    if family.refusal is not None:
        raise UnreadableCheckpoint(f"{where} is {family.name}: {family.refusal}")
    names = family.key_map.translate(tensors, where)
    translated = {names[name]: tensor for name, tensor in tensors.items()}
    notes = [f"it is {family.name}: its tensors' names were translated"]
    if family.prepare is not None:
        translated, of_preparing = family.prepare(translated)
        notes += of_preparing
    return translated, family, notes


def family_of_size(topology: Topology, filename: str) -> Family | None:
    """The family that has networks of exactly this size, in files of such a name; None where none is known."""
    named = (f for f in FAMILIES if f.is_named((filename,)))
    return next((f for f in named if f.recognises is not None and f.recognises(topology)), None)


def family_of_dataset(name: object) -> Family | None:
    """The family whose models were trained on a dataset of this name (in nnU-Net's plans), None where none is known."""
    known = (f for f in FAMILIES if f.dataset is not None)
    return next((f for f in known if isinstance(name, str) and re.fullmatch(str(f.dataset), name)), None)
