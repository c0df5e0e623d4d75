"""The images that a network takes: only images in its input channels, with the axes of their arrays in our order.

MONAI reads an image into an array (x, y, z), nnU-Net and nnssl (with SimpleITK) into (z, y, x). A convolutional network
trained on one computes the same on the other when every kernel has its axes reversed, and with them the strides, the
patch and the spacing: nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.families.registry import family_of_dataset
from nnssl_adapt.weights.network.architectures import Architecture


def for_our_images(
    tensors: Mapping[str, Tensor], plan: AdaptationPlan, axes: str, reason: str | None, where: str
) -> tuple[dict[str, Tensor], AdaptationPlan, list[str]]:
    """Return tensors and plan of the same network for images in (z, y, x) arrays and nothing else in its channels; and notes.

    Args:
        tensors: of the checkpoint.
        plan: that fits them.
        axes: order of the image axes that they were trained on, ``zyx`` or ``xyz``.
        reason: what tells that order, for the note; None where the user said it.
        where: the file, for the message.

    Raises what :func:`exchange_axes` does.
    """
    notes: list[str] = []
    if axes == "xyz":
        tensors, plan = exchange_axes(tensors, plan, where)
        notes.append(_exchanged(plan, reason))
    tensors, plan, of_channels = _image_channels_only(tensors, plan)
    return tensors, plan, [*of_channels, *notes]


# -- axes ------------------------------------------------------------------------------------------------------------


def exchange_axes(
    tensors: Mapping[str, Tensor], plan: AdaptationPlan, where: str
) -> tuple[dict[str, Tensor], AdaptationPlan]:
    """Return tensors and plan of the same network for images whose arrays have their three axes in reverse order.

    Kernels (out, in, X, Y, Z) become (out, in, Z, Y, X); they are views, nothing is copied. Twice is the identity. A network
    that is not symmetric in its axes (Swin UNETR) keeps its weights, and its plan turns the images.
    Raises ConfigurationError for a transformer, whose rotary positions no exchange makes exact, and for a plan whose
    images had their axes transposed already.
    """
    if plan.architecture.is_transformer:
        raise ConfigurationError(
            f"{where} is a {plan.architecture.class_name}: only convolutional networks can have their axes exchanged; leave "
            "out --axes xyz"
        )
    if plan.transpose_forward != (0, 1, 2):
        raise ConfigurationError(
            f"{where}: its plan transposes image axes ({list(plan.transpose_forward)}), which says their order already; leave "
            "out --axes xyz"
        )
    if not plan.architecture.kind.has_symmetric_axes:
        return dict(tensors), plan.model_copy(update={"transpose_forward": (2, 1, 0)})
    exchanged = {
        name: tensor.permute(0, 1, 4, 3, 2) if tensor.ndim == 5 else tensor for name, tensor in tensors.items()
    }
    update: dict[str, Any] = {
        "architecture": _reversed_architecture(plan.architecture),
        "patch_size": plan.patch_size[::-1],
        "spacing": plan.spacing[::-1] if plan.spacing else None,
    }
    if plan.recommended_patch_size:
        update["recommended_patch_size"] = plan.recommended_patch_size[::-1]
    return exchanged, plan.model_copy(update=update)


def _reversed_architecture(architecture: Architecture) -> Architecture:
    kwargs = dict(architecture.kwargs)
    for key in {"strides", "kernel_sizes"} & kwargs.keys():
        kwargs[key] = [list(entry)[::-1] for entry in kwargs[key]]
    return replace(architecture, kwargs=kwargs)


def _exchanged(plan: AdaptationPlan, reason: str | None) -> str:
    if not plan.architecture.kind.has_symmetric_axes:
        return (
            "trained on (x, y, z) arrays, and not symmetric in its axes: images are turned for it (transpose_forward "
            f"{list(plan.transpose_forward)}), its weights are left as they are"
        )
    if reason is None:
        return "its axes were exchanged, (x, y, z) → (z, y, x), as requested; exact for a convolutional network"
    return (
        f"taken as trained on (x, y, z) arrays, as {reason}: kernels, strides and patch were turned to (z, y, x), exactly; "
        "--axes zyx leaves them as they are"
    )


# -- channels --------------------------------------------------------------------------------------------------------


def _image_channels_only(
    tensors: Mapping[str, Tensor], plan: AdaptationPlan
) -> tuple[dict[str, Tensor], AdaptationPlan, list[str]]:
    """Tensors and plan without the input channels that are no images, for families that have such channels; and notes.

    Those channels are zero where nobody gives anything in them, so that the network computes the same without them.
    """
    plans = plan.raw.get("nnunet_plans")
    family = family_of_dataset(plans.get("dataset_name")) if isinstance(plans, Mapping) else None
    kept = None if family is None else family.image_channels
    if family is None or kept is None or plan.num_input_channels <= max(kept):
        return dict(tensors), plan, []
    seen = {f"{module}.weight" for module in plan.keys_to_in_proj}
    found = {name: tensor[:, list(kept)] if name in seen else tensor for name, tensor in tensors.items()}
    update = {
        "num_input_channels": len(kept),
        "normalization_schemes": plan.normalization_schemes[: len(kept)],
        "use_mask_for_norm": plan.use_mask_for_norm[: len(kept)],
        "citations": (*plan.citations, *(dict(entry) for entry in family.facts.citations)),
    }
    note = (
        f"it is {family.name}: of its {plan.num_input_channels} input channels the image's {len(kept)} are taken, the others are "
        "what a user draws; without them it computes the same"
    )
    return found, plan.model_copy(update=update), [note]
