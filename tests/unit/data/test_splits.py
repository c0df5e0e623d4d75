from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnssl_adapt.data.splits import crossval_splits, load_or_make_splits, split_for_fold
from nnssl_adapt.errors import ConfigurationError, DatasetError

CASES = [f"case_{n:02d}" for n in range(12)]


def test_every_case_is_validated_once() -> None:
    splits = crossval_splits(CASES)
    assert [len(split["val"]) for split in splits] == [3, 3, 2, 2, 2]
    assert sorted(name for split in splits for name in split["val"]) == CASES
    for split in splits:
        assert sorted(split["train"] + split["val"]) == CASES


@pytest.mark.parametrize("count, folds, seed", [(5, 5, 12345), (12, 5, 12345), (23, 5, 12345), (7, 3, 1)])
def test_equal_to_scikit_learn(count: int, folds: int, seed: int) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    names = [f"n{i}" for i in range(count)]
    expected = [
        {"train": [names[i] for i in train], "val": [names[i] for i in val]}
        for train, val in selection.KFold(n_splits=folds, shuffle=True, random_state=seed).split(names)
    ]
    assert crossval_splits(names, seed=seed, folds=folds) == expected


def test_too_few_cases() -> None:
    with pytest.raises(DatasetError, match="3 cases can't be split into 5 folds"):
        crossval_splits(CASES[:3])


def test_made_once_and_then_kept(tmp_path: Path) -> None:
    first = load_or_make_splits(tmp_path, CASES[::-1])
    assert first == crossval_splits(CASES)
    assert json.loads((tmp_path / "splits_final.json").read_text()) == first
    own = [{"train": CASES[:6], "val": CASES[6:]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(own))
    assert load_or_make_splits(tmp_path, CASES) == own


def test_few_cases_get_fewer_folds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = load_or_make_splits(tmp_path / "three", CASES[:3])
    assert [len(split["val"]) for split in splits] == [1, 1, 1]
    assert "making 3 folds" in caplog.text
    assert load_or_make_splits(tmp_path / "one", CASES[:1]) == []
    assert "only fold 'all'" in caplog.text


def test_the_raw_datasets_own_splits_are_honoured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw, folder = tmp_path / "raw", tmp_path / "preprocessed"
    raw.mkdir()
    own = [{"train": CASES[:8], "val": CASES[8:]}, {"train": CASES[4:], "val": CASES[:4]}]
    (raw / "splits_final.json").write_text(json.dumps(own))
    assert load_or_make_splits(folder, CASES, raw) == own
    assert json.loads((folder / "splits_final.json").read_text()) == own
    (raw / "splits_final.json").write_text(json.dumps(own[:1]))
    assert load_or_make_splits(folder, CASES, raw) == own
    assert "differs" in caplog.text


def test_unknown_cases_are_an_error_and_forgotten_ones_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": CASES[:8], "val": ["stranger"]}]))
    with pytest.raises(DatasetError, match=r"splits_final\.json: fold 0 'val' names stranger"):
        load_or_make_splits(tmp_path, CASES)
    path.write_text(json.dumps([{"train": CASES[:8], "val": [*CASES[7:11]]}]))
    load_or_make_splits(tmp_path, CASES)
    assert "in no fold: case_11" in caplog.text
    assert "trains on validation cases: case_07" in caplog.text


@pytest.mark.parametrize("text", ["{", "{}", '[{"train": ["a"]}]', '[{"train": [1], "val": []}]'])
def test_a_file_that_is_no_splits_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(DatasetError, match=r"splits_final\.json"):
        load_or_make_splits(tmp_path, CASES)


def test_split_for_fold() -> None:
    splits = crossval_splits(CASES)
    assert split_for_fold(splits, 2, CASES) == (splits[2]["train"], splits[2]["val"])
    assert split_for_fold(splits, "2", CASES) == (splits[2]["train"], splits[2]["val"])
    assert split_for_fold(splits, "all", CASES) == (CASES, CASES)
    for fold in (-1, "first", 5, "9"):
        with pytest.raises(ConfigurationError, match="0 to 4, and all") as caught:
            split_for_fold(splits, fold, CASES, Path("x") / "splits_final.json")
        assert caught.value.path == Path("x") / "splits_final.json" and str(fold) in str(caught.value)
    with pytest.raises(ConfigurationError, match="all only"):
        split_for_fold([], 0, CASES[:1])
