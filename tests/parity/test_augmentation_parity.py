"""The augmentation against batchgeneratorsv2's transforms, and against nnU-Net's chain of them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import gaussian_filter

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches.augment import Augmentation, SpatialRange, training_transforms
from nnssl_adapt.training.batches.augment_gpu import DeviceAugmentation, device_transforms
from nnssl_adapt.training.batches.intensity import Blur, Contrast, Gamma, LowResolution
from nnssl_adapt.training.batches.patches import Place
from nnssl_adapt.training.batches.spatial import Box, needed_box, sample, with_centre

READ, PATCH = (52, 60, 68), (36, 44, 40)


def smooth(shape, seed):
    random = np.random.RandomState(seed)
    image = gaussian_filter(random.randn(*shape), 1.5)
    return torch.from_numpy((image / image.std()).astype(np.float32))


def labels_of(shape, count, seed):
    """Touching regions of ``count`` labels, some of it outside."""
    random = np.random.RandomState(seed)
    levels = np.stack([gaussian_filter(random.randn(*shape), 5) for _ in range(count)])
    labels = levels.argmax(0).astype(np.int16)
    labels[:, :7] = -1
    return torch.from_numpy(labels)


def their_spatial(dimensions, seed, patch, image):
    limit = math.radians(30) if dimensions == 3 else math.pi
    transform = SpatialTransform(
        patch,
        0,
        False,
        p_rotation=1,
        rotation=(-limit, limit),
        p_scaling=1,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    np.random.seed(seed)
    return transform, transform.get_parameters(image=image)


def ours(image, labels, matrix, patch, filled):
    """What the chain does with these parameters, on a box that is cut out as it would be read."""
    box = needed_box(matrix, patch, Box((0, 0, 0), filled))
    margin = 40
    where = tuple(slice(margin + a, margin + b) for a, b in zip(box.start, box.stop, strict=True))
    around = [margin] * 6
    pixels = torch.nn.functional.pad(image, around)[(slice(None), *where)].contiguous()
    codes = torch.nn.functional.pad((labels + 1).to(torch.uint8), around)[where].contiguous()
    local = matrix.copy()
    local[:, 3] -= box.start
    out, winners = sample(pixels, codes, local, patch)
    return out, winners.to(torch.int16) - 1


@pytest.mark.parametrize("count", [2, 5, 12])
def test_turned_and_scaled_patches(count):
    different = 0
    for seed in range(6):
        image, labels = smooth(READ, seed)[None], labels_of(READ, count, seed)
        theirs, parameters = their_spatial(3, seed, PATCH, image)
        found, winners = ours(image, labels, with_centre(parameters["affine"], READ, PATCH), PATCH, READ)
        assert (found - theirs._apply_to_image(image, **parameters)).abs().max() <= 7e-5
        different += int((winners != theirs._apply_to_segmentation(labels[None], **parameters)[0]).sum())
        assert len(winners.unique()) >= min(count, 3)
    assert different <= 4e-6 * 6 * math.prod(PATCH)


def test_patches_turned_slice_by_slice():
    read, patch = (9, 60, 68), (9, 44, 40)
    different = 0
    for seed in range(6):
        image, labels = smooth(read, seed)[None], labels_of(read, 4, seed)
        theirs, parameters = their_spatial(2, seed, patch[1:], image[0])
        matrix = np.eye(3)
        matrix[1:, 1:] = parameters["affine"]
        found, winners = ours(image, labels, with_centre(matrix, read, patch), patch, read)
        assert (found[0] - theirs._apply_to_image(image[0], **parameters)).abs().max() <= 7e-5
        different += int((winners != theirs._apply_to_segmentation(labels, **parameters)).sum())
    assert different <= 4e-6 * 6 * math.prod(patch)


def image_of(seed=0):
    return torch.stack([smooth(PATCH, seed), smooth(PATCH, seed + 1) * 3 + 2])


@pytest.mark.parametrize("spreads", [(0.5, 0.6, 0.7), (0.92, 1.0, 0.85)])
def test_blur(spreads):
    found, expected = image_of(), image_of()
    Blur(1, spreads).apply(found)
    theirs = GaussianBlurTransform((0.5, 1.0), p_per_channel=1)
    theirs._apply_to_image(expected, apply_to_channel=torch.tensor([False, True]), sigmas=[list(spreads)])
    assert torch.allclose(found, expected, atol=1e-5)


def test_contrast():
    found, expected = image_of(), image_of()
    Contrast(1, 1.2).apply(found)
    chosen = {"apply_to_channel": torch.tensor([1]), "multipliers": torch.tensor([1.2])}
    ContrastTransform(1.2, True, False, 1)._apply_to_image(expected, **chosen)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scale", [(0.5, 0.5, 0.5), (1.0, 0.77, 0.77)])
def test_low_resolution(scale):
    found, expected = image_of(), image_of()
    LowResolution(1, scale).apply(found)
    theirs = SimulateLowResolutionTransform((0.5, 1), False, True, None)
    theirs._apply_to_image(expected, apply_to_channel=[1], scales=torch.tensor([scale], dtype=torch.float64))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("exponent", [0.71, 1.45])
def test_gamma(exponent, inverted):
    found, expected = image_of(), image_of()
    Gamma(1, exponent, inverted).apply(found)
    GammaTransform(1, 0, False, 1, 1)._apply_to_image(
        expected,
        apply_to_channel=torch.tensor([1]),
        retain_stats=torch.tensor([True]),
        invert_image=torch.tensor([inverted]),
        gamma=torch.tensor([exponent]),
    )
    assert torch.allclose(found, expected, atol=5e-5)


# -- the whole chain, by what comes out ------------------------------------------------------------------------------------

SMALL = (16, 20, 18)
CONTENT = {"labels": {"background": 0, "a": 1, "b": 2}}


class Case:
    def __init__(self, shape):
        self.data = torch.stack([smooth(shape, 3), smooth(shape, 4)]).numpy()
        self.seg = np.maximum(labels_of(shape, 3, 5).numpy(), 0)[None]


def figures(image, target, plain):
    """What each transform leaves behind in an image, so that chains can be compared without knowing what they drew."""
    first = image[0]
    roughness = (first.diff(dim=2) ** 2).mean() / first.var()
    skewness = ((first - first.mean()) ** 3).mean() / first.std() ** 3
    upright = [float((target[0].diff(dim=axis) != 0).float().mean()) for axis in range(3)]
    halves = [float((image[1] * plain).mean()) for plain in plain_halves(plain)]
    moments = [
        first.mean(),
        first.std(),
        image[1].std(),
        first.max(),
        roughness,
        skewness,
        (target == 2).float().mean(),
    ]
    return [float(value) for value in moments] + upright + halves


def plain_halves(plain):
    """The unchanged patch as it is and mirrored along each axis: what the result is compared with."""
    return [plain, plain.flip(0), plain.flip(1), plain.flip(2)]


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_moments_of_the_chain(kind):
    """Means and spreads over many samples of what comes out agree with the library's chain within chance."""
    fake = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=SMALL), print_to_log_file=lambda *words: None
    )
    rotation, dummy, read, axes = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(fake)
    theirs = nnUNetTrainer.get_training_transforms(SMALL, rotation, None, axes, dummy, [False, False], False, (1, 2))
    for transform in theirs.transforms:
        if type(getattr(transform, "transform", None)).__name__ == "GaussianBlurTransform":
            transform.transform.benchmark = False
    case, labels, spatial = (
        Case(tuple(int(n) for n in read)),
        LabelScheme.from_dataset_json(CONTENT),
        SpatialRange.of(SMALL),
    )
    image, seg = torch.from_numpy(case.data), torch.from_numpy(case.seg)
    start = [r // 2 - p // 2 for r, p in zip(read, SMALL, strict=True)]
    plain = image[1][tuple(slice(a, a + p) for a, p in zip(start, SMALL, strict=True))]
    count = 1200
    np.random.seed(0)
    torch.manual_seed(0)
    expected = []
    for _ in range(count):
        out = theirs(image=image.clone(), segmentation=seg.clone())
        expected.append(figures(out["image"], out["segmentation"], plain))
    places = [Place(case, (0, 0, 0), spatial.read_size, SMALL, seed) for seed in range(count)]
    if kind == "cpu":
        made = training_transforms(SMALL, spatial, axes, (False, False), labels)(places)
        images, targets = made["image"], made["target"]
    else:
        images, targets = DeviceAugmentation(labels, (False, False))(
            device_transforms(spatial, axes, labels)(places), "cpu"
        )
    found = [figures(image, target, plain) for image, target in zip(images, targets, strict=True)]
    mine, others = np.array(found), np.array(expected)
    error = np.sqrt((mine.var(0) + others.var(0)) / count)
    assert (np.abs(mine.mean(0) - others.mean(0)) < 4 * error).all()
    squares, other_squares = ((each - others.mean(0)) ** 2 for each in (mine, others))
    error = np.sqrt((squares.var(0) + other_squares.var(0)) / count)
    assert (np.abs(squares.mean(0) - other_squares.mean(0)) < 4.5 * error).all()


def test_probabilities_are_nnunets():
    """The library's own numbers, read from its chain, beside what is drawn here."""
    patch = (16, 20, 18)
    theirs = nnUNetTrainer.get_training_transforms(patch, (-0.5, 0.5), None, (0, 1, 2), False, [False])
    rates = {}
    for transform in theirs.transforms:
        inner = getattr(transform, "transform", None)
        if inner is not None:
            name = type(inner).__name__ + ("Inverted" if getattr(inner, "p_invert_image", 0) else "")
            per_channel = inner.p_per_channel
            rates[name] = transform.apply_probability * per_channel
    draw = Augmentation(SpatialRange.of(patch), (0, 1, 2)).draw
    steps = [[(type(s).__name__, getattr(s, "inverted", False)) for s in draw(seed, 1).steps] for seed in range(8000)]
    ours_by_name = {
        "GaussianNoiseTransform": ("Noise", False),
        "GaussianBlurTransform": ("Blur", False),
        "MultiplicativeBrightnessTransform": ("Brightness", False),
        "ContrastTransform": ("Contrast", False),
        "SimulateLowResolutionTransform": ("LowResolution", False),
        "GammaTransformInverted": ("Gamma", True),
        "GammaTransform": ("Gamma", False),
    }
    assert set(rates) == set(ours_by_name)
    for name, rate in rates.items():
        found = np.mean([ours_by_name[name] in each for each in steps])
        assert found == pytest.approx(rate, abs=4 * math.sqrt(rate / len(steps))), name
