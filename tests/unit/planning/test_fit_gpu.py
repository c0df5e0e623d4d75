"""--fit-gpu: the plan's patch and batch, chosen for a GPU's memory and recorded."""

import copy
import json
import math

import pytest
import torch
from support.tiny_plans import CNN, TRANSFORMER, plan_content

import nnssl_adapt as na
from nnssl_adapt.errors import ConfigurationError, DeviceUnavailable, PlanError
from nnssl_adapt.planning import fit_gpu
from nnssl_adapt.planning.fit_gpu import fit_plan, memory_budget, plan_memory, usual_step
from nnssl_adapt.planning.memory import CONTEXT, GIB, StepSettings, estimate_memory
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.weights.network.architectures import build_network


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GB", 16 * 10**9),
        (" 15.5 GiB", int(15.5 * GIB)),
        ("24", 24 * GIB),
        ("11264MiB", 11 * GIB),
        ("500mb", 500 * 10**6),
    ],
)
def test_amounts_of_memory(text, expected):
    assert memory_budget(text) == expected


@pytest.mark.parametrize("text", ["", "much", "16TB", "-3GB", "0", "1e3", "16 GB x"])
def test_amounts_that_can_not_be_read(text):
    with pytest.raises(ConfigurationError, match="expected auto or an amount of memory such as 16GB"):
        memory_budget(text)


def test_auto_is_the_gpu_that_is_here(monkeypatch):
    class Properties:
        total_memory = 11 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties() if device == 1 else None)
    assert memory_budget("auto") == 11 * GIB


def test_auto_without_a_gpu_says_what_to_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="--fit-gpu 24GB"):
        memory_budget("auto")


def plan_of(architecture, median=(70.0, 150.0, 101.5)):
    content = plan_content(architecture)
    content["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = list(median)
    return FinetunePlan(content)


@pytest.mark.parametrize("architecture", [CNN, TRANSFORMER])
def test_patch_and_batch_are_recorded_with_the_reason(architecture):
    plan = plan_of(architecture)
    before = copy.deepcopy(plan.content)
    budget = estimate_memory(architecture, 1, 3, (32, 64, 48), 2, usual_step(architecture)).total
    fitted = fit_plan(plan, heads=3, cases=40, requested=f"{budget / 2**20 + 0.1:.4f}MiB")
    assert plan.content == before
    assert math.prod(fitted.patch_size) > 0.9 * 32 * 64 * 48 > math.prod(plan.patch_size)
    assert plan_memory(fitted, 3).total <= budget + 2**20
    record = fitted.provenance.fit_gpu
    assert record["patch_before"] == list(plan.patch_size)
    assert record["estimate_bytes"]["total"] == plan_memory(fitted, 3).total
    assert record["reason"] in str(fitted)
    json.dumps(fitted.content)
    if architecture.is_transformer:  # whose positions are as many as the patch has tokens
        arguments = fitted.content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert arguments["input_shape"] == list(fitted.patch_size)
    with torch.device("meta"):
        build_network(fitted.architecture, 1, 3, fitted.patch_size)


def test_batches_have_a_twentieth_of_the_dataset_at_most():
    for cases, batch in ((200, round(200 * 0.05 * (37 * 50 * 41.5) / (36 * 48 * 40))), (5, 2)):
        fitted = fit_plan(plan_of(CNN, (37.0, 50.0, 41.5)), 3, cases, "64GB")
        assert (fitted.patch_size, fitted.batch_size) == ((36, 48, 40), batch)


def test_a_plan_without_its_median_image():
    content = plan_content(CNN)
    del content["configurations"]["3d_fullres"]["median_image_size_in_voxels"]
    with pytest.raises(PlanError, match="ptPlans__tiny has no median_image_size_in_voxels"):
        fit_plan(FinetunePlan(content), 3, cases=5, requested="8GB")


def test_how_the_published_recipes_train():
    assert (usual_step(CNN).optimizer, usual_step(TRANSFORMER).optimizer) == ("sgd", "adamw")


def test_a_plan_for_a_dataset(tiny_dataset, small_resenc):
    """No larger than the images, whatever the pre-training's patch; the preprocessed cases are the same."""
    tiny_dataset(shape=(50, 70, 90), spacing=(1.0, 1.0, 1.0))
    checkpoint = na.open_checkpoint(small_resenc)
    usual = na.make_plan(991, checkpoint, workers=1)
    plan = na.make_plan(991, checkpoint, fit_gpu="8GB", workers=1)
    median = plan.settings_of_configuration["median_image_size_in_voxels"]
    strides = plan.architecture.total_stride
    assert plan.patch_size == tuple(int(n // s) * s for n, s in zip(median, strides, strict=True))
    assert plan.patch_size != usual.patch_size
    assert plan.data_identifier == usual.data_identifier
    assert plan.plans_name == usual.plans_name
    found = FinetunePlan.load(plan.save())
    assert (found.patch_size, found.batch_size) == (plan.patch_size, plan.batch_size)


def test_weights_for_a_transformer_fit_any_patch(tiny_dataset, small_resenc):
    tiny_dataset(shape=(50, 70, 90), spacing=(1.0, 1.0, 1.0))
    checkpoint = na.open_checkpoint(small_resenc.parent / "small_primus_simmim")
    plan = na.make_plan(991, checkpoint, fit_gpu="8GB", workers=1)
    assert plan.patch_size != checkpoint.plan.patch_size
    network = build_network(plan.architecture, 1, 3, plan.patch_size)
    report = na.transfer_weights(checkpoint, network)
    assert report.coverage == 1.0
    grid = "×".join(str(n // 8) for n in plan.patch_size)
    assert f"positions 4×4×4 → {grid}" in str(report)


def test_mistakes_do_not_wait_for_the_images(tiny_dataset, small_resenc, monkeypatch):
    tiny_dataset()
    monkeypatch.setattr(na.planning.like_pretrained, "check_transfer", None)
    with pytest.raises(ConfigurationError, match="--fit-gpu lots"):
        na.make_plan(991, na.open_checkpoint(small_resenc), fit_gpu="lots", workers=1)


@pytest.mark.cuda
def test_auto_on_a_gpu(cuda_device):
    if cuda_device.type == "cpu":
        pytest.skip("is about a card's memory")
    assert GIB + CONTEXT < memory_budget(fit_gpu.AUTO) == torch.cuda.get_device_properties(0).total_memory


def test_the_channels_of_a_cascade_are_counted():
    plan, step = plan_of(CNN, (48.0, 64.0, 48.0)), StepSettings(device="cpu")
    budget = plan_memory(plan.replaced(patch_size=(32, 48, 32)), 9, step).total
    wish = f"{budget / 2**20 + 0.1:.4f}MiB"
    alone, with_stage = (fit_plan(plan, 9, 40, wish, step, stage_channels=more) for more in (0, 8))
    assert math.prod(with_stage.patch_size) * with_stage.batch_size < math.prod(alone.patch_size) * alone.batch_size
    needed = [plan_memory(fitted, 9, step, stage_channels=8).total for fitted in (with_stage, alone)]
    assert needed[0] <= budget + 2**20 < needed[1]
