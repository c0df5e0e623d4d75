"""The learning rate, a pure function of the epoch."""

from __future__ import annotations

from nnssl_adapt.training.recipe import Recipe


def learning_rate(epoch: int, recipe: Recipe) -> float:
    """Return the learning rate of a whole epoch (counted from 0).

    Linear over ``warmup_epochs``, from one step above zero to the highest in the last of them; then
    ``highest * (1 - fraction done) ** poly_exponent`` over the rest, whose first epoch is at the highest again. This is
    the sequence of nnU-Net's warm-up trainers (``Lin_incr_LRScheduler``, then ``PolyLRScheduler_offset``) and, without
    warm-up, of its default one. Zero warm-up is legal.
    """
    if epoch < recipe.warmup_epochs:
        return recipe.learning_rate / recipe.warmup_epochs * (1 + epoch)
    done = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return float(recipe.learning_rate * (1 - done) ** recipe.poly_exponent)
