"""The commands that predict with what :func:`nnssl_adapt.evaluation.selection.find_best` has chosen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from nnssl_adapt.data.names import channel_key
from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.evaluation.crossval import TrainedModel
from nnssl_adapt.evaluation.postprocessing import FILE
from nnssl_adapt.evaluation.selection import Selection
from nnssl_adapt.planning.plan import FinetunePlan

_IN, _OUT, _PROCESSED = "INPUT_FOLDER", "OUTPUT_FOLDER", "OUTPUT_FOLDER_PP"


def inference_commands(selection: Selection) -> list[str]:
    """Every command, in order: predict, average if an ensemble won; the last one postprocesses if that helps."""
    best = selection.best
    several = len(best.models) > 1
    steps = shlex.quote(str(best.folder / FILE)) if selection.decision.postprocessing.steps else None
    outputs = [f"{_OUT}_MODEL_{number}" for number in range(1, len(best.models) + 1)] if several else [_OUT]
    commands = [
        predict_command(selection.dataset, model, selection.folds, output, several)
        for model, output in zip(best.models, outputs, strict=True)
    ]
    if several:
        commands.append(f"nnssl-adapt ensemble {' '.join(outputs)} -o {_OUT}")
    if steps is not None and (several or _is_ours(best.models[0])):
        commands[-1] += f" --postprocess {steps}"
    elif steps is not None:
        commands.append(f"nnssl-adapt postprocess -i {_OUT} -o {_PROCESSED} --steps {steps}")
    return commands


def predict_command(
    dataset: str, model: TrainedModel, folds: Sequence[int], output: str, save_probabilities: bool
) -> str:
    """How to predict with one model: our command, or nnU-Net's for its configurations that ours does not run."""
    trainer, plans, configuration = model.parts
    ours = _is_ours(model)
    words = ["nnssl-adapt", "predict"] if ours else ["nnUNetv2_predict"]
    words += ["-d", dataset, "-i", _IN, "-o", output, "-f", *(str(fold) for fold in folds)]
    words += ["-tr", trainer, "-c", configuration, "-p", plans]
    if save_probabilities:
        words.append("--save-probabilities" if ours else "--save_probabilities")
    return shlex.join(words)


def _is_ours(model: TrainedModel) -> bool:
    """Whether ``nnssl-adapt predict`` runs this configuration."""
    try:
        plan = FinetunePlan.load(model.path / "plans.json", model.parts[2])
        return len(plan.patch_size) == 3
    except NnsslAdaptError:
        return False


def instructions_text(selection: Selection) -> str:
    """The commands with a word about each, as they are written to ``inference_instructions.txt``."""
    best = selection.best
    lines = [f"Best in cross-validation: {best.name} (mean Dice {best.score:.4f})", ""]
    lines += ["Predict with:", *(f"  {command}" for command in inference_commands(selection)), ""]
    lines += [*_channel_numbers(selection)]
    steps = selection.decision.postprocessing
    if steps.steps:
        lines.append(f"Postprocessing that helps: {steps}")
    else:
        lines.append("No postprocessing helps.")
    return "\n".join(lines) + "\n"


def _channel_numbers(selection: Selection) -> Iterator[str]:
    """How images must be numbered, where the models that were compared take their channels in different orders."""
    channels = {model.name: model.channel_names for model in selection.models}
    orders = {tuple(channel_key(name) or name for name in names) for names in channels.values()}
    if len(orders) > 1:
        yield "The models do not take their channels in the same order. Number the images so, or keep them in a dataset whose"
        yield "dataset.json names its channels: nnssl-adapt predict then takes them by name."
        for model in selection.best.models:
            told = ", ".join(f"{name} (_{number:04d})" for number, name in enumerate(channels[model.name]))
            yield f"  {model.name}: {told}"
        yield ""
