"""The model card: a README that says what a model does, what it was made of, how well it works, and whose it is.

Front matter as the Hugging Face hub reads it. Dice scores are those of nnU-Net's ``validation/summary.json``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nnssl_adapt.inference.model_folder import Fold, ModelFolder
from nnssl_adapt.inference.trainer_class import TRAINER_FILE, needs_trainer_class
from nnssl_adapt.planning.provenance import NOT_LOADED, WeightsRecord
from nnssl_adapt.sharing.anonymous import Cleaner
from nnssl_adapt.text import dimensions
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION
from nnssl_adapt.weights.sources.published import find_published

_HUB_LICENCES = re.compile(
    r"(apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|gpl-3\.0|unlicense)"
)


def model_card(
    model: ModelFolder,
    name: str,
    tag: str | None,
    folds: Sequence[Fold],
    licence: str | None,
    orientation: str | None,
    cleaner: Cleaner,
) -> str:
    """The card's text (Markdown), the same for the same model.

    ``name`` and ``tag`` head it; ``licence`` is the model's own; ``orientation`` that of its images.
    """
    base = _base_repository(model)
    body = [
        _front_matter(model, name, folds, licence, base),
        f"# {name}" + (f" ({tag})" if tag else ""),
        _what_it_does(model, folds, orientation),
        "## Use\n\n" + _use(model),
        "## Pre-training\n\n" + _pretraining(model, base, cleaner),
        "## Data\n\n" + _data(model, cleaner),
        "## Results\n\n" + _results(model, folds),
        "## Licence\n\n" + (licence or "Not stated. Ask the authors before you use the model."),
        "## Please cite\n\n" + "\n".join(f"- {line}" for line in _citations(model)),
        "Not a medical device: for research only.",
    ]
    return "\n\n".join(part for part in body if part) + "\n"


def _front_matter(model: ModelFolder, name: str, folds: Sequence[Fold], licence: str | None, base: str | None) -> str:
    """What the hub finds the model by (https://huggingface.co/docs/hub/model-cards#model-card-metadata)."""
    about: dict[str, Any] = {"library_name": "nnssl-adapt", "pipeline_tag": "image-segmentation"}
    if licence:
        hub_name = licence.strip().lower().replace(" ", "-")
        known = _HUB_LICENCES.fullmatch(hub_name)
        about |= {"license": hub_name} if known else {"license": "other", "license_name": licence}
    if base:
        about["base_model"] = base
    about["tags"] = [
        "nnssl-adapt",
        "nnunet",
        "medical",
        "segmentation",
        _axes(model).lower(),
        model.architecture.class_name.lower(),
    ]
    about["metrics"] = ["dice"]
    if metrics := _metrics(model, folds):
        dataset = {"name": model.plan.dataset_name, "type": model.plan.dataset_name, "split": "cross-validation"}
        result = {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": metrics}
        about["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---"


def _metrics(model: ModelFolder, folds: Sequence[Fold]) -> list[dict[str, Any]]:
    """Dice of each label and their mean, averaged over the validated folds."""
    scores = [found for fold in folds if (found := _dice(model, fold))]
    means = {}
    for label in dict.fromkeys(label for found in scores for label in found):
        known = [found[label] for found in scores if label in found and not math.isnan(found[label])]
        if known:
            means[_label_name(model, label)] = sum(known) / len(known)
    if not means:
        return []
    entries = [{"type": "dice", "name": "mean Dice", "value": round(sum(means.values()) / len(means), 4)}]
    return entries + [{"type": "dice", "name": f"Dice of {label}", "value": round(v, 4)} for label, v in means.items()]


def _base_repository(model: ModelFolder) -> str | None:
    source = model.plan.provenance.source
    return None if source is None else source.repo_id


def _what_it_does(model: ModelFolder, folds: Sequence[Fold], orientation: str | None) -> str:
    plan = model.plan
    labels = "\n".join(f"| {key} | {value} |" for key, value in model.dataset_json["labels"].items())
    spacing = f"{dimensions(plan.spacing)} mm" if plan.spacing else "each image's own"
    facts = {
        "input": ", ".join(f"channel {index}: {name}" for index, name in enumerate(model.channel_names)),
        "orientation": f"{orientation} (where axes come from, as in the Spinal Cord Toolbox)" if orientation else "any",
        "spacing": f"{spacing} ({'Y, X' if plan.is_planar else 'Z, Y, X'} as the network sees them)",
        "patch": f"{dimensions(plan.patch_size[1:] if plan.is_planar else plan.patch_size)} voxels",
        "network": str(model.architecture),
        "folds": f"{', '.join(map(str, folds))} (averaged)" if len(folds) > 1 else str(folds[0]),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    description = model.dataset_json.get("description")
    about = f"{description}\n\n" if isinstance(description, str) and description else ""
    table = f"| | |\n|---|---|\n{rows}\n\n| label | value |\n|---|---|\n{labels}"
    return f"{about}A {_axes(model)} segmentation model in nnU-Net's format{_stages(model)}.\n\n{table}"


def _axes(model: ModelFolder) -> str:
    return "2D" if model.plan.is_planar else "3D"


def _stages(model: ModelFolder) -> str:
    """Of a cascade, what its first network is called; it comes with it."""
    first = model.plan.previous_stage
    return "" if first is None else f": {model.configuration}, the second network of a cascade, with the first, {first}"


def _use(model: ModelFolder) -> str:
    needs = model.architecture.kind.needs
    own_class = needs_trainer_class(model.architecture)
    first = [f"pip install '{needs[1]}'          # the network is built with {needs[0]}"] if needs else []
    export = ["export nnUNet_extTrainer=MODEL_FOLDER    # nnU-Net's own prediction needs it"] if own_class else []
    commands = [
        *first,
        "nnssl-adapt install PACKAGE.zip          # or this repository's name on the hub",
        "nnssl-adapt predict -i IMAGES -o OUTPUT -m MODEL_FOLDER    # or -m OWNER/NAME, straight from the hub",
        *export,
        "nnUNetv2_predict_from_modelfolder -i IMAGES -o OUTPUT -m MODEL_FOLDER -f FOLDS   # nnU-Net's own",
    ]
    about = (
        "`MODEL_FOLDER` is the one with `plans.json`. The weights can also be fine-tuned: give the package after `-pc`."
    )
    if own_class:
        about += (
            f" `{TRAINER_FILE}` in it builds the network for nnU-Net 2.7 or later"
            + (f", where {needs[0]} is installed" if needs else "")
            + ": it is a program, so read it before you use it; nnssl-adapt does without it."
        )
    block = "\n".join(commands)
    return f"```bash\n{block}\n```\n\n{about}"


def _pretraining(model: ModelFolder, base: str | None, cleaner: Cleaner) -> str:
    info, provenance = model.plan.pretrain_info, model.plan.provenance
    if provenance.given == NOT_LOADED:
        return "None: the network was trained from random weights."
    if not info:
        return "None is recorded: the network was trained from random weights, or by another program."
    source = provenance.source or WeightsRecord()
    where = f"[{base}](https://huggingface.co/{base})" if base else cleaner.json(source.source or "a file")
    lines = [f"- weights: {where}" + (f", revision {source.revision}" if source.revision else "")]
    if source.sha256:
        lines.append(f"- file: {source.filename}, SHA-256 `{source.sha256}`")
    known = find_published(base) if base else None
    if known is not None:
        lines.append(f"- kind: {known.method} on {known.architecture}" + (f", {known.data}" if known.data else ""))
    terms = known.terms if known is not None and known.licence else source.licence
    if terms or known is not None:
        lines.append(f"- licence of those weights: {terms or 'see the repository'}")
    if provenance.trainer_name:
        lines.append(f"- pre-trained by: {provenance.trainer_name}")
    if provenance.source is not None:
        transfer = provenance.transfer.to_dict()
        lines.append("- transferred: " + ", ".join(f"{key} {value}" for key, value in transfer.items() if value))
    return "\n".join(lines)


def _data(model: ModelFolder, cleaner: Cleaner) -> str:
    content = model.dataset_json
    lines = [
        f"- dataset: {model.plan.dataset_name}, {content.get('numTraining', 'an unknown number of')} training cases"
    ]
    for key in ("reference", "licence", "license", "release"):
        if isinstance(content.get(key), str) and content[key]:
            lines.append(f"- {key.replace('license', 'licence')} of the data: {cleaner.text(content[key])}")
    median = model.plan.content.get("original_median_spacing_after_transp")
    if isinstance(median, list):
        lines.append("- median spacing: " + f"{dimensions(median, 4)} mm")
    return "\n".join(lines)


def _results(model: ModelFolder, folds: Sequence[Fold]) -> str:
    scores = {fold: found for fold in folds if (found := _dice(model, fold))}
    if not scores:
        return "No fold of this model was validated."
    labels = list(dict.fromkeys(label for found in scores.values() for label in found))
    head = "| label | " + " | ".join(f"fold {fold}" for fold in scores) + " |\n|---|" + "---|" * len(scores)
    rows = []
    for label in labels:
        cells = [f"{found[label]:.4f}" if label in found else "–" for found in scores.values()]
        rows.append(f"| {_label_name(model, label)} | " + " | ".join(cells) + " |")
    return "Mean Dice over the validation cases of each fold, in the images' own geometry.\n\n" + "\n".join(
        [head, *rows]
    )


def _dice(model: ModelFolder, fold: Fold) -> dict[str, float]:
    path = model.fold_folder(fold) / "validation" / "summary.json"
    try:
        mean = json.loads(path.read_text(encoding="utf-8"))["mean"]
        return {str(label): float(entry["Dice"]) for label, entry in mean.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _label_name(model: ModelFolder, label: str) -> str:
    """Name of a label in a summary, where it is written as its value (regions as "(1, 2)")."""
    for name, value in model.dataset_json["labels"].items():
        text = str(tuple(value)) if isinstance(value, list) else str(value)
        if text == label:
            return str(name)
    return label


def _citations(model: ModelFolder) -> list[str]:
    loaded = model.plan.provenance.given != NOT_LOADED
    found: list[Any] = [*((model.plan.pretrain_info.get("citations") or ()) if loaded else ()), NNUNET_CITATION]
    lines = []
    for entry in found:
        if not isinstance(entry, Mapping):
            continue
        texts = entry.get("apa_citations") or entry.get("bibtex_citations") or [entry.get("name", "")]
        for text in [texts] if isinstance(texts, str) else texts:
            line = " ".join(str(text).split())
            if line and line not in lines:
                lines.append(line)
    return lines
