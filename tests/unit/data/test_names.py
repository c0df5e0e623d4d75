"""Names of channels and labels: the same thing written in many ways is one thing, and other things are not."""

import pytest

from nnssl_adapt.data.names import label_key, pair_channels, pair_labels, same_channel


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("T1", "t1w"),
        ("T1", "T1-weighted"),
        ("t1n", "T1_w"),
        ("t1ce", "T1Gd"),
        ("t1c", "T1-post"),
        ("T2-FLAIR", "flair"),
        ("t2f", "FLAIR"),
        ("T2*", "T2 star"),
        ("CT", "ct"),
        ("ADC map", "adc"),
        ("MyOwn_Contrast", "my own contrast"),
    ],
)
def test_two_spellings_are_one_contrast(one, other):
    assert same_channel(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("T1", "T2"), ("T1", "T1ce"), ("T2", "T2*"), ("T2", "FLAIR"), ("CT", "MRI"), ("MRI", "MRI"), ("0", "0"), ("", "")],
)
def test_other_contrasts_and_words_that_name_none_are_not(one, other):
    assert not same_channel(one, other)


@pytest.mark.parametrize(
    ("wanted", "known", "origin"),
    [
        (["T1", "T2"], ["T2", "T1"], [1, 0]),
        (["T1"], ["T2", "T1w"], [1]),
        (["T1", "T1w"], ["T1w", "T1"], [1, 0]),  # letter by letter first
        (["T1"], ["t1w", "T1n"], [None]),  # which of the two?
        (["T1", "t1w"], ["t1n"], [None, None]),
        (["image", "T2"], ["T2", "image"], [None, 0]),
    ],
)
def test_channels_are_paired_only_where_it_is_clear(wanted, known, origin):
    assert pair_channels(wanted, known) == origin


def test_labels_are_paired_whatever_case_separators_and_order_of_words():
    known = ["background", "kidney_left", "Kidney Right", "liver_tumour"]
    assert pair_labels(["background", "left kidney", "spleen", "Liver-Tumor"], known) == [0, 1, None, 3]
    assert label_key("Left-Kidney") == label_key("kidney left") != label_key("right kidney")
