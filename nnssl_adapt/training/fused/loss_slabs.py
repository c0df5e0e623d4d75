"""The sums and gradients of a loss in one pass, by torch's operations on slabs of voxels, as they are or compiled.

Slabs go through one after the other and are forgotten, so that working memory is small beside the logits. Compiled, each
slab is read and written fewer times.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_adapt.training.fused.failures import BACKEND_FAILURES, in_words

logger = logging.getLogger(__name__)

_SLAB = 1 << 24
"""Numbers of a slab of logits on a GPU: 64 MiB in float32, enough to keep it busy."""

_SLAB_ON_CPU = 1 << 18
"""On a CPU: what stays in a processor's cache."""

_SHARE = 128
"""A slab is at most this part of the logits, so that working memory is small beside them: unless it is small anyway."""

_SMALL_SLAB = 1 << 22


def label_sums(logits: Tensor, labels: Tensor, ignored: int, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.label_sums`."""
    return _added_up(logits, labels, ignored, _called(_label_sums, compiled))


def label_gradient(
    logits: Tensor, labels: Tensor, ignored: int, of_entropy: Tensor, of_sums: Tensor, compiled: bool = False
) -> Tensor:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.label_gradient`."""
    return _gradient(logits, labels, ignored, of_entropy, of_sums, _called(_label_gradient, compiled))


def region_sums(logits: Tensor, target: Tensor, ignore: bool, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.region_sums`."""
    return _added_up(logits, target, ignore, _called(_region_sums, compiled))


def region_gradient(
    logits: Tensor, target: Tensor, ignore: bool, of_entropy: Tensor, of_sums: Tensor, compiled: bool = False
) -> Tensor:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.region_gradient`."""
    return _gradient(logits, target, ignore, of_entropy, of_sums, _called(_region_gradient, compiled))


# -- slab by slab ------------------------------------------------------------------------------------------------------


def _slabs(logits: Tensor) -> Iterator[slice]:
    """Voxels (the last axis) of each slab."""
    numbers = min(_SLAB, max(_SMALL_SLAB, logits.numel() // _SHARE))
    if logits.device.type == "cpu":
        numbers = _SLAB_ON_CPU
    rows, voxels = logits.shape[0] * logits.shape[1], logits.shape[2]
    width = max(1, numbers // max(1, rows))
    for start in range(0, voxels, width):
        yield slice(start, min(voxels, start + width))


def _added_up(logits: Tensor, target: Tensor, rule: int | bool, of_slab: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    entropy = torch.zeros((), device=logits.device)
    sums = torch.zeros((3, *logits.shape[:2]), device=logits.device)
    for part in _slabs(logits):
        more_entropy, more_sums = of_slab(logits[..., part], target[..., part], rule)
        entropy += more_entropy
        sums += more_sums
    return entropy, sums


def _gradient(
    logits: Tensor, target: Tensor, rule: int | bool, of_entropy: Tensor, of_sums: Tensor, of_slab: Callable[..., Any]
) -> Tensor:
    gradient = torch.empty_like(logits)
    of_shared, of_predicted = of_sums[0].unsqueeze(2), of_sums[1].unsqueeze(2)
    for part in _slabs(logits):
        gradient[..., part] = of_slab(logits[..., part], target[..., part], rule, of_entropy, of_shared, of_predicted)
    return gradient


# -- labels that exclude each other: slab (B, K, v) and truth (B, 1, v) ------------------------------------------------


def _is_class(labels: Tensor, classes: int) -> Tensor:
    """Of labels (B, 1, v): (B, K, v) bool."""
    return labels == torch.arange(classes, device=labels.device).view(1, -1, 1)


def _label_sums(slab: Tensor, truth: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    slab = slab.float()
    is_class, counted = _is_class(truth, slab.shape[1]), truth != ignored
    log_sum = torch.logsumexp(slab, 1, keepdim=True)
    probabilities = (slab - log_sum).exp_().mul_(counted)
    entropy = (log_sum * counted).sum() - torch.where(is_class & counted, slab, 0).sum()
    shared = torch.where(is_class, probabilities, 0).sum(2)
    return entropy, torch.stack([shared, probabilities.sum(2), (is_class & counted).sum(2)])


def _label_gradient(
    slab: Tensor, truth: Tensor, ignored: int, of_entropy: Tensor, of_shared: Tensor, of_predicted: Tensor
) -> Tensor:
    slab = slab.to(torch.float32, copy=True)
    is_class, counted = _is_class(truth, slab.shape[1]), truth != ignored
    probabilities = slab.sub_(torch.logsumexp(slab, 1, keepdim=True)).exp_()  # in place: memory is what counts
    result = torch.where(is_class, of_shared, 0).add_(of_predicted)  # of the probabilities; now of the logits:
    result.sub_((probabilities * result).sum(1, keepdim=True).sub_(of_entropy)).mul_(probabilities)
    return result.sub_(torch.where(is_class, of_entropy, 0)).mul_(counted)


# -- regions that may overlap: slab (B, R, v) and wanted (B, R or R + 1, v) bool ---------------------------------------


def _split(target: Tensor, ignore: bool) -> tuple[Tensor, Tensor | None]:
    """Regions (B, R, v), and which voxels count (B, 1, v), None for all."""
    return (target[:, :-1], ~target[:, -1:]) if ignore else (target, None)


def _region_sums(slab: Tensor, wanted: Tensor, ignore: bool) -> tuple[Tensor, Tensor]:
    slab = slab.float()
    regions, counted = _split(wanted, ignore)
    probabilities = torch.sigmoid(slab)
    entropy = functional.binary_cross_entropy_with_logits(slab, regions.float(), reduction="none")
    if counted is not None:
        regions, probabilities, entropy = regions & counted, probabilities * counted, entropy * counted
    shared = torch.where(regions, probabilities, 0).sum(2)
    return entropy.sum(), torch.stack([shared, probabilities.sum(2), regions.sum(2)])


def _region_gradient(
    slab: Tensor, wanted: Tensor, ignore: bool, of_entropy: Tensor, of_shared: Tensor, of_predicted: Tensor
) -> Tensor:
    regions, counted = _split(wanted, ignore)
    probabilities = torch.sigmoid(slab.float())
    of_probability = torch.where(regions, of_shared, 0) + of_predicted
    of_logit = of_probability * probabilities * (1 - probabilities)
    of_logit += of_entropy * (probabilities - regions.float())
    return of_logit if counted is None else of_logit.mul_(counted)


# -- compiled ----------------------------------------------------------------------------------------------------------


def _called(of_slab: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(of_slab) if compiled else of_slab


@functools.cache
def _compiled(of_slab: Callable[..., Any]) -> Callable[..., Any]:
    """``of_slab`` compiled; from the first failure on as it is."""
    works = True
    twin = torch.compile(of_slab)

    @functools.wraps(of_slab)
    def called(*arguments: Any) -> Any:
        nonlocal works
        if works:
            try:
                return twin(*arguments)
            except torch.OutOfMemoryError:
                raise
            except BACKEND_FAILURES as error:
                works = False
                logger.warning("the loss can't be compiled here (%s); it is computed without", in_words(error))
        return of_slab(*arguments)

    return called
