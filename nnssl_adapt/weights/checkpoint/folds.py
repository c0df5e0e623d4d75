"""Several folds of one trained model, averaged into one set of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nnssl_adapt.errors import CheckpointError


def average_folds(folds: Sequence[tuple[Path, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The mean of the same network's weights from several files, in float32 (or better).

    Whole numbers (counters) are taken from the first file. A tensor with two names stays one tensor. Raises CheckpointError
    naming file and tensor when names or shapes differ.
    """
    path, first = folds[0]
    for other, tensors in folds[1:]:
        _check_alike(path, first, other, tensors)
    known: dict[tuple[tuple[object, ...], ...], Tensor] = {}
    averaged: dict[str, Tensor] = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            averaged[name] = tensor
            continue
        members = [tensors[name] for _, tensors in folds]
        key = tuple((member.data_ptr(), tuple(member.shape), member.stride()) for member in members)
        if key not in known:
            exact = torch.promote_types(tensor.dtype, torch.float32)
            total = members[0].to(exact, copy=True)
            for member in members[1:]:
                total += member.to(exact)
            known[key] = total / len(members)
        averaged[name] = known[key]
    return averaged


def _check_alike(path: Path, first: Mapping[str, Tensor], other: Path, tensors: Mapping[str, Tensor]) -> None:
    only = sorted(first.keys() ^ tensors.keys())
    if only:
        holder, lacking = (path, other) if only[0] in first else (other, path)
        raise CheckpointError(
            f"these folds can't be averaged: {holder} has {only[0]!r}, {lacking} has not. Choose one fold (--fold)"
        )
    for name, tensor in first.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"these folds can't be averaged: {name!r} is {list(tensor.shape)} in {path} and "
                f"{list(tensors[name].shape)} in {other}. Choose one fold (--fold)"
            )
