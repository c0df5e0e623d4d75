"""The graph of a cascade: its first stage is trained before it, on all folds."""

from pathlib import Path

import pytest
from support.model_folders import plans_content

from nnssl_adapt.cluster.finetuning import BEST, SHARDS, Finetuning
from nnssl_adapt.cluster.graph import Resources
from nnssl_adapt.planning.plan import CASCADE, CONFIGURATION, LOW_RESOLUTION, FinetunePlan


@pytest.fixture
def finetuning(tmp_path, monkeypatch):
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    content = plans_content()
    full = content["configurations"][CONFIGURATION]
    content["configurations"][LOW_RESOLUTION] = {**full, "data_identifier": "low", "next_stage": CASCADE}
    content["configurations"][CASCADE] = {"inherits_from": CONFIGURATION, "previous_stage": LOW_RESOLUTION}
    plan = FinetunePlan(content, CASCADE)
    model = tmp_path / "results" / plan.dataset_name / f"Tiny__{plan.plans_name}__{CASCADE}"
    return Finetuning(plan, "weights.pth", "mae", model, "Tiny", model / "recipe.yaml", configurations=(CASCADE,))


def test_low_resolution_before_the_cascade(finetuning):
    graph = finetuning.graph([0], 1, Resources(), all_folds=range(3))
    low, cascade = f"train-{LOW_RESOLUTION}", f"train-{CASCADE}"
    assert [group for group in graph.groups if group.startswith("train")] == [low, cascade]
    assert [step.name for step in graph.of_group(low)] == [f"{LOW_RESOLUTION}_fold_{fold}" for fold in range(3)]
    (second,) = graph.of_group(cascade)
    assert second.after == (SHARDS, low)
    assert {path.parents[2].name.rpartition("__")[2] for path in second.inputs} == {LOW_RESOLUTION}
    assert len(second.inputs) == 3
    (best,) = graph.of_group(BEST)
    at = best.command.index("-c")
    assert best.command[at + 1 : at + 3] == (LOW_RESOLUTION, CASCADE) and best.after == (low, cascade)
    assert all(Path(path).is_relative_to(finetuning.model) for path in best.outputs)
    words = graph.of_group(SHARDS)[0].command
    assert "preprocess" in words


def test_one_configuration_is_as_ever(finetuning):
    alone = Finetuning(
        finetuning.plan.seen_through(LOW_RESOLUTION), "w", "mae", finetuning.model, "Tiny", finetuning.recipe
    )
    graph = alone.graph([0, 1], 1, Resources())
    assert [step.name for step in graph.of_group("train")] == ["fold_0", "fold_1"]
