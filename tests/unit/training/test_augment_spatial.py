"""Sampling turned patches, against a slow and obvious way of doing it."""

import itertools
import math

import numpy as np
import pytest
import torch

from nnssl_adapt.training.batches import spatial
from nnssl_adapt.training.batches.spatial import (
    Box,
    affine_matrix,
    code_type,
    in_plane_matrix,
    mirrored,
    needed_box,
    sample,
    with_centre,
)

READ, PATCH = (18, 22, 26), (7, 9, 11)


def volume(labels=4, channels=2, dtype=torch.uint8, seed=0):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(channels, *READ, generator=random)
    small = torch.randint(0, labels + 1, [n // 2 for n in READ], generator=random)
    codes = small.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return image, codes.to(dtype)


def boxed(image, codes, box):
    """The box of two volumes, zeros where it sticks out."""
    margin = 40
    around = [(0, 0)] + [(margin, margin)] * 3
    where = tuple(slice(margin + a, margin + b) for a, b in zip(box.start, box.stop, strict=True))
    padded = np.pad(image.numpy(), around)[(slice(None), *where)]
    marks = np.pad(codes.numpy(), around[1:])[where]
    return torch.from_numpy(padded.copy()), torch.from_numpy(marks.copy())


def slowly(image, codes, matrix):
    """Voxel by voxel in double precision; ties are not looked after."""
    margin = 40
    pixels = np.pad(image.numpy().astype(float), [(0, 0)] + [(margin, margin)] * 3)
    marks = np.pad(codes.numpy(), margin)
    out, winners = np.zeros((len(image), *PATCH)), np.zeros(PATCH, int)
    close = np.zeros(PATCH, bool)
    for voxel in itertools.product(*(range(n) for n in PATCH)):
        place = matrix[:, :3] @ voxel + matrix[:, 3] + margin
        first = np.floor(place).astype(int)
        scores = {}
        for corner in itertools.product((0, 1), repeat=3):
            weight = np.prod(np.where(corner, place - first, 1 - place + first))
            at = tuple(first + corner)
            out[(slice(None), *voxel)] += weight * pixels[(slice(None), *at)]
            scores[marks[at]] = scores.get(marks[at], 0) + weight
        ranked = sorted(scores, key=scores.get)
        winners[voxel] = ranked[-1]
        close[voxel] = len(ranked) > 1 and scores[ranked[-1]] - scores[ranked[-2]] < 2e-3
    return out, winners, close


def matrices():
    turned = affine_matrix((0.3, -0.4, 0.2), 1.2)
    yield "turned", with_centre(turned, READ, PATCH)
    yield "turned and mirrored", mirrored(with_centre(turned, READ, PATCH), PATCH, (0, 2))
    yield "scaled", mirrored(with_centre(affine_matrix((0, 0, 0), 0.83), READ, PATCH), PATCH, (1,))
    yield "in plane", with_centre(in_plane_matrix(2.5, 1.3), (PATCH[0], *READ[1:]), PATCH)
    yield "far out", with_centre(affine_matrix((0.1, 0.2, 0.3), 3.0), READ, PATCH)
    beyond = with_centre(turned, READ, PATCH)
    beyond[:, 3] += (-30, 0, 30)
    yield "all of it outside", beyond


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("name, matrix", list(matrices()), ids=[name for name, _ in matrices()])
def test_sampling(name, matrix, dtype):
    image, codes = volume(dtype=dtype)
    filled = Box((0, 0, 0), READ)
    box = needed_box(matrix, PATCH, filled)
    local = matrix.copy()
    local[:, 3] -= box.start
    out, winners = sample(*boxed(image, codes, box), local, PATCH)
    expected, labels, close = slowly(image, codes, matrix)
    assert np.abs(out.numpy() - expected).max() < 3e-5
    assert winners.dtype == dtype and (winners.numpy() == labels)[~close].all()
    if name == "all of it outside":
        assert not out.any() and not winners.any()
    else:
        assert close.mean() < 0.05 and len(np.unique(labels)) > 3


def test_small_pieces_make_the_same(monkeypatch):
    image, codes = volume()
    matrix = with_centre(affine_matrix((0.3, -0.4, 0.2), 0.9), READ, PATCH)
    whole = sample(image, codes, matrix, PATCH)
    monkeypatch.setattr(spatial, "_PIECE_VOXELS", 40)
    monkeypatch.setattr(spatial, "_CODES_A_VOXEL", 2)
    pieces = sample(image, codes, matrix, PATCH)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])


def test_the_box_is_all_that_is_looked_at():
    """What lies outside of the box could be anything."""
    image, codes = volume()
    matrix = with_centre(affine_matrix((0.2, 0, 0), 0.7), READ, PATCH)
    box = needed_box(matrix, PATCH, Box((0, 0, 0), READ))
    assert all(0 < a < b < n for a, b, n in zip(box.start, box.stop, READ, strict=True))
    where = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
    local = matrix.copy()
    local[:, 3] -= box.start
    expected = sample(image, codes, matrix, PATCH)
    found = sample(image[(slice(None), *where)].contiguous(), codes[where].contiguous(), local, PATCH)
    assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.equal(found[1], expected[1])


def test_equal_scores_go_to_the_nearest_voxel_else_the_lowest_label():
    codes = torch.tensor([[[3, 1], [3, 1]], [[3, 1], [3, 1]]], dtype=torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, 2, 0, 2, 0, 2))
    image = torch.zeros((1, *codes.shape))

    def label_at(x, values=codes):
        matrix = np.column_stack([np.diag([1.0, 1.0, 1e-9]), (0.25, 0.25, x)])
        matrix[0, 1] = 1e-9  # so that slices are not kept
        return int(sample(image, values, matrix, (1, 1, 1))[1])

    assert [label_at(x) for x in (0.3, 0.4999, 0.5001, 0.7)] == [3, 3, 1, 1]
    four = torch.zeros((4, 4, 4), dtype=torch.uint8)
    four[0, 0, 0], four[0, 0, 1], four[0, 1, 0], four[0, 1, 1] = 9, 7, 7, 9
    matrix = np.column_stack([np.eye(3), (0.0, 0.5, 0.5)])
    assert int(sample(image, four, matrix, (1, 1, 1))[1]) == 9  # half each: the voxel that .5 rounds to


def test_matrices():
    quarter = affine_matrix((math.pi / 2, 0, 0), 1)
    assert np.allclose(quarter @ (0, 1, 0), (0, 0, 1)) and np.allclose(quarter @ (1, 0, 0), (1, 0, 0))
    assert np.allclose(affine_matrix((0, math.pi / 2, 0), 2) @ (0, 0, 1), (2, 0, 0))
    assert np.allclose(affine_matrix((0, 0, math.pi / 2), 1) @ (1, 0, 0), (0, 1, 0))
    assert np.allclose(in_plane_matrix(math.pi / 2, 2), [[1, 0, 0], [0, 0, -2], [0, 2, 0]])
    centred = with_centre(quarter, READ, PATCH)
    assert np.allclose(centred[:, :3] @ ((np.array(PATCH) - 1) / 2) + centred[:, 3], (np.array(READ) - 1) / 2)


def test_mirroring_on_the_way_equals_mirroring_afterwards():
    image, codes = volume()
    matrix = with_centre(affine_matrix((0.1, 0.2, 0.3), 0.8), READ, PATCH)
    plain, marks = sample(image, codes, matrix, PATCH)
    found, found_marks = sample(image, codes, mirrored(matrix, PATCH, (0, 2)), PATCH)
    assert torch.allclose(found, plain.flip(1, 3), atol=1e-5)
    assert (found_marks != marks.flip(0, 2)).float().mean() < 0.01


def test_codes_fit():
    assert code_type(253) == torch.uint8 and code_type(254) == torch.int16


@pytest.mark.cuda
def test_sampling_on_cuda(cuda_device):
    image, codes = volume()
    for _, matrix in matrices():
        box = needed_box(matrix, PATCH, Box((0, 0, 0), READ))
        local = matrix.copy()
        local[:, 3] -= box.start
        here = boxed(image, codes, box)
        expected = sample(*here, local, PATCH)
        found = sample(*(each.to(cuda_device) for each in here), local, PATCH)
        assert torch.allclose(found[0].cpu(), expected[0], atol=1e-5)
        assert (found[1].cpu() != expected[1]).float().mean() < 0.01
