"""One page that says what was fine-tuned from what, how, and how good it is. It opens from disk, without a network."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nnssl_adapt.evaluation.lesions import LESION_MEASURES, LesionRule
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.evaluation.metrics import evaluate_case
from nnssl_adapt.evaluation.report.cases import case_section
from nnssl_adapt.evaluation.report.content import (
    NOT_KNOWN,
    CaseResult,
    FoldResult,
    deviation,
    gather_folds,
    mean,
    number,
    worst_first,
)
from nnssl_adapt.evaluation.report.page import frame, png_of, render
from nnssl_adapt.evaluation.report.viewer import DEFAULT_MEGABYTES, viewer_context
from nnssl_adapt.files import write_text
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.planning.provenance import NOT_LOADED
from nnssl_adapt.text import dimensions
from nnssl_adapt.weights.transfer.rows import percent


@dataclass(frozen=True)
class Report:
    """One page about a trained model; a notebook shows it.

    Attributes:
        html: the whole document.
        model: the model folder.
    """

    html: str
    model: Path

    def save(self, path: str | Path | None = None) -> Path:
        """Write the page to ``path`` (None: ``report.html`` in the model folder), and return where. Raises OutputError."""
        target = self.model / "report.html" if path is None else Path(path)
        write_text(target, self.html)
        return target

    def _repr_html_(self) -> str:
        return frame(self.html)

    def __repr__(self) -> str:
        return f"Report({self.model})"


def write_report(
    model: ModelFolder | str | Path,
    output: str | Path | None = None,
    overlays: bool = True,
    lesions: LesionRule | None = None,
    viewer: bool | float = False,
) -> Path:
    """Write the report of a trained model folder (see :func:`make_report`), and return its path.

    Raises:
        ModelFolderError: it is no trained model folder.
        OutputError: the file can't be written.
    """
    return make_report(model, overlays, lesions, viewer).save(output)


def make_report(
    model: ModelFolder | str | Path,
    overlays: bool = True,
    lesions: LesionRule | None = None,
    viewer: bool | float = False,
) -> Report:
    """Make the report of a trained model folder, ours or nnU-Net's.

    Args:
        model: the model folder, with any number of trained folds.
        overlays: draw the validation cases, for which the images must lie in ``nnUNet_raw``.
        lesions: count the lesions of the validation cases by this rule, too.
        viewer: put the volumes of the worst cases into the page too, and NiiVue, which shows them in 3D. A number: at most
            so many megabytes of them (True: 100); cases beyond are named and left out.

    Raises:
        ModelFolderError: it is no trained model folder.
        ConfigurationError: a viewer is asked for, and this installation has no NiiVue.
        CaseError: lesions can't be counted, since a segmentation or its reference is missing or can't be read.
    """
    megabytes = DEFAULT_MEGABYTES if viewer is True else float(viewer)
    niivue = None if viewer is False else viewer_context()  # before the work
    model = model if isinstance(model, ModelFolder) else ModelFolder.open(model)
    folds = gather_folds(model)
    cases = [case for fold in folds for case in fold.cases]
    transfer = next((fold.transfer for fold in folds if fold.transfer is not None), None)
    names = ", ".join(fold.name for fold in folds)
    recipe = next((fold.debug["recipe"] for fold in folds if "recipe" in fold.debug), None)
    limit = None if niivue is None else megabytes
    section = case_section(model, cases, limit) if overlays and cases else None
    page = render(
        "report.html",
        title=f"{model.plan.dataset_name}: {model.path.name}",
        dataset=model.plan.dataset_name,
        subtitle=f"{model.path.name} · fold{'s' if len(folds) > 1 else ''} {names}",
        tiles=_tiles(folds, cases),
        origin=_origin(model),
        transfer=None if transfer is None else {"picture": png_of(transfer.plot()), "table": str(transfer)},
        citations=_citations(model),
        results=_results(model, cases),
        lesions=_lesions(model, cases, lesions) if lesions is not None and cases else None,
        cases=section,
        viewer=None if section is None else niivue,
        curves=[
            {
                "png": fold.progress,
                "fold": fold.name,
                "caption": f"fold {fold.name}: losses, pseudo-Dice, learning rate, time",
            }
            for fold in folds
            if fold.progress is not None
        ],
        commands="\n".join(commands(model, folds, recipe)),
        recipe=recipe and yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None),
        environment=_environment(folds),
    )
    return Report(page, model.path)


# -- what it is ------------------------------------------------------------------------------------------------------


def _tiles(folds: Sequence[FoldResult], cases: Sequence[CaseResult]) -> list[tuple[str, str]]:
    """Headline figures: (value, what it is)."""
    figures = []
    if cases:
        figures.append((number(mean(case.mean_dice for case in cases)), f"mean Dice of {len(cases)} validation cases"))
    transfer = next((fold.transfer for fold in folds if fold.transfer is not None), None)
    if transfer is not None:
        figures.append((percent(transfer.coverage, 0), "of the encoder pre-trained"))
    epochs = max((len(fold.epochs) for fold in folds), default=0)
    if epochs:
        figures.append((str(epochs), "epochs"))
        figures.append((_duration(sum(fold.hours for fold in folds)), "of training"))
    return figures


def _origin(model: ModelFolder) -> list[tuple[str, str]]:
    plan = model.plan
    source = plan.provenance.source
    rows = [
        ("network", str(plan.architecture)),
        ("patch, batch", f"{dimensions(plan.patch_size)} voxels, {plan.batch_size}"),
        ("spacing", "each image's own" if plan.spacing is None else f"{dimensions(plan.spacing)} mm"),
        ("spacing mode", plan.provenance.spacing_mode or NOT_KNOWN),
        ("channels", ", ".join(model.channel_names)),
        ("classes", ", ".join(model.labels.class_names)),
    ]
    if plan.provenance.given == NOT_LOADED:
        rows.insert(0, ("pre-trained weights", f"none: trained from random weights (the plan was made for {source})"))
    elif source:
        revision = f" at revision {source.revision}" if source.revision else ""
        name = source.repo_id or Path(source.source or NOT_KNOWN).name
        rows.insert(0, ("pre-trained weights", f"{name}{revision}, {source.filename}"))
        rows.insert(1, ("their SHA-256", source.sha256 or NOT_KNOWN))
        rows.insert(2, ("their licence", source.licence or "see where they were published"))
    elif not plan.pretrain_info:
        rows.insert(0, ("pre-trained weights", "none named in the plan"))
    return rows


def _citations(model: ModelFolder) -> list[str]:
    loaded = model.plan.provenance.given != NOT_LOADED
    entries = (model.plan.pretrain_info.get("citations") or []) if loaded else []
    return [str(text) for entry in entries if isinstance(entry, dict) for text in entry.get("apa_citations") or ()]


# -- how good it is --------------------------------------------------------------------------------------------------


def _results(model: ModelFolder, cases: Sequence[CaseResult]) -> dict[str, Any] | None:
    if not cases:
        return None
    classes = []
    for name in model.labels.class_names:
        dice = [case.metrics[name]["Dice"] for case in cases if name in case.metrics]
        iou = [case.metrics[name]["IoU"] for case in cases if name in case.metrics]
        known = sum(not math.isnan(value) for value in dice)
        worst = min((value for value in dice if not math.isnan(value)), default=math.nan)
        classes.append((name, _spread(dice), _spread(iou), number(worst), str(known)))
    lines = [
        (
            case.name,
            case.fold,
            number(case.mean_dice),
            *(number(case.metrics.get(name, {}).get("Dice", math.nan)) for name in model.labels.class_names),
        )
        for case in worst_first(cases)
    ]
    return {"classes": classes, "header": ("case", "fold", "mean Dice", *model.labels.class_names), "cases": lines}


def _lesions(model: ModelFolder, cases: Sequence[CaseResult], rule: LesionRule) -> dict[str, Any]:
    judged = [
        evaluate_case(case.prediction, case.reference, model.labels, Judging(lesions=rule)).metrics for case in cases
    ]
    rows = []
    for entry, name in zip(model.labels.foreground, model.labels.class_names, strict=True):
        values = {measure: [float(metrics[entry][measure]) for metrics in judged] for measure in LESION_MEASURES}
        shares = [number(mean(values[measure])) for measure in LESION_MEASURES[:5]]
        counts = [f"{sum(values[measure]):g}" for measure in LESION_MEASURES[5:]]
        rows.append((name, *shares, *counts))
    header = ("class", "F1", "sensitivity", "PPV", "Dice of found", "lesion-wise Dice", "lesions", "predicted")
    return {"about": f"Means over the cases in which a value is defined. {rule}", "header": header, "rows": rows}


# -- how it went, and again ------------------------------------------------------------------------------------------


def _environment(folds: Sequence[FoldResult]) -> list[tuple[str, ...]]:
    """A row a fold that says what it was trained with."""
    keys = ("nnssl_adapt", "torch", "python", "gpu", "device")
    return [
        (fold.name, *(str(fold.debug.get(key) or NOT_KNOWN) for key in keys), _duration(fold.hours))
        for fold in folds
        if fold.debug
    ]


def commands(model: ModelFolder, folds: Sequence[FoldResult], recipe: dict[str, Any] | None) -> list[str]:
    """The commands that plan, train and predict the same again, as far as the plan knows how it was made."""
    plan = model.plan
    dataset = plan.dataset_name[7:10].lstrip("0") or plan.dataset_name
    trainer, plans_name, configuration = (model.path.name.split("__", 1)[0], plan.plans_name, plan.configuration)
    lines, weights = [], ""
    source, mode = plan.provenance.source, plan.provenance.spacing_mode
    name = ""
    if source is not None:
        name = f"{source.repo_id}@{source.revision}" if source.repo_id else source.source or "WEIGHTS"
    if name and plan.provenance.given == "training":  # the plan was made without them
        weights = f" -pretrained_weights {shlex.quote(name)}"
    elif name:
        how = "--keep-topology" if mode == "base_plans" else f"-am {mode}"
        if mode == "fixed" and plan.spacing is not None:
            transposed = plan.settings.target_spacing((1.0, 1.0, 1.0)) or (
                1.0,
                1.0,
                1.0,
            )  # slices of 2D stay where they are
            backward = [transposed[axis] for axis in plan.transpose_backward]
            how += " -os " + " ".join(f"{s:g}" for s in backward)
        lines.append(
            f"nnUNetv2_preprocess_like_nnssl -d {dataset} -n {_short_name(plans_name)} -pc {shlex.quote(name)} {how}"
        )
    for fold in folds:
        how = "--recipe recipe.yaml" if recipe is not None else f"-tr {trainer}"
        words = f"-d {dataset} -c {configuration} -f {fold.name} -p {plans_name}{weights} {how}"
        lines.append(f"nnUNetv2_train_pretrained {words}")
    lines.append(f"nnssl-adapt predict -i IMAGES -o SEGMENTATIONS -m {shlex.quote(str(model.path))}")
    return lines


def _short_name(plans_name: str) -> str:
    """``mae`` of ``ptPlans__mae____Spacing__1.00_1.00_1.00___Norm__Z``."""
    for prefix in ("ptPlans_dynamic__", "ptPlans__"):
        if plans_name.startswith(prefix):
            return plans_name.removeprefix(prefix).split("____")[0]
    return f"NAME --plans_name {plans_name}"


# -- numbers ---------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    sd = deviation(values)
    return number(mean(values)) + ("" if math.isnan(sd) else f" ± {sd:.3f}")


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
