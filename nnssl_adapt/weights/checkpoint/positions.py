"""The learned positions of a transformer in a checkpoint: their name and their grid."""

from __future__ import annotations

from torch import Tensor

from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan, token_grid
from nnssl_adapt.weights.network.network_parts import NetworkParts, Tensors, below, is_special_token, join_name
from nnssl_adapt.weights.network.tensor_ops import Grid, find_token_grid


def positions_name(parts: NetworkParts, source: Tensors, plan: AdaptationPlan) -> str | None:
    """The checkpoint's name of the learned positions: those of the plan's encoder, else what the plan names.

    The encoder's go first, since the second transformer of a masked autoencoder has positions too.
    """
    if parts.positions is None:
        return None
    relative = below(parts.positions, parts.encoder)
    name = join_name(plan.key_to_encoder or "", relative) if relative is not None else None
    return next((candidate for candidate in (name, plan.key_to_lpe) if candidate in source), None)


def positions_grid(positions: Tensor, source: Tensors, plan: AdaptationPlan) -> tuple[int, Grid | None]:
    """(leading class and register tokens, grid (Z, Y, X)) of learned positions (1, N, C) in a checkpoint.

    The grid comes from the number of tokens; the plan's patch, then its recommended patch, say how it is cut, and without
    either it is a cube. None: no grid fits.
    """
    if positions.ndim != 3:
        return 0, None
    recommended = plan.recommended_patch_size
    candidates = [plan.token_grid, token_grid(plan.architecture, recommended) if recommended else None]
    special = sum(tensor.shape[1] for name, tensor in source.items() if is_special_token(name) and tensor.ndim == 3)
    for leading in dict.fromkeys((special, 0)):
        grid = find_token_grid(positions.shape[1] - leading, candidates)
        if grid is not None:
            return leading, grid
    return 0, None
