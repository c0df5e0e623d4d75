"""What a run is made of, compared with what a checkpoint says it was made of."""

import pytest
from support.tiny_plans import CNN, identity_of

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.comparison import check_resumable, checked_acceptance

WEIGHTS = {"source": "mae", "sha256": "a" * 64}


def checkpoint_of(run, epoch=1):
    ours = {"recipe": run.recipe.to_dict(), "network": run.network, "identity": run.to_dict(), "resumable": True}
    return {"init_args": {"fold": run.fold}, "current_epoch": epoch, "nnssl_adapt": ours}


def refused(then, now, path, accepted=()):
    with pytest.raises(ConfigurationError) as error:
        check_resumable(path, checkpoint_of(then), now, accepted)
    return error.value


def test_the_same_run_goes_on(tmp_path):
    run = identity_of(CNN, Recipe(), stored={"a": "1", "b": "2", "c": "3"}, weights=WEIGHTS)
    check_resumable(tmp_path, checkpoint_of(run), run)
    unnamed = identity_of(CNN, Recipe(), stored=run.stored)  # the command needn't name the weights again
    check_resumable(tmp_path, checkpoint_of(run), unnamed)


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"labels": {"background": 0, "liver": 2, "lesion": 1}}, "labels: "),
        ({"labels": {"background": 0, "leber": 1, "lesion": 2}}, "labels: "),
        ({"channels": ("T2",)}, 'channels: ["T1"] then, ["T2"] now'),
        ({"weights": {"source": "other", "sha256": "b" * 64}}, "starting weights: mae (SHA-256 aaaaaaaaaaaa…) then"),
    ],
    ids=["label values", "label names", "channels", "weights"],
)
def test_what_makes_another_model(changes, mistake, tmp_path):
    then = identity_of(CNN, Recipe(), **{"weights": WEIGHTS})
    error = refused(then, identity_of(CNN, Recipe(), **{"weights": WEIGHTS, **changes}), tmp_path, ["splits", "data"])
    (found,) = error.mistakes
    assert found.startswith(mistake)


def test_cases_that_were_preprocessed_again_can_be_accepted(tmp_path, caplog):
    then, now = (identity_of(CNN, Recipe(), stored={"a": "1", "b": digest}) for digest in ("2", "3"))
    error = refused(then, now, tmp_path)
    assert "b" in error.mistakes[0] and "--accept-changed data" in str(error)
    check_resumable(tmp_path, checkpoint_of(then), now, ["data"])
    assert "accepted as changed" in caplog.text


def test_a_cascade_goes_on_with_the_same_labels_of_its_first_stage(tmp_path):
    then, now = (identity_of(CNN, Recipe(), previous={"a": "w0", "b": digest}) for digest in ("w1", "w2"))
    check_resumable(tmp_path, checkpoint_of(then), then)
    (mistake,) = refused(then, now, tmp_path).mistakes
    assert "previous stage" in mistake and " b:" in mistake and " a" not in mistake.partition(":")[0]
    check_resumable(tmp_path, checkpoint_of(then), now, ["data"])
    older = checkpoint_of(then)
    del older["nnssl_adapt"]["identity"]["previous_stage"]  # of a version that didn't note it
    check_resumable(tmp_path, older, now)


def test_many_cases_are_told_by_what_came_and_went(tmp_path):
    many = tuple(f"case{n:03d}" for n in range(40))
    then, now = (identity_of(CNN, Recipe(), cases=(cases, ("v",))) for cases in (many, (*many[1:], "new")))
    (mistake,) = refused(then, now, tmp_path).mistakes
    assert mistake == "training cases: 40 then, 40 now; new: new; gone: case000"


def test_only_cases_and_voxels_can_be_accepted():
    assert checked_acceptance(["data", "splits"]) == {"data", "splits"}
    with pytest.raises(ConfigurationError, match="labels"):
        checked_acceptance(["labels", "splits"])
