"""Cross-validation as a whole: every training case predicted by the fold that did not see it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.endings import files_with
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, ModelFolderError
from nnssl_adapt.evaluation.metrics import Summary, cases_in, evaluate_folder
from nnssl_adapt.files import atomic_path, make_folder
from nnssl_adapt.inference.ensemble import ensemble_cases, saved_probabilities
from nnssl_adapt.inference.heads import order_of_heads
from nnssl_adapt.inference.postprocess import copy_descriptions
from nnssl_adapt.paths import preprocessed_folder, raw_folder
from nnssl_adapt.text import and_more


@dataclass(frozen=True)
class TrainedModel:
    """A trained model's folder, of any configuration: only its files are used.

    Attributes:
        path: ``<results>/<dataset>/<trainer>__<plans>__<configuration>``.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parts(self) -> tuple[str, str, str]:
        """Trainer, plans and configuration. Names of plans may have double underscores in them; the others may not."""
        trainer, _, rest = self.name.partition("__")
        plans, _, configuration = rest.rpartition("__")
        return trainer, plans, configuration

    @property
    def description(self) -> DatasetJson:
        """Its dataset.json. Raises DatasetJsonError."""
        return DatasetJson.load(self.path / "dataset.json")

    @property
    def labels(self) -> LabelScheme:
        return LabelScheme.from_dataset_json(self.description.raw, self.path / "dataset.json")

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the input channels, in order."""
        return tuple(self.description.channel_names.values())

    @property
    def folds(self) -> tuple[int, ...]:
        """Numbered folds that were validated."""
        names = (path.parent.name.removeprefix("fold_") for path in self.path.glob("fold_*/validation"))
        return tuple(sorted(int(name) for name in names if re.fullmatch(r"\d+", name)))

    def validation(self, fold: int) -> Path:
        """Folder of a fold's validation. Raises ModelFolderError, saying what to do, if it is not there."""
        path = self.path / f"fold_{fold}" / "validation"
        if not path.is_dir():
            trained = ", ".join(str(f) for f in self.folds) or "none"
            raise ModelFolderError(
                f"{self.path} has no validation of fold {fold} (validated: {trained}): train it, or choose folds with -f"
            )
        return path


def folds_name(folds: Sequence[int]) -> str:
    """``0_1_2``, as nnU-Net writes it in names of folders."""
    return "_".join(str(fold) for fold in folds)


def reference_folder(dataset_name: str) -> Path:
    """Where a dataset's label files lie: ``gt_segmentations`` of preprocessing, else the raw dataset's ``labelsTr``.

    Raises CaseError if neither is there.
    """
    kept = preprocessed_folder() / dataset_name / "gt_segmentations"
    if kept.is_dir():
        return kept
    raw = raw_folder() / dataset_name / "labelsTr"
    if not raw.is_dir():
        raise CaseError(f"no reference labels of {dataset_name}: neither {kept} nor {raw} is there")
    return raw


def description_of_references(dataset_name: str) -> tuple[Path, LabelScheme] | None:
    """The dataset.json that says what the values of a dataset's label files mean, and its labels; None where there is none."""
    for folder in (preprocessed_folder() / dataset_name, raw_folder() / dataset_name):
        path = folder / "dataset.json"
        if path.is_file():
            return path, LabelScheme.from_dataset_json(DatasetJson.load(path).raw, path)
    return None


def accumulate(
    model: TrainedModel,
    folds: Sequence[int],
    references: Path,
    output: Path | None = None,
    workers: int = 1,
    progress: bool = False,
) -> tuple[Path, Summary]:
    """Gather the validation predictions of several folds in one folder and evaluate them together.

    Args:
        model: whose.
        folds: which.
        references: folder of the labels.
        output: None: ``crossval_results_folds_0_1_…`` in the model folder, nnU-Net's name. Segmentations that lie there and
            are none of these folds' are removed.
        workers: processes, one case each.
        progress: whether to draw a progress bar on stderr.

    Returns:
        The folder, which has the label files, summary.json, dataset.json and plans.json; and the summary.

    Raises:
        ModelFolderError: a fold was not validated.
        CaseError: a case is in two folds, a fold has no predictions, or a file is bad.
    """
    target = output or model.path / f"crossval_results_folds_{folds_name(folds)}"
    ending = model.description.file_ending
    found = _one_per_case({fold: _predictions(model.validation(fold), ending) for fold in folds}, model)
    make_folder(target)
    for name in set(cases_in(target, ending)) - found.keys():
        (target / f"{name}{ending}").unlink()
    for name, path in found.items():
        with atomic_path(target / f"{name}{ending}") as temporary:
            temporary.write_bytes(path.read_bytes())
    copy_descriptions(model.path, target)
    return target, evaluate_folder(
        target,
        references,
        model.labels,
        ending,
        cases=sorted(found),
        output=target / "summary.json",
        workers=workers,
        progress=progress,
    )


def _predictions(folder: Path, ending: str) -> dict[str, Path]:
    found = files_with(folder, ending)
    if not found:
        raise CaseError(f"{folder} has no predictions: validate this fold again (--val)")
    return found


def _one_per_case(folds: Mapping[int, Mapping[str, Path]], model: TrainedModel) -> dict[str, Path]:
    """All cases of the folds. Raises CaseError if one is in two of them."""
    found: dict[str, Path] = {}
    for cases in folds.values():
        for name, path in cases.items():
            if name in found:
                raise CaseError(
                    f"{model.path}: {name} was validated in {found[name].parents[1].name} and in {path.parents[1].name}; "
                    "folds must not share cases"
                )
            found[name] = path
    return found


def ensemble_crossval(
    models: Sequence[TrainedModel],
    folds: Sequence[int],
    references: Path,
    output: Path,
    workers: int = 1,
    progress: bool = False,
) -> Summary:
    """Average several models' validation probabilities, case by case, into ``output``, and evaluate the result.

    Raises:
        ModelFolderError: a fold was not validated.
        ConfigurationError: the models' outputs can't be paired by the names of their labels.
        CaseError: probabilities are missing (``--npz``), a case is in two folds or not in all models.
        PredictionError: cases failed.
    """
    members = []
    for model in models:
        files = {fold: {path.stem: path for path in saved_probabilities(model.validation(fold))} for fold in folds}
        members.append(_one_per_case(files, model))
    names = sorted({name for member in members for name in member})
    for model, member in zip(models, members, strict=True):
        missing = [name for name in names if name not in member]
        if missing:
            raise CaseError(f"{model.path} has no probabilities (.npz) of {and_more(missing)}, another model has")
    ending = models[0].description.file_ending
    make_folder(output)
    for name in set(cases_in(output, ending)) - set(names):
        (output / f"{name}{ending}").unlink()
    cases = {name: [member[name] for member in members] for name in names}
    first = models[0]
    orders = [order_of_heads(first.labels, first.path, model.labels, model.path) for model in models]
    ensemble_cases(cases, output, first.labels, ending, orders, workers=workers, progress=progress)
    copy_descriptions(models[0].path, output)
    return evaluate_folder(
        output,
        references,
        models[0].labels,
        ending,
        cases=names,
        output=output / "summary.json",
        workers=workers,
        progress=progress,
    )
