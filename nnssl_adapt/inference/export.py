"""From logits on the network's grid back to the image's own: undo resampling, cropping and transposing.

What preprocessing did to a case is in its ``properties`` (see :class:`nnssl_adapt.data.store.PreprocessedCase`).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import ResamplingRule
from nnssl_adapt.errors import PlanError
from nnssl_adapt.files import atomic_path
from nnssl_adapt.geometry.logits import logits_to_labels
from nnssl_adapt.geometry.logits_on_device import labels_on_device
from nnssl_adapt.geometry.resample import as_array, resample_image, resample_logits
from nnssl_adapt.planning.plan import FinetunePlan

_FAST_RULE = ResamplingRule(order=1, order_z=0, force_separate_z=None)
"""nnU-Net's rule for logits; the functions for logits know no other."""


def logits_to_segmentation(
    logits: Tensor | np.ndarray, properties: Mapping[str, Any], plan: FinetunePlan, labels: LabelScheme
) -> np.ndarray:
    """Turn logits into a label map on the image's own grid, as nnU-Net does.

    Args:
        logits: (K, z, y, x) on the grid of the preprocessed case; or labels that :func:`decided_on_device` made of them.
        properties: of the preprocessed case.
        plan: with the spacing, the resampling rule and the order of axes.
        labels: what the K outputs mean.

    Returns:
        uint8 (Z, Y, X), or uint16 where there are 255 labels or more; background where the image was cropped away.
    """
    if is_decided(logits):
        return _uncropped(as_array(logits), properties, plan, label_type(labels))
    shape = properties["shape_after_cropping_and_before_resampling"]
    cropped = _labels_on(shape, _own_spacing(properties, plan), logits, plan, labels)
    return _uncropped(cropped, properties, plan, label_type(labels))


def labels_for_next_stage(
    logits: Tensor | np.ndarray, shape: Sequence[int], plan: FinetunePlan, labels: LabelScheme
) -> np.ndarray:
    """The label map (z, y, x) that a cascade's next network sees, of ``shape``: that of its preprocessed case.

    Logits (K, z, y, x) are resampled as nnU-Net does it here: as if both grids had the plan's spacing.
    """
    spacing = plan.spacing or tuple(float(s) for s in plan.settings_of_configuration["spacing"])
    return _labels_on(shape, spacing, logits, plan, labels).astype(label_type(labels), copy=False)


def _labels_on(
    shape: Sequence[int],
    spacing: Sequence[float],
    logits: Tensor | np.ndarray,
    plan: FinetunePlan,
    labels: LabelScheme,
) -> np.ndarray:
    """Labels on a grid of ``shape`` with ``spacing`` (mm), in transposed axes."""
    properties = {
        "shape_after_cropping_and_before_resampling": shape,
        "spacing": [spacing[axis] for axis in plan.transpose_backward],
    }
    if not labels.has_regions and plan.spacing is not None and plan.resampling_for_export == _FAST_RULE:
        return logits_to_labels(logits, shape, plan.settings.target_spacing(spacing) or spacing, spacing)
    elif labels.has_regions and len(logits) == labels.num_heads:
        # Each decides for itself, so one at a time is held at full size.
        whole = (_on_own_grid(logits[head : head + 1], properties, plan)[0] for head in range(len(logits)))
        return labels.regions_to_labels(torch.from_numpy(output) for output in whole).numpy()
    return np.asarray(labels.heads_to_labels(_on_own_grid(logits, properties, plan)))


def can_decide_on_device(plan: FinetunePlan, labels: LabelScheme) -> bool:
    """Whether the labels follow from logits by the rule that :func:`decided_on_device` knows: nnU-Net's, without regions."""
    return not labels.has_regions and plan.spacing is not None and plan.resampling_for_export == _FAST_RULE


def decided_on_device(logits: Tensor, properties: Mapping[str, Any], plan: FinetunePlan) -> Tensor:
    """Labels (Z, Y, X) of the cropped image on its own grid, on the CPU; made where the logits are.

    They are those that :func:`logits_to_segmentation` would make. Where the memory is too small for that, the logits are
    returned, on the CPU.
    """
    assert plan.spacing is not None
    shape = properties["shape_after_cropping_and_before_resampling"]
    try:
        return labels_on_device(logits, shape, plan.spacing, _own_spacing(properties, plan)).cpu()
    except torch.OutOfMemoryError:
        pass
    return logits.cpu()  # not in the handler, whose traceback keeps what there was in memory


def is_decided(logits: Tensor | np.ndarray) -> bool:
    """Whether these are labels already."""
    return logits.ndim == 3


def logits_to_probabilities(
    logits: Tensor | np.ndarray, properties: Mapping[str, Any], plan: FinetunePlan, labels: LabelScheme
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`logits_to_segmentation`, with the probabilities that the labels were decided on.

    Returns:
        The label map (Z, Y, X), and float32 probabilities (K, Z, Y, X): softmax over labels, or a sigmoid for each
        region. What was cropped away is background with probability 1 (regions: 0 everywhere).
    """
    resampled = torch.from_numpy(_on_own_grid(logits, properties, plan))
    probabilities = torch.sigmoid(resampled) if labels.has_regions else torch.softmax(resampled, 0)
    segmentation = np.asarray(labels.heads_to_labels(resampled.numpy()))
    outside = [0.0 if labels.has_regions or head > 0 else 1.0 for head in range(len(probabilities))]
    return (
        _uncropped(segmentation, properties, plan, label_type(labels)),
        np.stack(
            [
                _uncropped(p.numpy(), properties, plan, np.float32, o)
                for p, o in zip(probabilities, outside, strict=True)
            ]
        ),
    )


def write_probabilities(path_without_ending: Path, probabilities: np.ndarray, properties: Mapping[str, Any]) -> None:
    """Write ``.npz`` and ``.pkl`` as nnU-Net does, for its ensembling or ours.

    ``probabilities`` are (K, Z, Y, X); ``path_without_ending`` is the label file's path up to its ending.
    """
    name = path_without_ending.name
    with atomic_path(path_without_ending.with_name(f"{name}.npz")) as temporary:
        np.savez_compressed(temporary, probabilities=probabilities)
    with atomic_path(path_without_ending.with_name(f"{name}.pkl")) as temporary:
        temporary.write_bytes(pickle.dumps(dict(properties), protocol=4))


def _on_own_grid(logits: Tensor | np.ndarray, properties: Mapping[str, Any], plan: FinetunePlan) -> np.ndarray:
    """Logits (K, z, y, x) on the grid that the cropped image had before resampling; float32."""
    shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    if plan.spacing is None:
        if tuple(logits.shape[1:]) != shape:
            raise PlanError(
                f"{plan.plans_name} keeps each image's grid, but logits are {tuple(logits.shape[1:])}, image {shape}"
            )
        return np.asarray(as_array(logits), np.float32)
    rule = plan.resampling_for_export
    own_spacing = _own_spacing(properties, plan)
    spacing = plan.settings.target_spacing(own_spacing) or own_spacing
    if rule == _FAST_RULE:
        resampled = resample_logits(logits, shape, spacing, own_spacing)
    else:
        array = np.asarray(as_array(logits), np.float32)
        resampled = resample_image(array, shape, spacing, own_spacing, **vars(rule))
    # nnU-Net keeps resampled logits in float16. The labels must not depend on whether probabilities were asked for.
    return resampled.astype(np.float16).astype(np.float32)


def _own_spacing(properties: Mapping[str, Any], plan: FinetunePlan) -> tuple[float, ...]:
    """The image's spacing (mm) in the plan's order of axes."""
    return tuple(float(properties["spacing"][axis]) for axis in plan.transpose_forward)


def _uncropped(
    cropped: np.ndarray, properties: Mapping[str, Any], plan: FinetunePlan, dtype: Any, outside: float = 0
) -> np.ndarray:
    """Put a map (transposed axes) back to where it was cut from, and its axes into the image's order (Z, Y, X)."""
    whole = np.full(tuple(int(n) for n in properties["shape_before_cropping"]), outside, dtype=dtype)
    box: Sequence[Sequence[int]] = properties["bbox_used_for_cropping"]
    whole[tuple(slice(low, high) for low, high in box)] = cropped
    return np.ascontiguousarray(whole.transpose(plan.transpose_backward))


def label_type(labels: LabelScheme) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if len(labels.foreground_labels) < 255 else np.uint16
