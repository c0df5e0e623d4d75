"""The plan that nnU-Net's own planner would make for a dataset, made here where there is none."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import PlanError
from nnssl_adapt.geometry.spacing import median_spacing
from nnssl_adapt.planning.base_plans import BasePlans
from nnssl_adapt.planning.content import configuration_entries, dataset_entries, resampled_median_shape
from nnssl_adapt.planning.normalization import normalization_of_data
from nnssl_adapt.planning.plan import CONFIGURATION, FinetunePlan
from nnssl_adapt.planning.provenance import KEY
from nnssl_adapt.planning.topology import NNUNET_PRESETS, needs_low_resolution, plan_network
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.network.architectures import Architecture, nearest_patch

PLANNED_HERE = "planned_here"
"""``base_plans`` of a plan whose network follows nnU-Net's rules, but was planned by this package."""


def preset_for(architecture: Architecture) -> str:
    """The preset whose network these weights fit best: ``ResEncL`` for residual encoders, ``default`` for plain ones.

    Raises PlanError for transformers, which nnU-Net doesn't plan.
    """
    for name in ("default", "ResEncL"):
        if NNUNET_PRESETS[name].class_name == architecture.class_name:
            return name
    raise PlanError(
        f"--keep-topology is for U-Nets: nnU-Net's planner has no network for weights of {architecture}. Leave "
        "--keep-topology out to train the network of the weights"
    )


def nnunet_plan(raw: RawDataset, fingerprint: DatasetFingerprint, preset: str) -> FinetunePlan:
    """The plan with the ``3d_fullres`` configuration of nnU-Net's planner ``preset``. It is in memory only, and unnamed.

    Spacing (median), order of axes, normalisation, network, patch, batch and Dice setting are nnU-Net's. For a Primus
    (``PrimusV3S``, …) the patch is rounded to multiples of 8, where nnU-Net's own trainer would fail.

    Raises PlanError for images that no 3D U-Net takes, ConfigurationError for an unknown preset.
    """
    target = median_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    coarsest = int(np.argmax(target))
    forward = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
    spacing = [target[axis] for axis in forward]
    median_shape = resampled_median_shape(fingerprint, target, forward)
    if median_shape[0] == 1:
        raise PlanError(f"the images of {raw.name} are 2D (one voxel thick): only 3D networks can be planned")
    labels = len(raw.json.labels)
    number = raw.json.num_training or len(raw.cases)
    planned = plan_network(preset, spacing, median_shape, labels, math.prod(median_shape) * number)
    if preset in PRIMUS_TRAINERS:
        primus = Architecture.named(preset)
        planned = replace(planned, architecture=primus, patch_size=nearest_patch(primus, planned.patch_size))
    configuration = configuration_entries(
        planned.architecture,
        planned.patch_size,
        planned.batch_size,
        spacing,
        median_shape,
        normalization_of_data(raw, fingerprint),
        needs_low_resolution(preset, spacing, median_shape, labels),
    )
    return FinetunePlan(
        {
            **dataset_entries(raw, fingerprint, raw.json.image_reader or BasePlans().image_reader, forward),
            "plans_name": PLANNED_HERE,
            "configurations": {CONFIGURATION: configuration},
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": copy.deepcopy(fingerprint.intensity),
            KEY: {"preset": preset},
        }
    )
