"""The record of how a plan was made: read, written as it was, and refused where it is damaged."""

import json
from pathlib import Path

import pytest

from nnssl_adapt.errors import PlanError
from nnssl_adapt.planning.provenance import Provenance, WeightsRecord

# As plans files of released versions have them.
OWN_NETWORK = {
    "version": "0.1.0",
    "source": {
        "source": "owner/name",
        "kind": "huggingface",
        "repo_id": "owner/name",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "filename": "checkpoint_final.pth",
        "sha256": "ab" * 32,
        "fold": None,
    },
    "source_choices": {"fold": "3"},
    "transfer": {"scope": "auto", "channels": "repeat", "token_order": "auto", "waive": ["encoder.*"]},
    "trainer_name": "BaseMAETrainer",
    "orientation": None,
    "spacing_mode": "like_pretrained",
    "architecture_preset": None,
    "preprocessing_digest": "cd" * 32,
    "fit_gpu": {"asked": "16GB", "reason": "the largest patch"},
}
KEPT_NETWORK = {
    **{key: OWN_NETWORK[key] for key in list(OWN_NETWORK)[:6]},
    "spacing_mode": "base_plans",
    "base_plans": None,
    "topology": {"planned_by": "nnssl_adapt", "preset": "ResEncL"},
    "architecture_preset": None,
    "preprocessing_digest": "cd" * 32,
    "of_a_later_version": [1, 2],
}


@pytest.mark.parametrize("content", [OWN_NETWORK, KEPT_NETWORK])
def test_written_as_it_was_read_byte_for_byte(content):
    assert json.dumps(Provenance.parse(content, "plan").to_dict()) == json.dumps(content)


def test_plans_of_nnunet_have_none():
    assert Provenance.parse(None, "plan") == Provenance() and Provenance().source is None


def test_an_address_on_the_hub_is_named_with_its_revision():
    found = Provenance.parse(OWN_NETWORK, "plan")
    assert str(found.source) == "owner/name@0123456789ab"
    assert str(WeightsRecord(source="weights.pth")) == "weights.pth"
    assert found.transfer.waive == ("encoder.*",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", "owner/name"),
        ("source", {"sha256": 5}),
        ("source_choices", ["fold"]),
        ("source_choices", {"fold": 3}),
        ("transfer", 1),
        ("transfer", {"scope": "everything"}),
        ("fit_gpu", "16GB"),
        ("orientation", ["R", "P", "I"]),
    ],
)
def test_damage_is_named_with_its_place_and_file(key, value):
    path = Path("plans.json")
    with pytest.raises(PlanError, match=key) as caught:
        Provenance.parse({**OWN_NETWORK, key: value}, path)
    assert caught.value.path == path


def test_something_else_than_an_object_is_refused():
    with pytest.raises(PlanError, match="nnssl_adapt"):
        Provenance.parse([1], "plan")
