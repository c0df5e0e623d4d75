"""Studies of configurations: what is planned for them, and a cascade's first stage before it."""

import json

import pytest
from support.synthetic import make_dataset

from nnssl_adapt.cluster.graph import Resources
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.plan import CASCADE, LOW_RESOLUTION, PLANAR
from nnssl_adapt.studies.graph import ANSWER, study_graph
from nnssl_adapt.studies.study import Study

ARMS = {
    "full": {"weights": "owner/mae"},
    "low": {"weights": "owner/mae", "configuration": LOW_RESOLUTION},
    "cascade": {"weights": "owner/mae", "configuration": CASCADE},
}
SPLITS = [  # what fold 0 sees is validated by the folds 0 and 1 only
    {"train": ["case_02"], "val": ["case_00"]},
    {"train": ["case_00", "case_03"], "val": ["case_02"]},
    {"train": ["case_00", "case_02"], "val": ["case_01", "case_03"]},
]


@pytest.fixture
def dataset(nnunet_folders):
    raw = make_dataset(nnunet_folders / "nnUNet_raw", "Dataset990_Study", cases=4, shape=(8, 9, 10))
    (raw / "splits_final.json").write_text(json.dumps(SPLITS))


def graph_of(study):
    page = study.folder / "study.html"
    return study_graph("s", study.preparations, study.trainings, ("study",), page, Resources())


def test_the_first_stage_is_trained_before_the_cascade_on_the_folds_that_it_needs(dataset):
    study = Study.load({"dataset": 990, "arms": {"full": ARMS["full"], "cascade": ARMS["cascade"]}})
    assert [(one.configuration, one.fold) for one in study.first_stages] == [(LOW_RESOLUTION, 0), (LOW_RESOLUTION, 1)]
    (cascade,) = (run for run in study.runs if run.configuration == CASCADE)
    assert {one.results for one in study.first_stages} == {cascade.results}  # where the cascade looks for it
    graph = graph_of(study)
    step = graph.step(cascade.key)
    assert set(step.inputs) == {one.summary for one in study.first_stages}
    before = [graph.step(one.key) for one in study.first_stages]
    assert {one.group for one in before} <= set(step.after) and step.group not in {one.group for one in before}
    assert step.command[step.command.index("-c") + 1] == CASCADE
    assert graph.resources[step.group] == Resources() and step.group in graph.step(ANSWER).after
    assert all(one.summary not in graph.step(ANSWER).inputs for one in study.first_stages)
    plans = [preparation.words for preparation in study.preparations]
    assert "-c" not in plans[0] and plans[1][plans[1].index("-c") + 1 :][:2] == (LOW_RESOLUTION, CASCADE)


def test_an_arm_that_is_the_first_stage_is_not_trained_twice(dataset):
    study = Study.load({"dataset": 990, "arms": ARMS})
    low, cascade = study.runs[1:]
    assert low.results == cascade.results and low.plans_name == cascade.plans_name
    assert [one.fold for one in study.first_stages] == [1]
    assert low.summary in graph_of(study).step(cascade.key).inputs
    assert len({one.fold_folder for one in study.trainings}) == len(study.trainings) == 4


def test_one_configuration_for_all_arms(dataset):
    arms = {"one": {"weights": "owner/planar"}, "other": {"weights": "scratch"}}
    study = Study.load({"dataset": 990, "arms": arms}, configuration=PLANAR)
    assert [run.configuration for run in study.runs] == [PLANAR, PLANAR] and not study.first_stages
    assert all(run.fold_folder.parent.name.endswith(f"__{PLANAR}") for run in study.runs)
    assert len(study.preparations) == 1  # the network of the only weights


def test_slices_can_be_trained_without_any_weights(dataset):
    arms = {name: {"weights": "scratch", "set": {"learning_rate": rate}} for name, rate in (("a", 0.1), ("b", 0.01))}
    with pytest.raises(ConfigurationError, match="network"):
        Study.load({"dataset": 990, "arms": arms})
    study = Study.load({"dataset": 990, "configuration": PLANAR, "arms": arms})
    assert "-pc" not in study.preparations[0].words


def test_an_unknown_configuration_is_named(dataset):
    with pytest.raises(ConfigurationError) as caught:
        Study.load({"dataset": 990, "arms": ARMS, "configuration": "3d_medres"})
    assert all(word in str(caught.value) for word in ("3d_medres", "full", CASCADE))
