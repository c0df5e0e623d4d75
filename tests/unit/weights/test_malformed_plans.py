"""Plans with anything in any place, and tensors with any names and shapes: a plan comes out, or one of our errors."""

from __future__ import annotations

import random

import pytest
import torch
from support.nnssl_files import plan, state_dict
from support.nnssl_networks import nnunet_plans

from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.plan_check import reconcile
from nnssl_adapt.weights.checkpoint.supervised import plan_from_nnunet, plan_from_tensors

ANYTHING = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\nb" * 400,
    "torch.nn.Linear",
]
ANYTHING += [[], [None], [1, 2], [3, 3, 3], [[2, 2, 2]] * 3, {}, {1: 2}, {"a": None}, [float("nan")] * 3, ("1", 2, 3)]


def one_line(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 700, text


def places(content, path=()):
    """Every place in nested mappings and lists."""
    children = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, (list, tuple))
        else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def replaced(content, path, value):
    """A copy with another value at one place, or without it."""
    if not path:
        return value
    copied = list(content) if isinstance(content, (list, tuple)) else dict(content)
    if value is KeyError and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = replaced(copied[path[0]], path[1:], value)
    return copied


def all_damages(content, values, randomness, count):
    options = [(path, value) for path in places(content) for value in values]
    return [replaced(content, path, value) for path, value in randomness.sample(options, count)]


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet", "Primus"])
def test_any_damage_to_a_plan_gives_a_plan_or_one_of_our_errors(class_name):
    patch = (4, 12, 16) if class_name == "Primus" else (8, 12, 16)
    tensors = state_dict(class_name, patch)
    for damaged in all_damages(plan(class_name, patch), [KeyError, *ANYTHING], random.Random(class_name), 60):
        try:
            reconcile(AdaptationPlan.parse(damaged, "file.pth"), tensors, "file.pth")
        except NnsslAdaptError as error:
            one_line(error)


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet"])
def test_any_damage_to_nnunets_files_gives_a_plan_or_one_of_our_errors(class_name):
    dataset = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "all": [1, 2], "b": 2},
        "image_orientation": "RPI",
    }
    both = {"plans": nnunet_plans(class_name, 1), "dataset": {**dataset, "regions_class_order": [1, 2]}}
    plan_from_nnunet(both["plans"], both["dataset"], "3d_fullres", "model")
    for damaged in all_damages(both, [KeyError, *ANYTHING], random.Random(class_name), 80):
        try:
            plans, described = damaged.get("plans"), damaged.get("dataset")
            if isinstance(plans, dict) and isinstance(described, dict):
                plan_from_nnunet(plans, described, "3d_fullres", "model")
        except NnsslAdaptError as error:
            one_line(error)


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet", "Primus"])
@pytest.mark.parametrize("with_plan", [True, False])
def test_any_other_shapes_and_names_give_a_plan_or_one_of_our_errors(class_name, with_plan):
    patch = (4, 12, 16) if class_name == "Primus" else (8, 12, 16)
    good, content = state_dict(class_name, patch), AdaptationPlan.parse(plan(class_name, patch), "file.pth")
    randomness = random.Random(f"{class_name} {with_plan}")
    for _ in range(30):
        tensors = dict(good)
        for name in randomness.sample(list(good), randomness.choice([1, 2, 20])):
            tensor = tensors.pop(name)
            shape = randomness.choice([(), (0,), (3,), tensor.shape[1:], (1, *tensor.shape), tensor.shape[::-1], None])
            renamed = randomness.choice(
                [name, name, name + ".x", name.replace("0", "9" * 5000), name.replace(".", "..")]
            )
            if shape is not None:
                tensors[renamed] = torch.zeros(shape)
        try:
            if with_plan:
                reconcile(content, tensors, "file.pth")
            else:
                plan_from_tensors(tensors, "file.pth")
        except NnsslAdaptError as error:
            assert "\n" not in str(error)
