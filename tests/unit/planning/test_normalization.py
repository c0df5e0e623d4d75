"""Normalisation by wish: the pre-training's, nnU-Net's rule for the data, or a scheme by name, channel by channel."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import nnssl_adapt as na
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.normalization import choose_normalization, intensity_statistics
from nnssl_adapt.weights.transfer.settings import TransferSettings

ROOMY = DatasetFingerprint(((1.0,) * 3,), ((9, 8, 7),), {}, 0.9)
CROPPED = replace(ROOMY, median_relative_size_after_cropping=0.7)


def chosen(wish, names=("CT", "T2", "rescale_to_0_1"), fingerprint=ROOMY, schemes=("ZScoreNormalization",)):
    raw = SimpleNamespace(channel_names=names, num_channels=len(names))
    plan = SimpleNamespace(normalization_schemes=schemes, use_mask_for_norm=(False,) * len(schemes))
    return choose_normalization(wish, plan, raw, fingerprint, TransferSettings())


def test_the_pretrainings_is_the_default_and_ct_is_warned_of(caplog):
    assert chosen("from_pretraining") == (["ZScoreNormalization"] * 3, [False] * 3)
    assert caplog.text.count("--normalization from_data") == 1 and "'CT' is CT" in caplog.text
    caplog.clear()
    chosen("from_pretraining", ("T1", "T2"))
    chosen("from_pretraining", ("CT",), schemes=("CTNormalization",))
    assert not caplog.text


def test_ct_normalization_of_another_image_is_warned_of(caplog):
    chosen("from_pretraining", ("T1",), schemes=("CTNormalization",))
    assert "'T1' gets CTNormalization" in caplog.text and "--normalization from_data" in caplog.text


@pytest.mark.parametrize(
    ("wish", "channels", "means"),
    [
        ("from_pretraining", (1, 0), [20, 10]),  # statistics go with the kernel
        ("from_pretraining", (1, None), [20, 2]),
        ("from_pretraining", "repeat", [10, 20]),
        ("from_pretraining", "mean", [1, 2]),
        ("from_data", (1, 0), [1, 2]),
        ("ct,from_pretraining", (1, 0), [1, 10]),
    ],
)
def test_intensity_statistics_go_with_their_channel(wish, channels, means):
    raw = SimpleNamespace(channel_names=("CT", "PET"), num_channels=2)
    plan = SimpleNamespace(num_input_channels=2, intensity=({"mean": 10}, {"mean": 20}))
    of_data = {"0": {"mean": 1}, "1": {"mean": 2}}
    settings = TransferSettings(channels=channels)
    found = intensity_statistics(wish, ["CTNormalization"] * 2, plan, raw, of_data, settings)
    assert [found[key]["mean"] for key in ("0", "1")] == means


def test_nnunets_rule_for_the_data():
    schemes = ["CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization"]
    assert chosen("from_data") == (schemes, [False] * 3)
    assert chosen("from_data", fingerprint=CROPPED) == (schemes, [False, True, False])
    assert chosen("from_data", ("noNorm", "RGB_to_0_1"))[0] == ["NoNormalization", "RGBTo01Normalization"]


def test_the_rule_is_nnunets():
    peer = pytest.importorskip("nnunetv2.preprocessing.normalization.map_channel_name_to_normalization")
    names = [*peer.channel_name_to_normalization_mapping, "T1", "ct ", "CT", "zScore"]
    ours = chosen("from_data", tuple(names))[0]
    assert ours == [peer.get_normalization_scheme(name).__name__ for name in names]


def test_each_channel_by_name():
    assert chosen("ct, from_pretraining,none")[0] == ["CTNormalization", "ZScoreNormalization", "NoNormalization"]
    assert chosen("zscore", fingerprint=CROPPED) == (["ZScoreNormalization"] * 3, [False, True, False])


@pytest.mark.parametrize(
    ("wish", "problem"), [("ct,zscore", "2 entries for 3"), ("Zscore,x,ct", "'x' is none of"), ("", "'' is none of")]
)
def test_wishes_that_can_not_be_read(wish, problem):
    with pytest.raises(ConfigurationError, match=problem):
        chosen(wish)


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ("percentiles:0.5:99.5", "percentiles of each image"),
        ("range:-1:1", "0 … 1"),
        ("window:-175", "window:LOW:HIGH"),
        ("window:250:-175", "lower to a higher"),
        ("window:low:high", "'low' is no number"),
        ("window:-inf:3", "no finite number"),
        ("zscore,ct,window:1:2:3", "window:LOW:HIGH"),
    ],
)
def test_scalings_that_nnunets_plans_can_not_say_are_refused(wish, problem):
    with pytest.raises(ConfigurationError, match=problem):
        chosen(wish)


def test_a_window_and_a_range_are_planned_so(tiny_dataset, small_resenc):
    tiny_dataset(spacing=(2.0, 1.0, 1.3), channels=2)
    plan = na.make_plan(991, small_resenc, normalization="window:100:500:-1:1,range", workers=1)
    assert plan.settings.normalization_schemes == ("CTNormalization", "RescaleTo01Normalization")
    numbers = plan.content["foreground_intensity_properties_per_channel"]["0"]
    assert (numbers["percentile_00_5"], numbers["percentile_99_5"]) == (100, 500)
    assert [(value - numbers["mean"]) / numbers["std"] for value in (100, 300, 500)] == [-1, 0, 1]


def test_it_is_planned_so(tiny_dataset, small_resenc):
    tiny_dataset(spacing=(2.0, 1.0, 1.3), channels=2)
    plan = na.make_plan(991, small_resenc, normalization="ct,none", workers=1)
    assert plan.settings.normalization_schemes == ("CTNormalization", "NoNormalization")
    assert plan.plans_name.endswith("Norm__CT_No")


@pytest.mark.parametrize(
    ("spacing", "target", "mode"),
    [((2.0, 1.0, 1.3), (1.0, 1.0, 1.0), "like_pretrained"), ((0.5, 0.6, 0.4), (0.6, 0.5, 0.4), "median")],
)
def test_auto_takes_what_the_comparison_picks(tiny_dataset, small_resenc, caplog, spacing, target, mode):
    """Pre-trained at 1 mm: followed by coarser images, but not by much finer ones."""
    tiny_dataset(spacing=spacing, channels=1)
    with caplog.at_level("INFO", logger="nnssl_adapt"):
        plan = na.make_plan(991, small_resenc, mode="auto", workers=1)
    assert plan.spacing == pytest.approx(target) and plan.provenance.spacing_mode == mode
    assert f"* auto picks {mode}" in caplog.text
