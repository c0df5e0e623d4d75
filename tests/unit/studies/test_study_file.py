"""study.yaml: what is read, and every mistake told before anything starts."""

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.studies.study_file import read_study_file, study_from
from nnssl_adapt.training.recipe.recipe import configs_folder

GOOD = {
    "name": "question",
    "dataset": 41,
    "folds": [0, 2],
    "seeds": [3, 4],
    "fractions": [1.0, 0.25],
    "metrics": ["dice", "NSD", "lesionf1"],
    "tolerance": 2,
    "lesions": {"overlap": 0.3},
    "reference": "scratch",
    "recipe": "short",
    "set": {"epochs": 80, "warmup_epochs": 10},
    "arms": {
        "mae": {"weights": "owner/mae", "spacing": "fixed", "spacing_mm": [2, 1, 1.5], "set": {"epochs": 60}},
        "scratch": {"weights": "scratch"},
        "other": {"weights": "scratch", "trainer": "PretrainedTrainer_150ep", "set": {"warmup_epochs": "1"}},
    },
}


def test_what_a_file_says_is_what_is_compared():
    study = study_from(GOOD)
    assert study.fractions == (0.25, 1.0) and study.metrics == ("Dice", "NSD", "LesionF1")
    assert study.judging.tolerance == 2 and study.judging.lesions.overlap == 0.3
    mae, scratch, other = study.arms
    assert mae.spacing == (2, 1, 1.5) and mae.resolved_recipe().epochs == 60
    assert scratch.from_scratch and scratch.network == "owner/mae" and scratch.resolved_recipe().epochs == 80
    assert other.recipe is None and other.resolved_recipe().warmup_epochs == 1
    assert study_from(GOOD, dataset="Dataset007_X").dataset == "Dataset007_X"


def arms(**changes):
    return {"arms": {**GOOD["arms"], **changes}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"one": {"weights": "a"}}}, "at least two"),
        (arms(copy={"weights": "scratch"}), "scratch and copy differ in nothing"),
        (arms(b={"weights": "owner/b"}, c={"weights": "scratch", "recipe": "default"}), "whose network"),
        (arms(b={"spacing": "median"}), "'weights' is missing"),
        (arms(b={"weights": "x", "set": {"epoch": 3}}), "did you mean 'epochs'"),
        (arms(b={"weights": "x", "set": {"seed": 3}}), "seed can't be set"),
        (arms(b={"weights": "x", "spacing": "fixed", "spacing_mm": None}), "needs a spacing"),
        (arms(b={"weights": "x", "recipe": "short", "trainer": "PretrainedTrainer"}), "not both"),
        (arms(b={"weights": "x", "recipe": "nothing"}), "no recipe 'nothing'"),
        ({"reference": "nobody"}, "'nobody' is no arm"),
        ({"fractions": [0.5, 0]}, "above 0"),
        ({"fractions": [0.5, 0.5]}, "stands twice"),
        ({"folds": [-1]}, "folds"),
        ({"metrics": ["Dise"]}, "no Dise"),
        ({"lesions": {"connectivity": 7}}, "connectivity"),
        ({"subject": "("}, "regular expression"),
        ({"seed": [1]}, "did you mean 'seeds'"),
        ({"name": "a/b"}, "name 'a/b'"),
    ],
)
def test_a_mistake_is_told(change, words):
    with pytest.raises(ConfigurationError) as caught:
        study_from({**GOOD, **change})
    assert any(words in mistake for mistake in caught.value.mistakes), caught.value.mistakes


def test_all_mistakes_are_told_together(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("folds: [x]\nmetrics: [Dise]\narms: {a: {weights: scratch}, b: {weights: scratch}}\n")
    with pytest.raises(ConfigurationError) as caught:
        read_study_file(path)
    assert len(caught.value.mistakes) >= 4 and caught.value.path == path


@pytest.mark.parametrize("text", ["- a", "a: [", "\x00"])
def test_what_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="study.yaml"):
        read_study_file(path)


@pytest.mark.parametrize("path", sorted((configs_folder() / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_with_the_package_are_read(path):
    assert len(read_study_file(path.stem).arms) >= 2
