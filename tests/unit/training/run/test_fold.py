"""Which cases a fold trains on and validates on, where another splits file is given."""

import json

import pytest
from support.training_runs import trainer_of

from nnssl_adapt.errors import DatasetError


def test_another_splits_file_is_used_instead_of_the_datasets(plan, recipe, tmp_path):
    usual = trainer_of(plan, recipe)
    names = sorted({*usual.training_cases, *usual.validation_cases})
    path = tmp_path / "few.json"
    path.write_text(json.dumps([{"train": names[:1], "val": names[1:2]}]))
    before = (plan.dataset_folder / "splits_final.json").read_bytes()
    chosen = trainer_of(plan, recipe, splits_file=path, results_folder=tmp_path / "results")
    assert (chosen.training_cases, chosen.validation_cases) == (names[:1], names[1:2])
    assert (plan.dataset_folder / "splits_final.json").read_bytes() == before
    path.write_text(json.dumps([{"train": ["nobody"], "val": names[:1]}]))
    with pytest.raises(DatasetError, match="nobody"):
        trainer_of(plan, recipe, splits_file=path)
