"""Graphs of runs: what is done, what is missing, and how a round is judged."""

import json
import os

import pytest

from nnssl_adapt.cluster.graph import Graph, Resources, Step
from nnssl_adapt.cluster.rounds import Rounds, Verdict, begin_rounds, end_round
from nnssl_adapt.errors import ConfigurationError


def step(folder, name, group=None, after=(), inputs=(), **options):
    return Step(
        name,
        group or name,
        ("do", name),
        (folder / f"{name}.txt",),
        tuple(folder / i for i in inputs),
        after,
        **options,
    )


@pytest.fixture
def graph(tmp_path):
    steps = (
        step(tmp_path, "first"),
        step(tmp_path, "a_0", "a", ("first",)),
        step(tmp_path, "a_1", "a", ("first",)),
        step(tmp_path, "last", after=("a",), inputs=("a_0.txt", "a_1.txt")),
    )
    return Graph("test", steps, {"a": Resources(gpus="a100:2", mem="48G")}, {"a": 1})


def finish(graph, *names, at=None):
    for name in names:
        (path,) = graph.step(name).outputs
        path.write_text(name)
        if at is not None:
            os.utime(path, (at, at))


def names(steps):
    return [one.name for one in steps]


def test_what_is_missing_is_judged_by_files(graph):
    assert names(graph.missing()) == ["first", "a_0", "a_1", "last"]
    finish(graph, "first", "a_1")
    assert names(graph.missing()) == ["a_0", "last"]
    finish(graph, "a_0", "last")
    assert graph.missing() == ()


def test_what_reads_a_file_that_is_made_anew_is_missing(graph):
    finish(graph, "first", "a_0", "a_1", "last", at=1000)
    finish(graph, "a_1", at=2000)
    assert names(graph.missing()) == ["last"]
    finish(graph, "last", at=2000)
    assert graph.missing() == ()
    graph.step("a_0").outputs[0].unlink()  # it will be made anew
    assert names(graph.missing()) == ["a_0", "last"]


def test_a_graph_survives_json(graph):
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    assert graph.groups == ("first", "a", "last") and graph.after("last") == ("a",)


def test_wrong_graphs(tmp_path):
    one = step(tmp_path, "one")
    with pytest.raises(ConfigurationError, match="same name: one"):
        Graph("test", (one, one))
    with pytest.raises(ConfigurationError, match="step two waits for three"):
        Graph("test", (one, step(tmp_path, "two", after=("three",))))
    with pytest.raises(ConfigurationError, match="waits for one"):
        Graph("test", (step(tmp_path, "one", after=("one",)),))
    with pytest.raises(ConfigurationError, match="no step 'four'; there are: one"):
        Graph("test", (one,)).step("four")


@pytest.mark.parametrize(("gpus", "number"), [("2", 2), ("a100:4", 4), ("0", 0)])
def test_gpus(gpus, number):
    assert Resources(gpus=gpus).num_gpus == number


def test_wrong_gpus():
    with pytest.raises(ConfigurationError, match="--gpus a100: expected a number"):
        _ = Resources(gpus="a100").num_gpus


# -- rounds ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A step whose progress is a file's content, begun."""
    one = step(tmp_path, "fold_0", watch=(tmp_path / "stopped.json",))
    begin_rounds(tmp_path, one)
    return one


def test_a_step_is_done_when_its_files_say_so(tmp_path, run):
    run.outputs[0].touch()
    for code in (0, 1, 75, 137):  # whatever its process said
        assert end_round(tmp_path, run, code)[0] is Verdict.DONE


@pytest.mark.parametrize("code", [75, 143, 138, 140, 129, 0])
def test_an_interrupted_step_goes_on_as_long_as_it_gets_ahead(tmp_path, run, code):
    for progress in range(5):
        (tmp_path / "stopped.json").write_text(str(progress))
        assert end_round(tmp_path, run, code)[0] is Verdict.AGAIN
    assert end_round(tmp_path, run, code)[0] is Verdict.AGAIN
    verdict, reason = end_round(tmp_path, run, code)
    assert verdict is Verdict.FAILED and "nothing new in 2 rounds" in reason
    assert Rounds.load(tmp_path, "fold_0").failure == reason
    begin_rounds(tmp_path, run)  # submitted again
    assert Rounds.load(tmp_path, "fold_0").failure == ""


def test_rounds_that_ended_for_another_job_do_not_count(tmp_path, run):
    for _ in range(5):
        assert end_round(tmp_path, run, 75, counts=False)[0] is Verdict.AGAIN


@pytest.mark.parametrize(("code", "said"), [(1, "exit code 1"), (137, "too little memory")])
def test_a_step_that_failed_is_not_started_again(tmp_path, run, code, said):
    verdict, reason = end_round(tmp_path, run, code)
    assert verdict is Verdict.FAILED and said in reason
    assert Rounds.load(tmp_path, "fold_0").failure == reason


def test_a_damaged_record_is_a_new_one(tmp_path, run):
    (tmp_path / "rounds" / "fold_0.json").write_text("{")
    assert Rounds.load(tmp_path, "fold_0") == Rounds()
