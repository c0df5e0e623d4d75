"""Windows of intensities: nnU-Net's CT normalisation with exactly their numbers."""

import numpy as np
import pytest

from nnssl_adapt.data.normalize import normalize_channel
from nnssl_adapt.weights.families.family import Facts, Window

WINDOWS = [Window(-175, 250), Window(-963.8247715525971, 1053.678477684517), Window(-1000, 1000, (-1, 1))]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_is_ct_normalisation_with_its_numbers(window):
    image = np.linspace(-2000, 2000, 10 * 20 * 30, dtype=np.float32).reshape(10, 20, 30)
    low, high = window.to
    expected = (np.clip(image.astype(float), window.low, window.high) - window.low) / (window.high - window.low)
    normalize_channel(image, "CTNormalization", statistics=window.statistics())
    np.testing.assert_allclose(image, expected * (high - low) + low, atol=1e-6)
    assert image.min() == low and image.max() == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_nnunet_computes_the_same(window):
    classes = pytest.importorskip("nnunetv2.preprocessing.normalization.default_normalization_schemes")
    image = np.random.default_rng(0).normal(0, 900, (10, 20, 30)).astype(np.float32)
    theirs = classes.CTNormalization(False, window.statistics()).run(image.copy())
    normalize_channel(image, "CTNormalization", statistics=window.statistics())
    np.testing.assert_array_equal(image, theirs)


def test_a_window_that_is_none_is_refused():
    with pytest.raises(ValueError, match="lower"):
        Window(250, -175)


def test_facts_say_what_is_second_hand_and_what_no_file_can_say():
    facts = Facts(window=WINDOWS[0], unlike="scaled by percentiles 0.5 and 99.5", second_hand=("its spacing",))
    assert facts.normalization == "CTNormalization" and Facts().normalization == "ZScoreNormalization"
    shown = " | ".join(facts.notes())
    assert "-175 … 250" in shown and "percentiles" in shown and "second-hand" in shown and "its spacing" in shown
