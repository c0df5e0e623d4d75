"""Trainer names that nnU-Net's users type after ``-tr``, and the recipe that each stands for.

A table instead of classes: an entry is a recipe of ``configs/`` and the fields that differ, with the figures of the trainer of
that name in nnU-Net (master of July 2026, and the branch of its nnssl integration for "sawtooth" and "frozenEnc"). Where
we depart from one, a comment says so.
"""

from __future__ import annotations

import re
from typing import Any

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.text import did_you_mean
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS, STU_NET_TRAINERS

Entry = tuple[str, dict[str, Any]]

_NO_MIRRORING: dict[str, Any] = {"mirror_axes": ()}
_ANY_NETWORK: dict[str, Any] = {"network": None}
_FOR_150: dict[str, Any] = {"epochs": 150, "warmup_epochs": 15}
_FOR_300: dict[str, Any] = {"epochs": 300, "warmup_epochs": 15}
_SMALLER: dict[str, Any] = {"learning_rate": 3e-5, "weight_decay": 5e-2}
_DYNAMIC_ADAM: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-4}

TRAINER_ALIASES: dict[str, Entry] = {
    "PretrainedTrainer": ("default", {}),
    "PretrainedTrainer_150ep": ("short", {}),
    "PretrainedTrainer_300ep": ("short", _FOR_300),
    "PretrainedTrainer_nomirroring": ("default", _NO_MIRRORING),
    "PretrainedTrainer_150ep_nomirroring": ("short", _NO_MIRRORING),
    # Its weight decay is 5e-2 as well, and not that of PretrainedTrainer, which its name doesn't say.
    "PretrainedTrainer_smallerlr": ("default", _SMALLER),
    "PretrainedTrainer_150ep_50i": ("short", {"iterations_per_epoch": 50}),
    "PretrainedTrainer_100ep_50i": ("short", {"epochs": 100, "warmup_epochs": 10, "iterations_per_epoch": 50}),
    # AdamW with the figures of Primus, whatever the network.
    "PretrainedTrainer_adam_150ep": ("primus", {**_ANY_NETWORK, **_FOR_150}),
    "PretrainedTrainer_adam_150ep_nomirroring": ("primus", {**_ANY_NETWORK, **_FOR_150, **_NO_MIRRORING}),
    # nnU-Net's trainer of this name runs SGD at 1e-3. Ours is the Adam of the two above. Its folder has one underscore less,
    # since two separate the trainer's name from the plan's.
    "PretrainedTrainer_adam__nomirroring": ("primus", {**_ANY_NETWORK, **_NO_MIRRORING}),
    "DynamicPretrainedTrainer": ("default", {}),
    "DynamicPretrainedTrainer_nomirroring": ("default", _NO_MIRRORING),
    # AdamW again, but weight decay and clipping are those of the CNNs.
    "DynamicPretrainedTrainer_adam_150ep": ("short", _DYNAMIC_ADAM),
    "DynamicPretrainedTrainer_adam_150ep_nomirroring": ("short", {**_DYNAMIC_ADAM, **_NO_MIRRORING}),
    "PretrainedTrainer_Primus": ("primus", {}),
    "PretrainedTrainer_Primus_150ep": ("primus", _FOR_150),
    # "Primusx" is a Primus that the plan describes by its sizes instead of a letter; every plan of ours does.
    "PretrainedTrainer_Primusx": ("primus", {}),
    "PretrainedTrainer_Primusx_30ep": ("primus", {"epochs": 30, "warmup_epochs": 3}),
    "PretrainedTrainer_Primusx_150ep": ("primus", _FOR_150),
    "PretrainedTrainer_Primusx_300ep": ("primus", _FOR_300),
    "PretrainedTrainer_Primusx_smallerlr": ("primus", _SMALLER),
    "PretrainedTrainer_Primusx_150ep_lr3e4": (
        "primus",
        {"epochs": 150, "warmup_epochs": 50, "learning_rate": 3e-4},
    ),
    "PretrainedTrainer_Primusx_150ep_small_debug": (
        "primus",
        {**_FOR_150, "patch_size": (48, 48, 48), "batch_size": 2},
    ),
    "PretrainedTrainer_Primusx_nomirroring": ("primus", _NO_MIRRORING),
    "PretrainedTrainer_Primusx_150ep_nomirroring": ("primus", {**_FOR_150, **_NO_MIRRORING}),
    "PretrainedTrainer_sawtooth": ("sawtooth", {}),
    "PretrainedTrainer_sawtooth_150ep": ("sawtooth", {**_FOR_150, "decoder_warmup_epochs": 15}),
    "PretrainedTrainer_Primus_sawtooth": (
        "primus",
        {"decoder_warmup_epochs": 50, "decoder_warmup_learning_rate": 1e-6, "warmup_fraction": 0.5},
    ),
    "PretrainedTrainer_Primus_sawtooth_150ep": (
        "primus",
        {
            "epochs": 150,
            "decoder_warmup_epochs": 15,
            "decoder_warmup_learning_rate": 1e-5,
            "warmup_epochs": 50,
            "warmup_fraction": 50 / 65,
        },
    ),
    "PretrainedTrainer_Primus_frozenEnc": ("primus", {**_FOR_150, "freeze": "encoder"}),
    "PretrainedTrainer_from_scratch": ("from_scratch", {}),
}
"""Fine-tuning: the recipe, and the fields that differ. The model folder has the trainer's name."""


def _primus_scratch(preset: str, **changes: Any) -> Entry:
    return "primus", {"learning_rate": 3e-4, "network": preset, **changes}


STOCK_ALIASES: dict[str, Entry] = {
    "nnUNetTrainer": ("from_scratch", {"deep_supervision": True}),
    "nnUNetTrainerNoDeepSupervision": ("from_scratch", {}),
    "nnUNetTrainerNoMirroring": ("from_scratch", {"deep_supervision": True, **_NO_MIRRORING}),
    "nnUNetTrainer_onlyMirror01": ("from_scratch", {"deep_supervision": True, "mirror_axes": (0, 1)}),
    "nnUNetTrainerNoDA": ("from_scratch", {"deep_supervision": True, "augmentation": "none", **_NO_MIRRORING}),
    "nnUNetTrainerCosAnneal": ("from_scratch", {"deep_supervision": True, "schedule": "cosine"}),
    "nnUNetTrainer_warmup": ("from_scratch", {"deep_supervision": True, "warmup_epochs": 50}),
    "nnUNetTrainerDiceLoss": ("from_scratch", {"deep_supervision": True, "loss": "dice"}),
    "nnUNetTrainerDiceCELoss_noSmooth": ("from_scratch", {"deep_supervision": True, "dice_smooth": 0.0}),
    "nnUNetTrainerDiceTopK10Loss": ("from_scratch", {"deep_supervision": True, "loss": "dice_topk"}),
    "nnUNetTrainerCELoss": ("from_scratch", {"deep_supervision": True, "loss": "ce"}),
    "nnUNetTrainer_Loss_CE": ("from_scratch", {"deep_supervision": True, "loss": "ce"}),  # nnU-Net v1's name
    "nnUNetTrainerVanillaAdam": (
        "from_scratch",
        {"deep_supervision": True, "optimizer": "adam", "betas": (0.9, 0.999)},
    ),
    **{trainer: _primus_scratch(preset) for preset, trainer in PRIMUS_TRAINERS.items()},
    "nnUNet_Primus_M_Trainer_BS8": _primus_scratch("PrimusM", batch_size=8),
    "nnUNet_Primus_M_Trainer_BS8_2e4": _primus_scratch("PrimusM", batch_size=8, learning_rate=2e-4),
    # Of STU-Net's authors; those for fine-tuning (_ft) have a tenth of the learning rate.
    **{
        trainer: (
            "from_scratch",
            {
                "deep_supervision": True,
                "network": preset,
                **({"learning_rate": 1e-3} if trainer.endswith("_ft") else {}),
            },
        )
        for trainer, preset in STU_NET_TRAINERS.items()
    },
}
"""nnU-Net's own trainers: random weights, or the schedule that ``-pretrained_weights`` are fine-tuned on.

Their model folders begin with ``PretrainedTrainer_as_``: nnU-Net's own run of that name must not find our files in its folder.
"""


def resolve(trainer_name: str, pretrained: bool = False) -> Entry:
    """Return the recipe's name in ``configs/`` and the fields that change.

    Args:
        trainer_name: as typed.
        pretrained: whether weights were given along with it. nnU-Net's own trainers start from them then, as
            ``nnUNetv2_train -pretrained_weights`` does, and from random ones otherwise.

    Raises ConfigurationError for an unknown one, listing those there are.
    """
    if trainer_name in TRAINER_ALIASES:
        config, changes = TRAINER_ALIASES[trainer_name]
        return config, {"trainer_name": trainer_name.replace("__", "_"), **changes}
    if entry := _frozen_encoder(trainer_name):
        return entry
    stock = STOCK_ALIASES.get(trainer_name) or _of_length(trainer_name)
    if stock is None:
        raise ConfigurationError(_unknown(trainer_name))
    config, changes = stock
    name = f"PretrainedTrainer_as_{trainer_name}" + ("" if pretrained else "_from_scratch")
    return config, {**changes, "name": trainer_name, "from_scratch": not pretrained, "trainer_name": name}


def _of_length(trainer_name: str) -> Entry | None:
    """``nnUNetTrainer_250epochs``, ``nnUNetTrainerDiceCELoss_noSmooth_2000epochs`` and the like, for any number of them."""
    match = re.fullmatch(r"(nnUNetTrainer\w*?)_(\d+)epochs?(_NoMirroring)?", trainer_name)
    if match is None or match[1] not in STOCK_ALIASES:
        return None
    config, changes = STOCK_ALIASES[match[1]]
    return config, {**changes, "epochs": int(match[2]), **(_NO_MIRRORING if match[3] else {})}


def _frozen_encoder(trainer_name: str) -> Entry | None:
    """``PretrainedTrainer_Primus_frozenEnc_lr_7e5_wd_3e5`` (7e-5, 3e-5) and the like, with or without ``_noWarmUp``."""
    match = re.fullmatch(
        r"PretrainedTrainer_Primus_frozenEnc(_noWarmUp)?_lr_(\d)e(\d)_wd_(?:(\d)e(\d)|0)", trainer_name
    )
    if match is None:
        return None
    changes: dict[str, Any] = {
        "trainer_name": trainer_name,
        "freeze": "encoder",
        "epochs": 150,
        "warmup_epochs": 0 if match[1] else 15,
        "learning_rate": float(f"{match[2]}e-{match[3]}"),
        "weight_decay": float(f"{match[4]}e-{match[5]}") if match[4] else 0.0,
    }
    return "primus", changes


def _unknown(trainer_name: str) -> str:
    if "DA5" in trainer_name:
        return (
            f"-tr {trainer_name}: DA5, nnU-Net's stronger augmentation, is not part of this package, and training under its name "
            f"without it would mislead. Take {re.sub('_?DA5', '', trainer_name)}, whose augmentation is nnU-Net's default"
        )
    names = [*TRAINER_ALIASES, *STOCK_ALIASES, "<any nnUNetTrainer…>_<N>epochs", "…_<N>epochs_NoMirroring"]
    return (
        f"-tr {trainer_name}: no recipe has this trainer name{did_you_mean(trainer_name, names)}; known: "
        f"{', '.join(names)}. Any other variation is a recipe file (--recipe), a flag or --set field=value"
    )
