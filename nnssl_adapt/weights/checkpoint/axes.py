"""Order of the image axes that a network was trained on, and its exact exchange.

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
from nnssl_adapt.weights.network.architectures import Architecture


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
