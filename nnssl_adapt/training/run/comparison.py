"""Whether a run that goes on, or is validated, is still the run that its checkpoint is of."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.text import and_more, read_json
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.identity import RunIdentity, described_dataset

logger = logging.getLogger(__name__)

SPLITS, DATA = "splits", "data"
ACCEPTABLE = (SPLITS, DATA)
"""What may be accepted as changed (``--accept-changed``): other cases, and cases that were preprocessed again."""

_FIXED = ("optimizer", "lora_rank", "lora_alpha", "from_scratch")
"""Fields of the recipe that a checkpoint's content depends on."""

_SAFE_TO_CHANGE = ("name", "trainer_name", "checkpoint_every", "checkpoint_minutes", "non_finite_limit")

_SETTINGS = {
    "version": "version of the preprocessing",
    "spacing": "spacing (mm)",
    "transpose_forward": "order of the axes",
    "normalization_schemes": "normalisation",
    "use_mask_for_norm": "normalisation within the nonzero region",
    "intensity_properties": "intensity statistics",
    "resampling_data": "resampling of images",
    "resampling_seg": "resampling of labels",
}


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the checkpoint was written.

    Attributes:
        about: ``splits``, ``data``, ``preprocessing``, ``labels``, ``channels``, ``weights``, ``network`` or ``recipe``.
        text: both values, in words.
    """

    about: str
    text: str


def checked_acceptance(abouts: Collection[str]) -> frozenset[str]:
    """What may have changed. Raises ConfigurationError for something that can't be accepted."""
    if unknown := sorted(set(abouts) - set(ACCEPTABLE)):
        raise ConfigurationError(
            f"--accept-changed {' '.join(unknown)}: expected some of {', '.join(ACCEPTABLE)}; anything else makes another model"
        )
    return frozenset(abouts)


def check_resumable(
    path: Path, content: Mapping[str, Any], run: RunIdentity, accepted: Collection[str] = (), finished: bool = False
) -> None:
    """Raise ConfigurationError, with all reasons, when going on from a checkpoint would make another model.

    Other changes of the recipe (learning rate, seed, …) are allowed, and logged.

    Args:
        path: of the checkpoint.
        content: of the checkpoint.
        run: what is to go on.
        accepted: some of :data:`ACCEPTABLE`, which are warned of instead.
        finished: whether it is the checkpoint of a finished run that gets more epochs, which has no optimiser state.
    """
    ours = content["nnssl_adapt"]
    # Recipe()'s are the fields that the version which wrote it had not yet.
    old, new = {**Recipe().to_dict(), **ours["recipe"]}, run.recipe.to_dict()
    changes = list(_changes(recorded_identity(path, content, run), run))
    if ours["network"] != run.network:
        changes.append(Change("network", _network_words(ours["network"], run.network)))
    if content["init_args"]["fold"] != run.fold:
        changes.append(Change("fold", f"fold {content['init_args']['fold']} then, {run.fold} now"))
    changes += [
        Change("recipe", f"{name}: {old[name]} then, {new[name]} now") for name in _FIXED if old[name] != new[name]
    ]
    if not ours["resumable"] and not finished:
        changes.append(Change("recipe", "the checkpoint has no optimiser state"))
    if content["current_epoch"] > run.recipe.epochs:
        changes.append(
            Change("recipe", f"epochs: {content['current_epoch']} are done, the recipe has {run.recipe.epochs}")
        )
    _refuse(f"can't go on from {path}: it would become another model", path, changes, accepted)
    for name, value in new.items():
        if name not in _SAFE_TO_CHANGE and old[name] != value and not (finished and name == "epochs"):
            logger.warning("resuming with another %s than before: %s instead of %s", name, value, old[name])


def check_validation(path: Path, content: Mapping[str, Any], run: RunIdentity, accepted: Collection[str] = ()) -> None:
    """Raise ConfigurationError when validating would say something wrong about the checkpoint's model.

    That is when cases are to be validated that it was trained on, or when they are preprocessed or labelled in another way.
    Other validation cases that it has never seen are only warned of. Arguments as of :func:`check_resumable`.
    """
    recorded = recorded_identity(path, content, run)
    changes = [change for change in _changes(recorded, run) if change.about not in (SPLITS, "weights")]
    seen = sorted(set(run.validation_cases) & cases_seen(recorded))
    expected = set(recorded.get("validation_cases", run.validation_cases))
    if seen and set(run.validation_cases) != expected:  # fold "all" validates on its training cases
        changes.append(Change(SPLITS, f"the model was trained on validation cases of today: {and_more(seen)}"))
    elif set(run.validation_cases) != expected:
        text = _lists_words("validation cases", sorted(expected), sorted(run.validation_cases))
        logger.warning("%s (the model has seen none of them)", text)
    _refuse(f"can't validate {path} on what lies here now", path, changes, accepted)


def _refuse(what: str, path: Path, changes: Sequence[Change], accepted: Collection[str]) -> None:
    for change in changes:
        if change.about in accepted:
            logger.warning("accepted as changed: %s", change.text)
    mistakes = [change.text for change in changes if change.about not in accepted]
    if not mistakes:
        return
    ways = ["change it back", "start again with --restart, which sets the earlier run aside"]
    abouts = dict.fromkeys(change.about for change in changes if change.about not in accepted)
    if all(about in ACCEPTABLE for about in abouts):
        ways.append(f"accept it with --accept-changed {' '.join(abouts)}")
    lines = "".join(f"\n  {mistake}" for mistake in mistakes)
    raise ConfigurationError(f"{what}{lines}\n{', or '.join(ways).capitalize()}", path=path, mistakes=mistakes)


# -- what was, and what is ---------------------------------------------------------------------------------------------------


def recorded_identity(path: Path, content: Mapping[str, Any], run: RunIdentity) -> dict[str, Any]:
    """What the checkpoint's run was made of: as far as older ones don't say it themselves, by the files beside them."""
    if "identity" in content["nnssl_adapt"]:
        return dict(content["nnssl_adapt"]["identity"])
    recorded: dict[str, Any] = {}
    try:
        debug = read_json(path.parent / "debug.json", ConfigurationError)
        for key in ("training_cases", "validation_cases"):
            if key in debug and not _is_names(debug[key]):
                raise ConfigurationError(f"{path.parent / 'debug.json'}: {key!r} must be a list of cases", path=path)
        recorded |= {key: debug[key] for key in ("training_cases", "validation_cases") if key in debug}
        model = path.parent.parent
        plan = FinetunePlan.load(model / "plans.json", run.plan.configuration)
        recorded["preprocessing"] = plan.settings.to_dict()
        recorded |= described_dataset(DatasetJson.load(model / "dataset.json"))
    except NnsslAdaptError as error:
        logger.warning(
            "%s doesn't say what its run was made of, and what lies beside it can't be read: %s", path, error
        )
    return recorded


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def cases_seen(recorded: Mapping[str, Any]) -> set[str]:
    """All cases that a recorded run was ever trained on."""
    return {*recorded.get("training_cases", ()), *recorded.get("seen_before", ())}


def _changes(then: Mapping[str, Any], run: RunIdentity) -> Iterator[Change]:
    """What differs, as far as it was recorded."""
    now = json.loads(json.dumps(run.to_dict()))
    then = {**now, **json.loads(json.dumps(then))}
    for key, words in (("training_cases", "training cases"), ("validation_cases", "validation cases")):
        if sorted(then[key]) != sorted(now[key]):
            yield Change(SPLITS, _lists_words(words, sorted(then[key]), sorted(now[key])))
    old, new = then["preprocessing"], now["preprocessing"]
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            yield Change(
                "preprocessing", f"{_SETTINGS.get(key, key)}: {_value(old.get(key))} then, {_value(new.get(key))} now"
            )
    if old == new:
        other = [case for case, digest in then["stored"].items() if now["stored"].get(case, digest) != digest]
        if other:
            yield Change(
                DATA, f"the stored voxels of {and_more(other)}: they were preprocessed again since, from other files"
            )
    if other := [case for case, by in then["previous_stage"].items() if now["previous_stage"].get(case, by) != by]:
        yield Change(
            DATA, f"the previous stage's labels of {and_more(other)}: they were predicted again since, by other weights"
        )
    for key, words in (("labels", "labels"), ("regions_class_order", "order of the regions"), ("channels", "channels")):
        if then[key] != now[key]:
            yield Change(key, f"{words}: {_value(then[key])} then, {_value(now[key])} now")
    weights_then, weights_now = ((weights or {}).get("sha256") for weights in (then["weights"], now["weights"]))
    if weights_then and weights_now and weights_then != weights_now:  # not everybody who goes on names them again
        yield Change("weights", f"starting weights: {_weights(then['weights'])} then, {_weights(now['weights'])} now")


def _network_words(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The parts of a network's description that differ."""
    parts = []
    for key in ("num_channels", "num_heads"):
        if then.get(key) != now[key]:
            parts.append(f"{key.replace('num_', '')} {then.get(key)} then, {now[key]} now")
    old, new = then.get("architecture", {}), now["architecture"]
    old, new = ({**plain.get("arch_kwargs", {}), "class": plain.get("network_class_name")} for plain in (old, new))
    parts += [
        f"{key} {_value(old.get(key))} then, {_value(new.get(key))} now"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    return f"network: {'; '.join(parts) or 'another one'}"


def _lists_words(words: str, then: Sequence[str], now: Sequence[str]) -> str:
    if len(then) + len(now) <= 12:
        return f"{words}: {', '.join(then)} then, {', '.join(now)} now"
    added, missing = (sorted(set(a) - set(b)) for a, b in ((now, then), (then, now)))
    return f"{words}: {len(then)} then, {len(now)} now; new: {and_more(added) or 'none'}; gone: {and_more(missing) or 'none'}"


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _weights(weights: Mapping[str, Any] | None) -> str:
    if weights is None:
        return "random ones"
    return f"{weights.get('source')} (SHA-256 {str(weights.get('sha256'))[:12]}…)"
