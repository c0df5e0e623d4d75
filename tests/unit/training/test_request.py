"""What a training is asked to do survives the way into another process."""

import dataclasses

from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.request import TrainingRequest
from nnssl_adapt.training.run.deadline import Deadline


def test_a_request_is_the_same_after_the_way_through_a_file(tmp_path):
    request = TrainingRequest(
        dataset="Dataset541_X",
        plans="P",
        configuration="3d_fullres",
        fold="all",
        recipe=Recipe(epochs=77, patch_size=(32, 48, 64), mirror_axes=(), ema_decay=0.5),
        device="cpu",
        source="weights",
        source_options={"revision": "v1", "local_files_only": True},
        workers=3,
        trackers=("wandb",),
        resume="auto",
        save_probabilities=True,
        results=str(tmp_path),
        splits="splits.json",
        deadline=Deadline(1234.5, "the time limit of 2"),
        accept_changed=("splits",),
        stage="/scratch",
    )
    path = tmp_path / "request.json"
    request.save(path)
    assert TrainingRequest.load(path) == request
    plain = {f.name for f in dataclasses.fields(request) if getattr(request, f.name) == f.default}
    assert plain == {"validate_only", "checkpoint_for_validation", "disable_checkpointing"}  # all others were told
