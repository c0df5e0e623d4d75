"""Names by ivadomed's convention; the documents' own examples are read as they are meant."""

import datetime

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.sharing.naming import FIELDS, build_name, read_name, release_tag

EXAMPLES = {
    "model_seg_monkey_sc_t1_unet3d": {
        "task": "seg",
        "anatomy": "sc",
        "animal": "monkey",
        "pathology": "hc",
        "condition": "invivo",
        "contrast": "t1",
        "architecture": "unet3d",
    },
    "model_seg_sc-gm-lesion_human_ms_exvivo_t2star": {
        "task": "seg",
        "anatomy": "sc gm lesion",
        "animal": "human",
        "pathology": "ms",
        "condition": "exvivo",
        "contrast": "t2star",
        "architecture": "unet2d",
    },
    "model_seg_sc-gm_t1-t2_unet3d": {
        "task": "seg",
        "anatomy": "sc gm",
        "animal": "human",
        "pathology": "hc",
        "condition": "invivo",
        "contrast": "t1 t2",
        "architecture": "unet3d",
    },
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documents_examples_are_read_as_meant(name):
    read = read_name(name)
    assert {key: " ".join(values) for key, values in read.values.items()} == EXAMPLES[name]


def test_departures_are_reasons_and_not_errors():
    assert any("another order than task, anatomy, animal" in note for note in read_name(next(iter(EXAMPLES))).notes)
    assert any("'human' is the default" in note for note in read_name(list(EXAMPLES)[1]).notes)
    assert read_name("model_seg_sc-gm_t1-t2_unet3d").notes == ()
    loose = read_name("model-spinal-rootlets_mp2rage")
    assert loose.values["contrast"] == ("mp2rage",)
    assert any("does not begin with model_" in note for note in loose.notes) and "no task" in loose.notes


@pytest.mark.parametrize("bad", ["model_seg_sc t1", "model/seg", "../model_seg", "modèle_seg", "", "model_seg.zip"])
def test_only_illegal_characters_are_an_error_when_reading(bad):
    with pytest.raises(ConfigurationError, match="letters, digits"):
        read_name(bad)


def test_written_names_leave_defaults_out_and_are_read_back():
    name = build_name(task="seg", anatomy=["sc", "gm"], contrast="t1-t2", architecture="unet3d", animal="human")
    assert str(name) == "model_seg_sc-gm_t1-t2_unet3d"
    assert str(build_name(task="seg", anatomy="sc", contrast="t2star", condition="exvivo")) == "model_seg_exvivo_t2star"
    everything = build_name(
        task="label",
        anatomy="csf",
        animal="dog",
        pathology="sci",
        condition="exvivo",
        contrast="t2",
        architecture="unet3d",
    )
    assert str(everything) == "model_label_csf_dog_sci_exvivo_t2_unet3d"
    for made in (name, everything):
        read = read_name(str(made))
        assert read.values == made.values and not [note for note in read.notes if not note.startswith("no ")]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"task": "segment", "contrast": "t1"}, "task 'segment' is none of seg, label, find"),
        ({"task": "seg", "contrast": "t 1"}, "characters other than letters and digits"),
        ({"task": "seg", "condition": "invivo-exvivo"}, "takes one"),
        ({"task": "seg", "contrast": "t1,t1"}, "twice"),
        ({"task": "seg", "contrast": "T2w"}, "contrast 'T2w' is written 't2w'"),
        ({"task": "seg", "contrast": "human"}, "is a value of the field animal"),
        ({"task": "seg", "architecture": "resencl"}, "--new-values"),
        ({"tasks": "seg"}, "no field 'tasks'"),
        ({"anatomy": "sc"}, "nothing but defaults"),
    ],
)
def test_writing_is_strict(given, reason):
    with pytest.raises(ConfigurationError, match=reason):
        build_name(**given)


def test_all_mistakes_are_told_at_once_and_new_values_can_be_allowed():
    with pytest.raises(ConfigurationError) as caught:
        build_name(task="segment", condition="frozen", contrast="t_1")
    assert all(word in str(caught.value) for word in ("'segment'", "'frozen'", "'t_1'"))
    assert str(build_name(True, task="seg", architecture="resencl", contrast="t1")) == "model_seg_t1_resencl"


def test_every_default_is_known():
    assert all(rule.default is None or rule.default in rule.known for rule in FIELDS.values())


def test_release_tags():
    assert release_tag("20240915") == release_tag("2024-09-15") == release_tag("r20240915") == "r20240915"
    assert release_tag(datetime.date(2024, 9, 5)) == "r20240905"
    assert release_tag() == f"r{datetime.date.today():%Y%m%d}"
    for bad in ("20241340", "15.9.2024", "2024", "r", "99990101"):
        with pytest.raises(ConfigurationError, match="20240915"):
            release_tag(bad)
