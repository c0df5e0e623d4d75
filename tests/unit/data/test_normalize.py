from __future__ import annotations

import numpy as np
import pytest

from nnssl_adapt.data.normalize import normalize_channel
from nnssl_adapt.errors import CaseError

STATISTICS = {"mean": 100.0, "std": 40.0, "percentile_00_5": 20.0, "percentile_99_5": 180.0}


def channel() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 60, (5, 6, 7)).astype(np.float32)


def test_z_score_of_everything() -> None:
    values = channel()
    before = values.copy()
    normalize_channel(values, "ZScoreNormalization")
    assert abs(values.mean()) < 1e-6 and abs(values.std() - 1) < 1e-6
    np.testing.assert_allclose(values, (before - before.mean()) / before.std(), atol=1e-6)


def test_z_score_of_the_inside_leaves_the_outside_alone() -> None:
    values = channel()
    before = values.copy()
    inside = before > 90
    normalize_channel(values, "ZScoreNormalization", inside)
    np.testing.assert_array_equal(values[~inside], before[~inside])
    assert abs(values[inside].mean()) < 1e-6 and abs(values[inside].std() - 1) < 1e-6


def test_z_score_keeps_its_precision_far_from_zero() -> None:
    values = (np.random.default_rng(0).normal(0, 1, (40, 50, 60)) + 20000).astype(np.float32)
    exact = values.astype(np.float64)
    normalize_channel(values, "ZScoreNormalization")
    np.testing.assert_allclose(values, (exact - exact.mean()) / exact.std(), atol=2e-3)
    assert abs(values.std(dtype=np.float64) - 1) < 1e-6


def test_nothing_inside_and_constant_channels_stay_finite() -> None:
    values = np.zeros((2, 3, 4), np.float32)
    normalize_channel(values, "ZScoreNormalization", np.zeros(values.shape, bool))
    normalize_channel(values, "ZScoreNormalization")
    normalize_channel(values, "RescaleTo01Normalization")
    assert not values.any()


def test_ct_clips_to_the_datasets_percentiles() -> None:
    values = channel()
    expected = (np.clip(values, 20, 180) - 100) / 40
    normalize_channel(values, "CTNormalization", statistics=STATISTICS)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    with pytest.raises(ValueError, match="statistics"):
        normalize_channel(values, "CTNormalization")


def test_rescale_rgb_and_none() -> None:
    values = channel()
    normalize_channel(values, "RescaleTo01Normalization")
    assert values.min() == 0 and values.max() == 1
    before = values.copy()
    normalize_channel(values, "NoNormalization")
    np.testing.assert_array_equal(values, before)
    values *= 255
    normalize_channel(values, "RGBTo01Normalization")
    np.testing.assert_allclose(values, before, atol=1e-6)
    with pytest.raises(CaseError, match="from 0 to 255"):
        normalize_channel(values - 0.5, "RGBTo01Normalization")
    with pytest.raises(ValueError, match="unknown normalisation 'Other'"):
        normalize_channel(values, "Other")
