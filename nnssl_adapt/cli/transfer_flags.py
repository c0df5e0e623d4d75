"""Flags that ``preprocess``, ``finetune`` and ``inspect`` share: how weights are fitted to the network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl_adapt.weights.transfer.settings import TransferSettings

# Spelled out here so that --help does not import torch; a test compares them with the library's.
_SCOPES = ("auto", "encoder", "encoder+decoder", "none")
_TOKEN_ORDERS = ("auto", "hwd", "whd")


def add_transfer_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--scope``, ``--channels``, ``--token-order`` and ``--waive``; see :func:`transfer_settings_from`."""
    group = parser.add_argument_group("how the weights are fitted to the network")
    group.add_argument(
        "--scope",
        default="auto",
        choices=_SCOPES,
        help="what is pre-trained: the encoder, the decoder too (and segmentation heads whose labels agree), or nothing; "
        "auto (default) is encoder+decoder for a supervised network, else encoder",
    )
    group.add_argument(
        "--channels",
        default="auto",
        metavar="auto|repeat|mean|zero|MAP",
        help="which pre-training channel each image channel takes: by name where both have names, else by number (auto, the "
        "default); repeat, mean, zero (new ones silent); or a map by name or number such as T1=T1w,T2=0,FLAIR=new",
    )
    group.add_argument(
        "--token-order",
        default="auto",
        choices=_TOKEN_ORDERS,
        help="order in which a transformer's file has its tokens (default: told by the file)",
    )
    group.add_argument(
        "--waive",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors that may stay behind although they belong to the encoder, such as 'encoder.stages.5.*' (repeatable)",
    )


def transfer_settings_from(arguments: argparse.Namespace, channel_names: Sequence[str] = ()) -> TransferSettings:
    """The settings that the flags of :func:`add_transfer_flags` ask for.

    Args:
        channel_names: the dataset's channels in order, which a map of channels is read with; empty: no dataset is known.

    Raises ConfigurationError naming the flag that is wrong.
    """
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.weights.transfer.settings import CHANNEL_RULES, TransferSettings, parse_channels

    text = arguments.channels
    if not channel_names and text.strip().lower() not in CHANNEL_RULES:
        raise ConfigurationError(
            f"--channels {text}: a map needs a dataset, whose channels it names (-d); without: {', '.join(CHANNEL_RULES)}"
        )
    return TransferSettings(
        scope=arguments.scope,
        channels=parse_channels(text, channel_names),
        token_order=arguments.token_order,
        waive=tuple(arguments.waive),
    )
