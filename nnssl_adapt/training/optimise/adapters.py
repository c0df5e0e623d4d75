"""Low-rank adapters (LoRA, arXiv 2106.09685) in a transformer's attention, which learn in the place of its weights.

The adapters are those of peft, an optional extra. They exist while a network is trained only: what is saved for prediction is
merged into weights of the plan's own names (:func:`plain_weights`), so that whoever predicts needs to know nothing of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe.recipe import Recipe

_ADAPTED = ("q_proj", "k_proj", "v_proj", "proj")
"""Linear layers of an attention module that get adapters: queries, keys, values and the output.

Not timm's fused ``qkv``, whose weight its attention takes past the layer, and so past an adapter; a Primus has none.
"""

_NAME = "default"  # peft's name of the only adapter that a layer has


def add_adapters(network: nn.Module, recipe: Recipe) -> None:
    """Put adapters of ``recipe.lora_rank`` into the network's attention layers (changes it); none for rank 0.

    They start as nothing, so that the network computes what it did before. Their random halves only depend on the recipe's
    seed. Tensors get other names: ``…attn.q_proj.weight`` becomes ``…attn.q_proj.base_layer.weight``.

    Raises ConfigurationError: peft is not installed; the network has no attention; it has adapters already.
    """
    if recipe.lora_rank == 0:
        return
    if has_adapters(network):
        raise ConfigurationError("lora_rank: the network has adapters already; add them once, to the plain network")
    targets = list(_attention_layers(network))
    if not targets:
        raise ConfigurationError(
            f"lora_rank: {type(network).__name__} has no attention layers to put adapters into; "
            "use layer_decay (--llrd) or freeze (--freeze encoder) instead"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigurationError(
            f"lora_rank {recipe.lora_rank} needs peft ({error}): pip install 'nnssl-adapt[lora]'"
        ) from error
    alpha = recipe.lora_alpha if recipe.lora_alpha is not None else 2.0 * recipe.lora_rank
    # peft declares lora_alpha a whole number, and only ever divides it by the rank.
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=alpha, target_modules=targets, bias="none")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about models of transformers
        torch.manual_seed(recipe.seed)
        inject_adapter_in_model(config, network)


def has_adapters(network: nn.Module) -> bool:
    """Whether :func:`add_adapters` has put adapters into a network."""
    return next(_adapted_layers(network), None) is not None


def plain_weights(network: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights that predict, under the plan's own names: adapters are merged into the layers they belong to.

    Args:
        network: with or without adapters; it is not changed. Without, this is its state dict.
        weights: of this network, to be taken instead of its own, as
            :meth:`~nnssl_adapt.training.optimise.ema.WeightAverage.weights` gives them.

    Tensors without an adapter are those of ``weights``, not copies. Float32 as the network's.
    """
    found = dict(network.state_dict() if weights is None else weights)
    for name, scale in _adapted_layers(network):
        down = found.pop(f"{name}.lora_A.{_NAME}.weight")  # (rank, inputs)
        up = found.pop(f"{name}.lora_B.{_NAME}.weight")  # (outputs, rank)
        base = f"{name}.base_layer.weight"
        with torch.no_grad():
            found[base] = found[base] + scale * (up @ down)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in found.items()}


def _attention_layers(network: nn.Module) -> Iterator[str]:
    """Dotted names of the linear layers inside modules called ``attn``; a network of ours names them itself."""
    adapted = getattr(network, "attention_layers", _ADAPTED)
    for name, module in network.named_modules():
        words = name.split(".")
        if isinstance(module, nn.Linear) and len(words) > 1 and words[-2] == "attn" and words[-1] in adapted:
            yield name


def _adapted_layers(network: nn.Module) -> Iterator[tuple[str, float]]:
    """Dotted names of the layers with an adapter, and what its product counts."""
    for name, module in network.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and _NAME in scaling and hasattr(module, "base_layer"):
            yield name, float(scaling[_NAME])
