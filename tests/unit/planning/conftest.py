"""Checkpoints as planning sees them: the small real ones, said to be something else."""

from dataclasses import replace

import pytest
from support.tiny_cnn import CNN

import nnssl_adapt as na
from nnssl_adapt.weights.network.architectures import Architecture


@pytest.fixture
def supervised(small_resenc):
    """``supervised(**entries)``: a small network as if it had been trained to segment; entries are of its plan."""

    def make(**entries):
        checkpoint = na.open_checkpoint(small_resenc.parent / "small_plainconv")
        plan = checkpoint.plan.model_copy(update={"supervised": True, **entries})
        return replace(checkpoint, plan=plan)

    return make


@pytest.fixture
def contrast_agnostic_strides():
    """The strides of the published spinal cord network, its last one as given."""

    def network(last):
        return Architecture(
            "PlainConvUNet",
            {
                **CNN,
                "n_stages": 6,
                "features_per_stage": [2] * 6,
                "kernel_sizes": [[3, 3, 3]] * 6,
                "strides": [[1, 1, 1], *[[2, 2, 2]] * 4, last],
                "n_conv_per_stage": [1] * 6,
                "n_conv_per_stage_decoder": [1] * 5,
            },
        )

    return network
