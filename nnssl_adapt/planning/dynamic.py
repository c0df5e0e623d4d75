"""Plans that keep the data's own nnU-Net network and fit the weights to it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.reorient import ORIENTATION_KEY, common_orientation
from nnssl_adapt.errors import PlanError
from nnssl_adapt.planning.content import data_identifier, pretrain_info
from nnssl_adapt.planning.nnunet_plan import PLANNED_HERE
from nnssl_adapt.planning.plan import CONFIGURATION, KEEP, RESAMPLE, FinetunePlan
from nnssl_adapt.planning.provenance import KEY, Provenance
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.transfer.settings import TransferSettings

SPACING_MODE = "base_plans"
"""``spacing_mode`` of such a plan: everything about the images is the base plan's."""


def dynamic_content(
    raw: RawDataset, checkpoint: Checkpoint, base: FinetunePlan, plans_name: str, settings: TransferSettings
) -> dict[str, Any]:
    """The plans file: the base plan's ``3d_fullres`` as it is, plus where the weights come from.

    ``base`` is a file that nnU-Net wrote, or what :func:`nnunet_plan` made by its rules, which is said in the result.

    Spacing, patch, batch size, normalisation, resampling, order of axes and the network stay the base plan's. The
    preprocessed cases get a folder of our own, since nnU-Net would take one of its own name for finished.

    Raises PlanError where the base plan does not fit the dataset, or resamples in a way that is not supported.
    """
    chosen = base.settings_of_configuration
    where = base.path or base.plans_name
    if base.num_channels != raw.num_channels:
        raise PlanError(
            f"{where} is for {base.num_channels} channel(s), {raw.name} has {raw.num_channels}: run nnU-Net's planning again"
        )
    for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        if chosen.get(key, RESAMPLE) not in (RESAMPLE, KEEP):
            raise PlanError(f"{where}: {key} is {chosen[key]}, not supported yet; supported are {RESAMPLE} and {KEEP}")
    content = {key: copy.deepcopy(value) for key, value in base.content.items() if key not in _REPLACED}
    content.update(
        plans_name=plans_name,
        configurations={CONFIGURATION: chosen},
        experiment_planner_used="nnssl_adapt",
        pretrain_info=pretrain_info(checkpoint),
    )
    lies = common_orientation(raw)
    content.update({} if lies is None else {ORIENTATION_KEY: lies})
    chosen["data_identifier"], digest = data_identifier(FinetunePlan(content))
    planned_here = base.plans_name == PLANNED_HERE  # such a plan exists in no file and has no name
    provenance = replace(
        Provenance.of(checkpoint, settings),
        spacing_mode=SPACING_MODE,
        base_plans=None if planned_here else base.plans_name,
        topology={"planned_by": "nnssl_adapt", "preset": base.provenance.preset} if planned_here else None,
        architecture_preset=base.provenance.architecture_preset,
        preprocessing_digest=digest,
    )
    return {**content, KEY: provenance.to_dict()}


_REPLACED = (
    "plans_name",
    "configurations",
    "experiment_planner_used",
    "pretrain_info",
    "nnssl_adapt",
    "image_orientation",
)
