import numpy as np

from nnssl_adapt.data.class_locations import class_locations


def blobs(shape, labels=5, seed=0):
    """Labels in runs of all lengths, single voxels among them, from -1 on."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 400, np.prod(shape))
    values = random.integers(-1, labels, len(lengths))
    return np.repeat(values, lengths)[: np.prod(shape)].reshape(1, *shape).astype(np.int16)


def drawn(seg, classes):
    """nnU-Net's rule, spelled out."""
    random = np.random.RandomState(1234)
    result = {}
    for entry in classes:
        voxels = np.concatenate(
            [np.argwhere(seg == value) for value in (entry if isinstance(entry, tuple) else (entry,))]
        )
        number = max(min(10_000, len(voxels)), int(np.ceil(len(voxels) * 0.01)))
        result[entry] = voxels[random.choice(len(voxels), number, replace=False)] if len(voxels) else []
    return result


def test_volumes_beyond_the_processors_cache_are_drawn_from_alike() -> None:
    seg = blobs((90, 64, 63))  # more voxels than are looked at together, and no multiple of them
    assert seg.size > 1 << 18

    classes = [1, 2, (1, 3), 4, 9]
    found, expected = class_locations(seg, classes), drawn(seg, classes)

    assert list(found) == classes
    for entry in classes[:-1]:
        np.testing.assert_array_equal(found[entry], expected[entry])
        assert found[entry].dtype == np.int64
    assert found[9] == []


def test_single_voxels_at_the_ends_are_found() -> None:
    seg = np.zeros((1, 2, 3, 4), np.int16)
    seg[0, 0, 0, 0], seg[0, 1, 2, 3] = 1, 2

    found = class_locations(seg, [1, 2])

    assert found[1].tolist() == [[0, 0, 0, 0]]
    assert found[2].tolist() == [[0, 1, 2, 3]]
