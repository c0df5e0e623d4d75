"""Smaller training sets: nested, by subject, the same every time."""

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.studies.subsets import nested_subsets, write_subsets

CASES = [f"sub-{subject}_ses-{session}" for subject in range(7) for session in range(1 + subject % 3)]
SPLITS = [{"train": CASES[:10], "val": CASES[10:]}, {"train": CASES[3:], "val": CASES[:3]}]


def owner(case):
    return case.split("_")[0]


def test_smaller_subsets_are_parts_of_larger_ones_and_subjects_stay_together():
    found = nested_subsets(SPLITS, (0.1, 0.3, 0.6, 1.0), owner)
    for fold, split in enumerate(SPLITS):
        parts = [set(found[fraction][fold]["train"]) for fraction in (0.1, 0.3, 0.6, 1.0)]
        assert parts[0] <= parts[1] < parts[2] < parts[3] == set(split["train"])
        for fraction, part in zip((0.1, 0.3, 0.6), parts, strict=False):
            assert len(part) <= max(fraction * len(split["train"]), max(map(len, subjects_of(split).values())))
            for cases in subjects_of(split).values():
                assert cases <= part or not cases & part
        assert all(found[fraction][fold]["val"] == split["val"] for fraction in found)


def subjects_of(split):
    subjects = {}
    for case in split["train"]:
        subjects.setdefault(owner(case), set()).add(case)
    return subjects


def test_cases_without_a_subject_are_subjects_of_their_own():
    split = [{"train": list("abcdefgh"), "val": ["z"]}]
    found = nested_subsets(split, (0.25, 0.5), lambda _: None)
    assert len(found[0.25][0]["train"]) == 2 and len(found[0.5][0]["train"]) == 4


def test_what_was_drawn_is_kept_and_other_splits_are_refused(tmp_path):
    paths = write_subsets(tmp_path, SPLITS, (0.3,), owner)
    before = paths[0.3].read_bytes()
    assert write_subsets(tmp_path, SPLITS, (0.3, 0.6), owner)[0.3].read_bytes() == before
    with pytest.raises(ConfigurationError) as caught:
        write_subsets(tmp_path, [SPLITS[1], SPLITS[0]], (0.3,), owner)
    assert caught.value.path == paths[0.3]
