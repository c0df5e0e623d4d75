"""Where patches lie, what they hold, and that batches follow from their counters alone."""

import numpy as np
import pytest
import torch

from nnssl_adapt.data.store import CaseStore, PreprocessedCase
from nnssl_adapt.errors import CaseError, ConfigurationError, TrainingError
from nnssl_adapt.training.batches import patches
from nnssl_adapt.training.batches.patches import (
    TRAINING,
    VALIDATION,
    Batches,
    BatchRequest,
    BatchSchedule,
    PatchSampler,
    PhaseData,
    Place,
    explained_worker_death,
    is_forced_foreground,
    iterate_batches,
)
from nnssl_adapt.training.batches.reading import read_box
from nnssl_adapt.training.batches.spatial import Box

SHAPE = (10, 20, 30)
PATCH = (4, 8, 12)


class Noisy:
    """A transform that draws from the sample's seed."""

    def __call__(self, places):
        noise = [torch.rand(1, generator=torch.Generator().manual_seed(place.seed)) for place in places]
        return {"image": torch.stack(noise), "target": torch.zeros(len(places))}


class Keep:
    def __call__(self, places):
        images = torch.empty((len(places), 1, *PATCH))
        codes = torch.empty((len(places), *PATCH), dtype=torch.int16)
        for place, image, marks in zip(places, images, codes, strict=True):
            read_box(place, place.patch_box, image, marks)
        return {"image": images, "target": codes[:, None] - 1}


@pytest.fixture
def store(tmp_path):
    store = CaseStore(tmp_path / "store")
    store.begin({"digest": "d"})
    for number in range(3):
        data = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(1, *SHAPE) + 1
        seg = np.zeros((1, *SHAPE), np.int16)
        seg[0, 2 + number, 5, 7] = 1
        locations = {1: np.argwhere(seg == 1), 2: np.zeros((0, 4), np.int64)}
        store.write(f"case_{number}", PreprocessedCase(data, seg, {"class_locations": locations}), PATCH, digest="d")
    return store


def batches_of(store, transform, batch_size=2, seed=0, **ranks):
    sampler = PatchSampler(PATCH, PATCH)
    phases = {
        TRAINING: PhaseData(("case_0", "case_1"), sampler, transform),
        VALIDATION: PhaseData(("case_2",), sampler, transform),
    }
    return Batches(store.folder, phases, batch_size, 0.33, seed, **ranks)


def test_a_third_of_two_is_one():
    assert [is_forced_foreground(i, 2, 0.33) for i in range(2)] == [False, True]
    assert [is_forced_foreground(i, 5, 0.33) for i in range(5)] == [False, False, False, True, True]
    assert [is_forced_foreground(i, 3, 1.0) for i in range(3)] == [True] * 3
    assert not is_forced_foreground(0, 1, 0.33)


def place_of(case, corner, read_size=PATCH):
    return Place(case, corner, read_size, PATCH, 0)


@pytest.mark.parametrize("flipped", [(), (0, 2), (1,)])
@pytest.mark.parametrize("corner", [(0, 0, 0), (3, 6, 9), (-2, -3, -5), (8, 15, 25), (-1, 13, 20), (20, 0, 0)])
def test_reading_equals_padding_and_cutting(store, corner, flipped):
    case = store.open("case_1")
    place = place_of(case, corner)
    image, codes = torch.full((1, *PATCH), torch.nan), torch.full(PATCH, 77, dtype=torch.uint8)
    read_box(place, place.patch_box, image, codes, flipped)
    margin = 40
    around = ((0, 0), *[(margin, margin)] * 3)
    where = (slice(None), *(slice(margin + c, margin + c + p) for c, p in zip(corner, PATCH, strict=True)))
    pixels, marks = np.pad(case.data[:], around)[where], np.pad(case.seg[:] + 1, around)[where]
    axes = [axis + 1 for axis in flipped]
    assert np.array_equal(image.numpy(), np.flip(pixels, axes))
    assert np.array_equal(codes.numpy()[None], np.flip(marks, axes))


def test_beyond_what_would_be_read_nothing_is_seen(store):
    case = store.open("case_0")
    place = place_of(case, (2, -3, 10), (5, 9, 13))
    assert place.filled == Box((2, 0, 10), (7, 6, 23)) and place.patch_box == Box((2, -3, 10), (6, 5, 22))
    box = Box((0, 0, 0), SHAPE)
    image, codes = torch.empty((1, *SHAPE)), torch.empty(SHAPE, dtype=torch.int16)
    read_box(place, box, image, codes)
    expected = np.zeros((1, *SHAPE), np.float32)
    expected[:, 2:7, 0:6, 10:23] = case.data[:, 2:7, 0:6, 10:23]
    assert np.array_equal(image.numpy(), expected)
    assert set(np.unique(codes.numpy())) <= {0, 1, 2} and (codes.numpy() > 0).sum() == 5 * 6 * 13


def test_labels_below_zero_are_outside(store):
    class Case:
        data = np.ones((1, *SHAPE), np.float32)
        seg = np.full((1, *SHAPE), -1, np.int16)

    Case.seg[0, 0] = 253
    for dtype in (torch.uint8, torch.int16):
        image, codes = torch.empty((1, *SHAPE)), torch.empty(SHAPE, dtype=dtype)
        read_box(Place(Case, (0, 0, 0), SHAPE, SHAPE, 0), Box((0, 0, 0), SHAPE), image, codes)
        assert (codes[0] == 254).all() and (codes[1:] == 0).all()


def test_only_what_a_patch_touches_is_read(store):
    class Recorder:
        shape = (1, *SHAPE)

        def __init__(self, array):
            self.array, self.asked = array, []

        def __getitem__(self, where):
            self.asked.append(where)
            return self.array[where]

    class Case:
        data = Recorder(np.zeros((1, *SHAPE), np.float32))
        seg = Recorder(np.zeros((1, *SHAPE), np.int16))

    place = place_of(Case, (-2, 5, 25))
    read_box(place, place.patch_box, torch.empty((1, *PATCH)), torch.empty(PATCH, dtype=torch.uint8))
    expected = [(slice(None), slice(0, 2), slice(5, 13), slice(25, 30))]
    assert Case.data.asked == Case.seg.asked == expected


def test_forced_patches_hold_the_voxel():
    locations = {1: np.array([[0, 9, 0, 29]]), 2: np.zeros((0, 4), int)}
    sampler = PatchSampler((6, 10, 16), PATCH)
    for seed in range(50):
        corner = sampler.lower_corner(SHAPE, True, lambda: locations, np.random.RandomState(seed))
        assert all(c <= v < c + s for c, v, s in zip(corner, (9, 0, 29), (6, 10, 16), strict=True))


def test_random_patches_reach_every_border_and_need_no_locations():
    def never():
        raise AssertionError("class locations were read")

    sampler = PatchSampler(PATCH, PATCH)
    corners = np.array([sampler.lower_corner(SHAPE, False, never, np.random.RandomState(seed)) for seed in range(2000)])
    assert corners.min(0).tolist() == [0, 0, 0]
    assert corners.max(0).tolist() == [s - p for s, p in zip(SHAPE, PATCH, strict=True)]


def test_images_smaller_than_the_patch_are_covered():
    sampler = PatchSampler((16, 16, 16), (16, 16, 16))
    for seed in range(20):
        corner = sampler.lower_corner((9, 16, 40), False, dict, np.random.RandomState(seed))
        assert corner[0] in (-4, -3) and corner[1] == 0 and 0 <= corner[2] <= 24


def test_without_foreground_the_position_is_random():
    sampler = PatchSampler(PATCH, PATCH)
    corners = {
        sampler.lower_corner(SHAPE, True, lambda: {1: np.zeros((0, 4), int)}, np.random.RandomState(s))
        for s in range(30)
    }
    assert len(corners) > 20


def test_with_an_ignore_label_patches_are_centred_on_what_is_annotated():
    key = (-1, 0, 1)
    locations = {1: np.array([[0, 0, 0, 0]]), key: np.array([[0, 5, 10, 15]])}
    sampler = PatchSampler(PATCH, PATCH, key)
    free = {sampler.lower_corner(SHAPE, False, lambda: locations, np.random.RandomState(s)) for s in range(10)}
    forced = {sampler.lower_corner(SHAPE, True, lambda: locations, np.random.RandomState(s)) for s in range(10)}
    assert free == {(3, 6, 9)} and forced == {(0, 0, 0)}


def test_a_batch_follows_from_its_counters(store):
    request = BatchRequest(TRAINING, 3, 7)
    first = batches_of(store, Noisy())[request]
    np.random.seed(99)
    torch.manual_seed(99)
    again = batches_of(store, Noisy())
    _ = again[BatchRequest(VALIDATION, 0, 0)]
    second = again[request]
    assert torch.equal(first["image"], second["image"]) and first["cases"] == second["cases"]
    other = again[BatchRequest(TRAINING, 3, 8)]
    assert not torch.equal(first["image"], other["image"])
    assert not torch.equal(first["image"], batches_of(store, Noisy(), seed=1)[request]["image"])


def test_batches_have_the_shapes_the_network_wants_and_forced_foreground(store):
    batches = batches_of(store, Keep())
    for iteration in range(10):
        batch = batches[BatchRequest(TRAINING, 0, iteration)]
        assert batch["image"].shape == (2, 1, *PATCH) and batch["target"].shape == (2, 1, *PATCH)
        assert (batch["target"][1] == 1).any()
        assert set(batch["cases"]) <= {"case_0", "case_1"}
    assert batches[BatchRequest(VALIDATION, 0, 0)]["cases"] == ["case_2", "case_2"]


def test_ranks_make_the_batch_of_one_process(store):
    request = BatchRequest(TRAINING, 2, 5)
    whole = batches_of(store, Keep(), batch_size=5)[request]
    for size in (2, 3, 5):
        parts = [batches_of(store, Keep(), batch_size=5, rank=rank, size=size)[request] for rank in range(size)]
        assert torch.equal(torch.cat([part["image"] for part in parts]), whole["image"])
        assert torch.equal(torch.cat([part["target"] for part in parts]), whole["target"])
        assert [case for part in parts for case in part["cases"]] == whole["cases"]
    with pytest.raises(ConfigurationError, match="a batch of 5 can't be shared by 6"):
        batches_of(store, Keep(), batch_size=5, rank=0, size=6)


def test_making_batches_leaves_the_global_generators_alone(store):
    np.random.seed(5)
    torch.manual_seed(5)
    expected = np.random.uniform(), torch.rand(1)
    np.random.seed(5)
    torch.manual_seed(5)
    _ = batches_of(store, Keep())[BatchRequest(TRAINING, 0, 0)]
    assert (np.random.uniform(), torch.rand(1)) == expected


def test_a_schedule_can_start_in_the_middle():
    whole = list(BatchSchedule(2, 3, 2))
    assert len(whole) == len(BatchSchedule(2, 3, 2)) == 10
    assert [r.phase for r in whole[:5]] == [TRAINING] * 3 + [VALIDATION] * 2
    later = BatchSchedule(2, 3, 2, first_epoch=0, first_iteration=2)
    assert list(later) == whole[2:] and len(later) == 8
    assert list(BatchSchedule(2, 3, 2, first_epoch=1, first_iteration=3)) == whole[8:]


def test_workers_make_the_same_batches_and_hand_errors_over(store):
    batches = batches_of(store, Noisy())
    schedule = BatchSchedule(1, 2, 1)
    here = [b["image"] for b in iterate_batches(batches, schedule, workers=0)]
    store.remove("case_2")
    made = iterate_batches(batches, schedule, workers=1)
    assert torch.equal(next(made)["image"], here[0]) and torch.equal(next(made)["image"], here[1])
    with pytest.raises(CaseError, match="^.*has no whole case 'case_2'"):
        next(made)


def test_a_dead_worker_is_explained(monkeypatch):
    monkeypatch.setattr(patches, "memory_kills", lambda: 3)
    monkeypatch.setattr(patches, "why_a_worker_died", lambda message, kills: f"because of {kills}")
    with (
        pytest.raises(TrainingError, match=r"worker died.*because of 3.*--c"),
        explained_worker_death(),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")
    with pytest.raises(RuntimeError, match="something else"), explained_worker_death():
        raise RuntimeError("something else")
