"""Training of 2D networks against nnU-Net's own classes: what is read and where, how slices are turned, loss and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.planar import PLANAR_CNN

pytest.importorskip("nnunetv2")
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches.augment import Drawn, SpatialRange, read_turned, turned_box
from nnssl_adapt.training.batches.intensity import Blur, LowResolution
from nnssl_adapt.training.batches.patches import PatchSampler, Place
from nnssl_adapt.training.batches.spatial import sample_into
from nnssl_adapt.training.optimise.losses import build_loss
from nnssl_adapt.training.optimise.network_options import set_deep_supervision
from nnssl_adapt.weights.network.architectures import build_network

LABELS = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}


@pytest.mark.parametrize("patch", [(512, 512), (320, 256), (96, 160), (56, 40), (64, 448), (30, 20)])
def test_rotation_and_size_to_read(patch: tuple[int, int]) -> None:
    fake = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *words: None
    )
    rotation, _, read_size, _ = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(fake)
    ours = SpatialRange.of((1, *patch), is_planar=True)
    assert (-ours.rotation, ours.rotation) == pytest.approx(rotation)
    assert ours.slice_by_slice and list(ours.read_size) == [1, *read_size]


def test_where_slices_lie() -> None:
    scheme, manager = LabelScheme.from_dataset_json(LABELS), LabelManager(LABELS["labels"], None)
    setup = np.random.RandomState(0)
    for seed in range(200):
        shape = setup.randint(1, 30, 3)
        patch = tuple(int(n) for n in setup.randint(4, 24, 2))
        read = tuple(p + int(extra) for p, extra in zip(patch, setup.randint(0, 9, 2), strict=True))
        locations = {
            key: np.stack([np.zeros(3, int), *(setup.randint(0, n, 3) for n in shape)], axis=1)
            for key in scheme.sampled_classes
        }
        theirs = nnUNetDataLoader(SimpleNamespace(identifiers=["x"]), 2, read, patch, manager, 0.33)
        ours = PatchSampler((1, *read), (1, *patch))
        for forced in (False, True):
            np.random.seed(seed)
            expected, _ = theirs.get_bbox(shape, forced, locations)
            got = ours.lower_corner(shape, forced, lambda found=locations: found, np.random.RandomState(seed))
            assert list(got) == [int(n) for n in expected]


def test_slices_are_turned_and_scaled() -> None:
    """One slice of a volume, whose neighbours must not be seen, against nnU-Net's 2D transform on that slice."""
    read, patch = (60, 68), (44, 40)
    different = 0
    for seed in range(6):
        random = np.random.RandomState(seed)
        volume = random.randn(2, 5, *read).astype(np.float32)
        labels = random.randint(-1, 4, (1, 5, *read)).astype(np.int16)
        transform = SpatialTransform(
            patch, 0, False, p_rotation=1, rotation=(-math.pi, math.pi), p_scaling=1, scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1, bg_style_seg_sampling=False, border_mode_seg="constant", padding_value_seg=-1,
        )  # fmt: skip
        chosen = torch.from_numpy(volume[:, 3])
        np.random.seed(seed)
        parameters = transform.get_parameters(image=chosen)
        matrix = np.eye(3)
        matrix[1:, 1:] = parameters["affine"]
        case = SimpleNamespace(data=volume, seg=labels, identifier="x")
        place = Place(case, (3, 0, 0), (1, *read), (1, *patch), seed)  # type: ignore[arg-type]
        box, to_box = turned_box(place, Drawn(matrix))
        image, codes = torch.empty((2, *box.size)), torch.empty(box.size, dtype=torch.uint8)
        read_turned(place, box, image, codes)
        found, winners = torch.empty((2, 1, *patch)), torch.empty((1, *patch), dtype=torch.uint8)
        sample_into(found, winners, image, codes, to_box)
        assert (found[:, 0] - transform._apply_to_image(chosen, **parameters)).abs().max() <= 3e-4
        theirs = transform._apply_to_segmentation(torch.from_numpy(labels[:, 3]), **parameters)
        different += int((winners.short() - 1 != theirs).sum())
    assert different <= 1e-3 * 6 * math.prod(patch)


def test_a_slice_is_blurred_and_shrunk_within_itself() -> None:
    image = torch.rand(1, 1, 20, 30)
    blurred = image.clone()
    Blur(0, (0.9, 0.6, 0.8)).apply(blurred)
    assert blurred.mean().item() == pytest.approx(
        image.mean().item(), abs=0.02
    )  # and not darkened along the axis of one voxel
    both = image.expand(1, 9, 20, 30).clone()
    Blur(0, (0.9, 0.6, 0.8)).apply(both)
    torch.testing.assert_close(both[:, 4:5], blurred)
    LowResolution(0, (1.0, 0.6, 0.6)).apply(image)
    assert image.shape == (1, 1, 20, 30) and image.isfinite().all()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_loss_and_gradients_of_all_weights(batch_dice: bool) -> None:
    """The same weights and batch through both: network, targets at every resolution, loss and backward pass."""
    scheme, manager = LabelScheme.from_dataset_json(LABELS), LabelManager(LABELS["labels"], None)
    torch.manual_seed(1)
    keys = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    theirs = get_network_from_plans(name, PLANAR_CNN.kwargs, keys, 2, 4, deep_supervision=True)
    ours = build_network(PLANAR_CNN, 2, 4, (1, 24, 32))
    set_deep_supervision(ours, True)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(3, 2, 24, 32)
    target = torch.randint(0, 4, (3, 1, 24, 32), dtype=torch.int16)

    value = build_loss(scheme, batch_dice, PLANAR_CNN.strides)(ours(image[:, :, None]), target[:, :, None])
    value.backward()
    strides = [tuple(stride) for stride in PLANAR_CNN.kwargs["strides"]]
    trainer = SimpleNamespace(
        label_manager=manager, configuration_manager=SimpleNamespace(batch_dice=batch_dice, pool_op_kernel_sizes=strides),
        is_ddp=False, enable_deep_supervision=True, _do_i_compile=lambda: False,
    )  # fmt: skip
    trainer._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(trainer)
    shrink = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    each = [shrink(segmentation=sample)["segmentation"] for sample in target]
    expected = nnUNetTrainer._build_loss(trainer)(
        theirs(image), [torch.stack(level) for level in zip(*each, strict=True)]
    )
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    assert got.keys() == wanted.keys() and scale > 1e-3
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max().item() < 1e-5 * scale, name
