"""Which fold finetune trains, and that one the dataset does not have is refused before anything is read or written."""

import json
from types import SimpleNamespace

import pytest
from support.synthetic import make_dataset

from nnssl_adapt.cli.finetune import _first_stages, _fold
from nnssl_adapt.cli.main import main
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.request import TrainingRequest


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def dataset(folders, number, cases):
    make_dataset(folders / "raw", f"Dataset{number}_Few", cases=cases)
    return RawDataset.open(number)


def test_one_case_is_trained_as_fold_all(folders):
    one = dataset(folders, 901, 1)
    assert _fold(None, one) == _fold("all", one) == "all"
    with pytest.raises(ConfigurationError, match="all"):
        _fold("0", one)


def test_the_folds_are_those_of_the_splits(folders):
    few = dataset(folders, 902, 3)
    assert _fold(None, few) == 0 and _fold("2", few) == 2
    with pytest.raises(ConfigurationError, match="0 to 2"):
        _fold("3", few)
    names = [case.identifier for case in few.cases]
    (few.folder / "splits_final.json").write_text(json.dumps([{"train": names[:2], "val": names[2:]}]))
    with pytest.raises(ConfigurationError, match="-f 2"):
        _fold("2", few)


def test_a_fold_that_is_not_there_is_refused_before_weights_and_device(folders, capsys):
    dataset(folders, 902, 3)
    assert main(["finetune", "-d", "902", "-pc", "no/such/weights", "-f", "9", "-device", "cuda"]) == 1
    assert "-f 9" in capsys.readouterr().err
    assert not any((folders / "preprocessed").iterdir())


def test_a_plan_without_the_configuration_is_told_before_the_device(folders, capsys):
    dataset(folders, 902, 3)
    assert main(["train", "-d", "902", "-c", "2d", "-f", "0", "-p", "nnUNetPlans", "-device", "cuda"]) == 1
    assert "nnUNetPlans" in capsys.readouterr().err


def test_before_a_cascade_its_first_stage_is_trained_on_all_folds(folders):
    few = dataset(folders, 902, 3)
    request = TrainingRequest(
        few.name, "plans", "3d_cascade_fullres", 1, Recipe(), "cpu", source="weights", resume=False
    )
    plan = SimpleNamespace(previous_stage="3d_lowres", dataset_folder=folders / "preprocessed" / few.name)
    firsts = _first_stages(request, plan, few)
    assert [(one.configuration, one.fold, one.resume) for one in firsts] == [("3d_lowres", n, "auto") for n in range(3)]
    assert all(one.source == "weights" for one in firsts)
    assert _first_stages(request, SimpleNamespace(previous_stage=None), few) == []
