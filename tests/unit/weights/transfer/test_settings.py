"""Choices of a transfer are checked when they are made, and survive JSON."""

import json

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.weights.transfer.settings import TransferSettings, parse_channels

NAMES = ["T1", "T2", "FLAIR"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scope": "decoder"}, "unknown scope 'decoder': auto, encoder"),
        ({"token_order": "dhw"}, "unknown token order 'dhw': auto, hwd, whd"),
        ({"channels": "average"}, "unknown channel rule 'average'"),
        ({"channels": (-1, 0)}, r"channel map \[-1, 0\]"),
        ({"channels": (None, None)}, "at least one number"),
        ({"channels": ()}, "at least one number"),
        ({"channels": (True, 0)}, "channel map"),
        ({"channels": (0.0,)}, "channel map"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        TransferSettings(**fields)


@pytest.mark.parametrize(
    "settings",
    [
        TransferSettings(),
        TransferSettings("encoder+decoder", (1, None, 0), "whd", ("encoder.stages.5.*", "*.bias")),
        TransferSettings(channels="mean", waive="one.*"),
    ],
)
def test_settings_are_the_same_after_a_way_through_json(settings):
    assert TransferSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_a_single_waiver_is_one_pattern():
    assert TransferSettings(waive="ab*").waive == ("ab*",)


def test_unknown_entries_are_refused_by_name():
    with pytest.raises(ConfigurationError, match="waived"):
        TransferSettings.from_dict({"waived": []})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean", "mean"),
        (" Zero ", "zero"),
        ("T1=0,T2=0,FLAIR=new", (0, 0, None)),
        ("flair = 2, t2=NEW, T1=1", (1, None, 2)),
        ("0=3,1=new,2=0", (3, None, 0)),
        ("T1=T1w,t2_w=1,FLAIR=new", ("T1w", 1, None)),
    ],
)
def test_channels_are_read_by_name_or_number(text, expected):
    assert parse_channels(text, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("T1=0,T2=0", "nothing is said of FLAIR"),
        ("T1=0,T2=0,PD=1", "can't read 'PD=1'"),
        ("T1=0,T1=1,T2=0,FLAIR=0", "channel T1 is there twice"),
        ("T1=0,0=1,T2=0,FLAIR=0", "channel 0 is there twice"),
        ("T1=-1,T2=0,FLAIR=0", "can't read 'T1=-1'"),
        ("T1,T2,FLAIR", "can't read 'T1'"),
        ("T1=new,T2=new,FLAIR=new", "at least one number"),
        ("", "can't read ''"),
    ],
)
def test_maps_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_channels(text, NAMES)
