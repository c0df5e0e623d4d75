"""Which normalisation each channel of a dataset gets: the pre-training's, nnU-Net's for the data, or one by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning.scaling import FORMS, read_scaling
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.transfer.by_name import origin_of_channels
from nnssl_adapt.weights.transfer.settings import TransferSettings

logger = logging.getLogger(__name__)

Normalization = tuple[list[str], list[bool]]
"""nnU-Net's name of the scheme, and whether only nonzero voxels count, for each channel."""

FROM_PRETRAINING, FROM_DATA = "from_pretraining", "from_data"
SCHEMES_BY_NAME = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}
"""What a user may call them."""

_SCHEME_OF_CHANNEL = {**SCHEMES_BY_NAME, "nonorm": "NoNormalization"}
"""nnU-Net's choice by the channel's name in dataset.json; z-score for all other names."""

_MUCH_IS_CROPPED = 0.75
"""Where cropping leaves less than this of the median image, nnU-Net's z-score looks at nonzero voxels only."""


def choose_normalization(
    requested: str,
    pretraining: AdaptationPlan,
    raw: RawDataset,
    fingerprint: DatasetFingerprint,
    settings: TransferSettings,
) -> Normalization:
    """Normalisation of each channel.

    Args:
        requested: ``from_pretraining``, ``from_data`` (nnU-Net's rule: by the channel's name), or one of
            :data:`SCHEMES_BY_NAME`, or a scaling with numbers (:mod:`nnssl_adapt.planning.scaling`); or one of these for each
            channel, separated by commas.

    Raises ConfigurationError for a request that can't be read, PlanError where the pre-training's channels differ and nobody
    says which is which.
    """
    words = parse_normalization(requested, raw)
    pretrained = _of_pretraining(pretraining, raw, settings) if FROM_PRETRAINING in words else ([], [])
    natural = normalization_of_data(raw, fingerprint)
    schemes, masks = [], []
    for channel, (name, chosen) in enumerate(zip(raw.channel_names, words, strict=True)):
        if chosen == FROM_PRETRAINING:
            scheme, mask = pretrained[0][channel], pretrained[1][channel]
            if scheme == "CTNormalization" != natural[0][channel]:
                logger.warning(
                    "channel %r gets CTNormalization, as the weights were trained on CT: its intensities are clipped and scaled "
                    "by fixed numbers, which means nothing for other images than CT. --normalization from_data takes %s",
                    name,
                    natural[0][channel],
                )
            if natural[0][channel] == "CTNormalization" != scheme:
                logger.warning(
                    "channel %r is CT, the weights saw %s images, and so will the network: --normalization from_data takes "
                    "nnU-Net's normalisation of CT instead",
                    name,
                    scheme,
                )
        elif chosen == FROM_DATA:
            scheme, mask = natural[0][channel], natural[1][channel]
        else:
            scaling = read_scaling(chosen)
            scheme = SCHEMES_BY_NAME[chosen] if scaling is None else scaling.scheme
            mask = scheme == natural[0][channel] and natural[1][channel]
        schemes.append(scheme)
        masks.append(mask)
    return schemes, masks


def parse_normalization(requested: str, raw: RawDataset) -> list[str]:
    """One word a channel of what :func:`choose_normalization` takes. Raises ConfigurationError for what can't be read."""
    words = [word.strip().lower() for word in requested.split(",")]
    known = (FROM_PRETRAINING, FROM_DATA, *SCHEMES_BY_NAME)
    unknown = [word for word in words if word not in known and read_scaling(word) is None]
    if unknown:
        raise ConfigurationError(
            f"--normalization {requested}: {unknown[0]!r} is none of {', '.join((*known, *FORMS))}"
        )
    if len(words) not in (1, raw.num_channels):
        raise ConfigurationError(
            f"--normalization {requested}: {len(words)} entries for {raw.num_channels} channel(s) "
            f"({', '.join(raw.channel_names)}); give one for all, or one for each"
        )
    return words * raw.num_channels if len(words) == 1 else words


def normalization_of_data(raw: RawDataset, fingerprint: DatasetFingerprint) -> Normalization:
    """nnU-Net's own choice: by the channels' names, of nonzero voxels where cropping takes much away."""
    schemes = [_usual_scheme(name) for name in raw.channel_names]
    cropped = fingerprint.median_relative_size_after_cropping < _MUCH_IS_CROPPED
    return schemes, [cropped and scheme == "ZScoreNormalization" for scheme in schemes]


def _usual_scheme(channel_name: str) -> str:
    return _SCHEME_OF_CHANNEL.get(channel_name.casefold(), "ZScoreNormalization")


def _of_pretraining(pretraining: AdaptationPlan, raw: RawDataset, settings: TransferSettings) -> Normalization:
    """That of the pre-training channel whose kernel a channel takes.

    Where all had one scheme it is for all channels; else they are matched by the map of channels, or by their number.
    """
    schemes = list(pretraining.normalization_schemes) or ["ZScoreNormalization"]
    masks = list(pretraining.use_mask_for_norm) or [False]
    if len(masks) < len(schemes):
        masks = (masks * len(schemes))[: len(schemes)]
    if len(set(schemes)) == 1 and len(set(masks)) == 1:
        return schemes[:1] * raw.num_channels, masks[:1] * raw.num_channels
    channels = settings.channel_numbers
    if not isinstance(channels, str):
        return _by_map(channels, schemes, masks, raw.channel_names)
    if len(schemes) == raw.num_channels:
        return schemes, masks[: len(schemes)]
    raise PlanError(
        f"the pre-training normalised its {len(schemes)} channels differently ({', '.join(schemes)}), so there is no one "
        f"scheme for the dataset's {raw.num_channels} channels: say which is which with --channels, such as "
        + ",".join(f"{name}={min(i, len(schemes) - 1)}" for i, name in enumerate(raw.channel_names))
        + ", or choose with --normalization"
    )


def intensity_statistics(
    requested: str,
    schemes: Sequence[str],
    pretraining: AdaptationPlan,
    raw: RawDataset,
    of_data: Mapping[str, Any],
    settings: TransferSettings,
) -> dict[str, Any]:
    """Intensity statistics of each channel (``0``, ``1``, …), which CTNormalization clips and scales by.

    A channel that is normalised as in the pre-training has the statistics of the pre-training channel whose kernel it takes,
    where the weights' plan has any (as nnU-Net's ``move_plans`` keeps them); else those of the dataset (``of_data``).
    Whose they are is logged for channels with CTNormalization (``schemes``).
    """
    words = parse_normalization(requested, raw)
    origin = origin_of_channels(settings.channel_numbers, pretraining.num_input_channels, raw.num_channels)
    statistics = dict(copy.deepcopy(dict(of_data)))
    for channel, (chosen, source) in enumerate(zip(words, origin, strict=True)):
        if chosen == FROM_PRETRAINING and source is not None and source < len(pretraining.intensity):
            statistics[str(channel)] = dict(pretraining.intensity[source])
            whose = "the weights' own (--normalization from_data takes the dataset's)"
        elif (scaling := read_scaling(chosen)) is not None and scaling.window is not None:
            statistics[str(channel)] = scaling.window.statistics()
            whose = f"those of the window {scaling.window}"
        else:
            whose = "the dataset's"
        if schemes[channel] == "CTNormalization":
            logger.info("channel %r: clipped and scaled by intensity statistics, %s", raw.channel_names[channel], whose)
    return statistics


def _by_map(
    channels: Sequence[int | None], schemes: Sequence[str], masks: Sequence[bool], names: Sequence[str]
) -> Normalization:
    known = dict(enumerate(zip(schemes, masks, strict=False)))
    taken = [
        known.get(-1 if channel is None else channel, (_usual_scheme(name), False))
        for channel, name in zip(channels, names, strict=False)
    ]
    return [scheme for scheme, _ in taken], [mask for _, mask in taken]
