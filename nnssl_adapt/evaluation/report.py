"""One page that says what was fine-tuned from what, how, and how good it is. It opens from disk, without a network."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nnssl_adapt.data.dataset import DatasetJson, RawCase, listed_cases
from nnssl_adapt.data.images import read_image, read_labels
from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError
from nnssl_adapt.evaluation import report_page as html
from nnssl_adapt.evaluation.lesions import LESION_MEASURES, LesionRule
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.evaluation.metrics import evaluate_case
from nnssl_adapt.evaluation.overlay import overlay_figure
from nnssl_adapt.evaluation.report_content import (
    CaseResult,
    FoldResult,
    deviation,
    gather_folds,
    mean,
    worst_median_best,
)
from nnssl_adapt.files import write_text
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.paths import preprocessed_folder, raw_folder
from nnssl_adapt.planning.provenance import NOT_LOADED
from nnssl_adapt.weights.transfer.rows import percent

logger = logging.getLogger(__name__)

NOT_KNOWN = "–"


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
        return html.frame(self.html)

    def __repr__(self) -> str:
        return f"Report({self.model})"


def write_report(
    model: ModelFolder | str | Path,
    output: str | Path | None = None,
    overlays: bool = True,
    lesions: LesionRule | None = None,
) -> Path:
    """Write the report of a trained model folder (see :func:`make_report`), and return its path.

    Raises:
        ModelFolderError: it is no trained model folder.
        OutputError: the file can't be written.
    """
    return make_report(model, overlays, lesions).save(output)


def make_report(model: ModelFolder | str | Path, overlays: bool = True, lesions: LesionRule | None = None) -> Report:
    """Make the report of a trained model folder, ours or nnU-Net's.

    Args:
        model: the model folder, with any number of trained folds.
        overlays: draw worst, median and best case, for which the images must lie in ``nnUNet_raw``.
        lesions: count the lesions of the validation cases by this rule, too.

    Raises:
        ModelFolderError: it is no trained model folder.
        CaseError: lesions can't be counted, since a segmentation or its reference is missing or can't be read.
    """
    model = model if isinstance(model, ModelFolder) else ModelFolder.open(model)
    folds = gather_folds(model)
    cases = [case for fold in folds for case in fold.cases]
    body = [
        *_header(model, folds, cases),
        *_origin(model, folds),
        *_results(model, cases),
        *(_lesions(model, cases, lesions) if lesions is not None and cases else ()),
        *(_pictures(model, cases) if overlays else ()),
        *_curves(folds),
        *_reproduction(model, folds),
    ]
    return Report(html.page(f"{model.plan.dataset_name}: {model.path.name}", body), model.path)


# -- what it is ------------------------------------------------------------------------------------------------------


def _header(model: ModelFolder, folds: Sequence[FoldResult], cases: Sequence[CaseResult]) -> Iterator[str]:
    yield html.heading(model.plan.dataset_name, 1)
    names = ", ".join(fold.name for fold in folds)
    yield html.paragraph(f"{model.path.name} · fold{'s' if len(folds) > 1 else ''} {names}", dim=True)
    figures = []
    if cases:
        figures.append((_number(mean(case.mean_dice for case in cases)), f"mean Dice of {len(cases)} validation cases"))
    transfer = next((fold.transfer for fold in folds if fold.transfer is not None), None)
    if transfer is not None:
        figures.append((percent(transfer.coverage, 0), "of the encoder pre-trained"))
    epochs = max((len(fold.epochs) for fold in folds), default=0)
    if epochs:
        figures.append((str(epochs), "epochs"))
        figures.append((_duration(sum(fold.hours for fold in folds)), "of training"))
    yield html.tiles(figures)


def _origin(model: ModelFolder, folds: Sequence[FoldResult]) -> Iterator[str]:
    yield html.heading("What was fine-tuned, from what")
    plan = model.plan
    source = plan.provenance.source
    rows = [
        ("network", str(plan.architecture)),
        ("patch, batch", f"{_by(plan.patch_size)} voxels, {plan.batch_size}"),
        ("spacing", "each image's own" if plan.spacing is None else f"{_by(plan.spacing)} mm"),
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
    yield html.table(("", ""), rows, numbers_from=2)
    transfer = next((fold.transfer for fold in folds if fold.transfer is not None), None)
    if transfer is not None:
        yield html.heading("What became of every tensor", 3)
        yield html.picture(_png(transfer.plot()), "The network's modules, coloured by what became of their numbers")
        yield html.details("the table", html.code(str(transfer)))
    citations = [] if plan.provenance.given == NOT_LOADED else plan.pretrain_info.get("citations") or []
    texts = [text for entry in citations if isinstance(entry, dict) for text in entry.get("apa_citations") or ()]
    if texts:
        yield html.heading("Please cite", 3)
        yield html.bullets(texts)


# -- how good it is --------------------------------------------------------------------------------------------------


def _results(model: ModelFolder, cases: Sequence[CaseResult]) -> Iterator[str]:
    yield html.heading("Results on the validation cases")
    if not cases:
        yield html.paragraph("No fold has been validated yet.")
        return
    yield html.paragraph(
        "Means ± standard deviations over the cases in which a class is in the reference or the prediction.", dim=True
    )
    rows = []
    for name in model.labels.class_names:
        dice = [case.metrics[name]["Dice"] for case in cases if name in case.metrics]
        iou = [case.metrics[name]["IoU"] for case in cases if name in case.metrics]
        known = sum(not math.isnan(value) for value in dice)
        worst = min((value for value in dice if not math.isnan(value)), default=math.nan)
        rows.append((name, _spread(dice), _spread(iou), _number(worst), str(known)))
    yield html.table(("class", "Dice", "IoU", "lowest Dice", "cases"), rows)
    ranked = sorted(cases, key=lambda case: (math.inf if math.isnan(case.mean_dice) else case.mean_dice, case.name))
    header = ("case", "fold", "mean Dice", *model.labels.class_names)
    lines = [
        (
            case.name,
            case.fold,
            _number(case.mean_dice),
            *(_number(case.metrics.get(name, {}).get("Dice", math.nan)) for name in model.labels.class_names),
        )
        for case in ranked
    ]
    table = html.table(header, lines)
    yield html.heading("Case by case, worst first", 3)
    yield table if len(lines) <= 30 else html.table(header, lines[:15]) + html.details(f"all {len(lines)}", table)


def _lesions(model: ModelFolder, cases: Sequence[CaseResult], rule: LesionRule) -> Iterator[str]:
    judged = [
        evaluate_case(case.prediction, case.reference, model.labels, Judging(lesions=rule)).metrics for case in cases
    ]
    yield html.heading("Lesions", 3)
    yield html.paragraph(f"Means over the cases in which a value is defined. {rule}", dim=True)
    rows = []
    for entry, name in zip(model.labels.foreground, model.labels.class_names, strict=True):
        values = {measure: [float(metrics[entry][measure]) for metrics in judged] for measure in LESION_MEASURES}
        shares = [_number(mean(values[measure])) for measure in LESION_MEASURES[:5]]
        counts = [f"{sum(values[measure]):g}" for measure in LESION_MEASURES[5:]]
        rows.append((name, *shares, *counts))
    header = ("class", "F1", "sensitivity", "PPV", "Dice of found", "lesion-wise Dice", "lesions", "predicted")
    yield html.table(header, rows)


def _pictures(model: ModelFolder, cases: Sequence[CaseResult]) -> Iterator[str]:
    chosen = worst_median_best(cases)
    if not chosen:
        return
    yield html.heading("Worst, median and best case")
    for what, case in chosen:
        try:
            yield html.picture(
                _overlay(model, case, what), f"{case.name}, the {what} case: image, reference, prediction"
            )
        except (NnsslAdaptError, OSError) as error:
            logger.info("no picture of %s: %s", case.name, error)
            yield html.paragraph(f"{case.name} ({what}) is not drawn: {error}", dim=True)


def _overlay(model: ModelFolder, case: CaseResult, what: str) -> bytes:
    dataset, ending = model.plan.dataset_name, model.file_ending
    files = _files_of(model, case.name)
    image, geometry = read_image(files.images[:1], model.image_reader)
    known = [case.reference, *([files.label] if files.label is not None else [])]
    with contextlib.suppress(ConfigurationError):  # nnUNet_preprocessed need not be set
        known.insert(1, preprocessed_folder() / dataset / "gt_segmentations" / f"{case.name}{ending}")
    reference = next((path for path in known if path.is_file()), known[0])
    labels = [read_labels(path, model.image_reader)[0][0] for path in (reference, case.prediction)]
    values = [value for value in model.labels.all_labels if value != 0]
    names = model.labels.class_names if not model.labels.has_regions else [f"label {value}" for value in values]
    figure = overlay_figure(
        image[0],
        np.where(np.isin(labels[0], values), labels[0], 0),  # what nobody annotated is not drawn
        labels[1],
        names,
        spacing=geometry.spacing,
        title=f"{what}: {case.name}, mean Dice {case.mean_dice:.3f}",
        direction=None if geometry.picture is not None else geometry.direction,
    )
    return _png(figure)


def _files_of(model: ModelFolder, case: str) -> RawCase:
    """Where the dataset says that a case's files lie; by nnU-Net's names where dataset.json does not list them."""
    folder, ending = raw_folder() / model.plan.dataset_name, model.file_ending
    path = folder / "dataset.json"
    listing = DatasetJson.load(path).dataset if path.is_file() else None
    if listing is not None and case in listing:
        return listed_cases({case: listing[case]}, folder, path)[0]
    return RawCase(case, (folder / "imagesTr" / f"{case}_0000{ending}",), folder / "labelsTr" / f"{case}{ending}")


# -- how it went, and again ------------------------------------------------------------------------------------------


def _curves(folds: Sequence[FoldResult]) -> Iterator[str]:
    drawn = [fold for fold in folds if fold.progress is not None]
    if not drawn:
        return
    yield html.heading("Training")
    for fold in drawn:
        assert fold.progress is not None
        shown = html.picture(fold.progress, f"fold {fold.name}: losses, pseudo-Dice, learning rate, time")
        yield shown if fold is drawn[0] else html.details(f"fold {fold.name}", shown)


def _reproduction(model: ModelFolder, folds: Sequence[FoldResult]) -> Iterator[str]:
    yield html.heading("Again")
    recipe = next((fold.debug["recipe"] for fold in folds if "recipe" in fold.debug), None)
    yield html.code("\n".join(commands(model, folds, recipe)))
    if recipe is not None:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None)
        yield html.details("the recipe (save it as recipe.yaml)", html.code(text))
    rows = []
    for fold in folds:
        if fold.debug:
            what = [
                str(fold.debug.get(key) or NOT_KNOWN) for key in ("nnssl_adapt", "torch", "python", "gpu", "device")
            ]
            rows.append((fold.name, *what, _duration(fold.hours)))
    if rows:
        yield html.heading("Environment", 3)
        header = ("fold", "nnssl_adapt", "torch", "Python", "GPU", "device", "training")
        yield html.table(header, rows, numbers_from=6)


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
            backward = [plan.spacing[axis] for axis in plan.transpose_backward]
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


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _number(value: float) -> str:
    return NOT_KNOWN if math.isnan(value) else f"{value:.3f}"


def _spread(values: Sequence[float]) -> str:
    sd = deviation(values)
    return _number(mean(values)) + ("" if math.isnan(sd) else f" ± {sd:.3f}")


def _by(numbers: Sequence[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
