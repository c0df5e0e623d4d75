"""nnU-Net's rules for the network; that they give what nnU-Net gives is a parity test."""

import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning import topology
from nnssl_adapt.planning.topology import (
    NNUNET_PRESETS,
    check_preset,
    feature_map_values,
    needs_low_resolution,
    plan_network,
    stages_for,
)
from nnssl_adapt.weights.network.architectures import build_network, check_patch

spacings = st.tuples(*[st.floats(0.3, 6)] * 3)
shapes = st.tuples(*[st.integers(24, 400)] * 3)
presets = st.sampled_from(sorted(NNUNET_PRESETS))


def test_thick_slices_are_halved_and_convolved_later():
    stages = stages_for((5, 1.25, 1.25), (20, 200, 180))
    assert stages.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert stages.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert stages.patch_size == (20, 224, 192)
    assert stages.divisors == (4, 32, 32)
    assert stages.features == [32, 64, 128, 256, 320, 320]


def test_an_axis_alone_is_halved_only_if_it_is_long():
    assert stages_for((1, 1, 1), (7, 7, 11)).strides == ((1, 1, 1),)
    assert stages_for((1, 1, 1), (7, 7, 12)).strides == ((1, 1, 1), (1, 1, 2))
    assert stages_for((1, 1, 1), (7, 8, 8.5)).patch_size == (7, 8, 10)


@given(spacings, shapes)
def test_every_axis_keeps_its_shortest_edge(spacing, shape):
    stages = stages_for(spacing, shape)
    for axis in range(3):
        assert stages.patch_size[axis] % stages.divisors[axis] == 0
        assert stages.patch_size[axis] // stages.divisors[axis] >= min(topology.SHORTEST_EDGE, shape[axis])
        kernels = [kernel[axis] for kernel in stages.kernels]
        assert kernels == sorted(kernels) and set(kernels) <= {1, 3}


@settings(max_examples=25, deadline=None)
@given(presets, spacings, shapes, st.integers(2, 20), st.integers(2, 500))
def test_every_planned_network_can_be_used(preset, spacing, shape, labels, cases):
    chosen = check_preset(preset)
    planned = plan_network(preset, spacing, shape, labels, math.prod(shape) * cases)
    assert check_patch(planned.architecture, planned.patch_size) == planned.patch_size
    strides = planned.architecture.total_stride
    assert all(n < size + stride for n, size, stride in zip(planned.patch_size, shape, strides, strict=True))
    assert planned.batch_size >= 2
    stages = stages_for(spacing, planned.patch_size)
    assert feature_map_values(chosen, stages, labels) <= chosen.budget
    if planned.batch_size > 2:
        most = math.prod(shape) * cases * chosen.covered
        assert (planned.batch_size - 0.5) * math.prod(planned.patch_size) <= most
    with torch.device("meta"):
        network = build_network(planned.architecture, 1, labels, planned.patch_size)
    counted = network.compute_conv_feature_map_size(planned.patch_size)
    assert counted == feature_map_values(chosen, stages, labels)


def test_presets_differ_in_what_they_are_for():
    shape = (300, 400, 350)
    planned = {name: plan_network(name, (1, 1.2, 1.1), shape, 3, 20 * math.prod(shape)) for name in NNUNET_PRESETS}
    volumes = {name: math.prod(plan.patch_size) for name, plan in planned.items()}
    assert volumes["ResEncM"] < volumes["ResEncL"] < volumes["ResEncXL"]
    assert planned["default"].architecture.network_class is PlainConvUNet
    assert planned["ResEncL"].architecture.network_class is ResidualEncoderUNet
    blocks = planned["ResEncL"].architecture.kwargs["n_blocks_per_stage"]
    assert blocks == [1, 3, 4, 6, 6, 6][: len(blocks)]


def test_batches_cover_a_twentieth_of_the_dataset_at_most():
    shape = (40, 56, 48)
    few = plan_network("default", (1, 1, 1), shape, 3, 10 * math.prod(shape))
    many = plan_network("default", (1, 1, 1), shape, 3, 1000 * math.prod(shape))
    assert few.batch_size == 2 < many.batch_size
    assert plan_network("ResEncM", (1, 1, 1), shape, 3, 10 * math.prod(shape)).batch_size == 10  # ResEnc: all of it


def test_low_resolution_is_for_images_of_which_a_patch_sees_little():
    assert needs_low_resolution("default", (1, 0.8, 0.8), (400, 512, 512), 3)
    assert not needs_low_resolution("default", (1, 1, 1), (138, 170, 138), 3)


def test_images_that_no_network_downsamples():
    with pytest.raises(PlanError, match="leave --keep-topology out"):
        plan_network("default", (3, 3, 1), (100, 120, 11), 2, 1e6)
    with pytest.raises(ConfigurationError, match="--preset L: unknown"):
        plan_network("L", (1, 1, 1), (64, 64, 64), 2, 1e6)
