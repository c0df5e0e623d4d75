"""The FinetunePlan: nnU-Net's plans file, with where the pre-trained weights come from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import PreprocessSettings, ResamplingRule
from nnssl_adapt.errors import PlanError
from nnssl_adapt.files import write_json
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.plan_check import mistakes_of_configuration, mistakes_of_plan
from nnssl_adapt.planning.plans_file import read_plans, refuse_ignored_keys
from nnssl_adapt.planning.provenance import KEY, Provenance
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.transfer.settings import TransferSettings

logger = logging.getLogger(__name__)

CONFIGURATION = "3d_fullres"

PLANAR = "2d"
"""A network of slices."""

LOW_RESOLUTION = "3d_lowres"

CASCADE = "3d_cascade_fullres"
"""The full resolution, with the segmentation of the low one as further channels."""

COPY_IN_MODEL_FOLDER = "plans"
"""What nnU-Net calls the copy of a plan in a model folder (without ``.json``)."""

RESAMPLE = "resample_data_or_seg_to_shape"
"""Name of nnU-Net's resampling function, written into plans so that nnU-Net finds it."""

KEEP = "no_resampling_hack"
"""Name of nnU-Net's function that leaves the voxels as they are: the ``no_resample`` mode, in a form it can read."""


@dataclass(frozen=True)
class FinetunePlan:
    """How one dataset is preprocessed, and which network is trained on it from which weights.

    It *is* a plans file of nnU-Net (``content``), seen through one of its configurations; our additions sit in keys that
    nnU-Net ignores: ``pretrain_info`` (as nnU-Net's own nnssl integration writes it) and ``nnssl_adapt``. Plans written
    by nnU-Net 2.x open just as well; they have no provenance.

    Attributes:
        content: the plans file, key for key. Treat it as read-only.
        configuration: which of its configurations is meant.
        path: the file it was read from or saved to, if any.

    Spacings are in millimetres, shapes in voxels; both are in the plan's axis order, after ``transpose_forward``.
    """

    content: dict[str, Any]
    configuration: str = CONFIGURATION
    path: Path | None = None

    def __post_init__(self) -> None:
        _check(self.content, self.configuration, self.path)

    # -- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, configuration: str = CONFIGURATION) -> FinetunePlan:
        """Read a plans file, ours or nnU-Net's. Raises PlanError naming the file and the key that is wrong."""
        path = Path(path)
        return cls(read_plans(path), configuration, path)

    @classmethod
    def find(cls, dataset_name: str, plans: str, configuration: str = CONFIGURATION) -> FinetunePlan:
        """Read the plan called ``plans`` (with or without ``.json``, or a path) of a preprocessed dataset, for training.

        A copied file has the name of its own file, not of the plan it was copied from, so that their runs have different folders.

        Raises PlanError naming the file and the key that is wrong, also for keys that would be ignored where they stand.
        """
        name = plans.removesuffix(".json")
        path = Path(plans)
        if not path.is_file():
            path = preprocessed_folder() / dataset_name / f"{name}.json"
        plan = cls.load(path, configuration)
        refuse_ignored_keys(plan.settings_of_configuration, configuration, path)
        if path.stem in (plan.plans_name, COPY_IN_MODEL_FOLDER):
            return plan
        logger.warning(
            "%s has the name %s inside, from the plan it was copied from: its file's name is used, so that their runs "
            "don't share a folder",
            path,
            plan.plans_name,
        )
        return cls({**plan.content, "plans_name": path.stem}, configuration, path)

    def save(self, path: str | Path | None = None) -> Path:
        """Write the plans file (by default to :attr:`plans_file`), whole or not at all, and return its path."""
        target = Path(path) if path is not None else self.plans_file
        write_json(target, self.content)
        return target

    @property
    def dataset_folder(self) -> Path:
        """The dataset's folder below ``nnUNet_preprocessed``."""
        return preprocessed_folder() / self.dataset_name

    @property
    def plans_file(self) -> Path:
        """Where this plan lies, or would be saved."""
        return self.path if self.path is not None else self.dataset_folder / f"{self.plans_name}.json"

    @property
    def store_folder(self) -> Path:
        """Where its preprocessed cases lie."""
        return self.dataset_folder / self.data_identifier

    # -- what it says ----------------------------------------------------------------------------------------------

    @property
    def dataset_name(self) -> str:
        return str(self.content["dataset_name"])

    @property
    def plans_name(self) -> str:
        return str(self.content["plans_name"])

    @property
    def settings_of_configuration(self) -> dict[str, Any]:
        """The configuration's entries, with those it inherits."""
        return resolve_configuration(self.content, self.configuration)

    @property
    def data_identifier(self) -> str:
        return str(self.settings_of_configuration["data_identifier"])

    @property
    def architecture(self) -> Architecture:
        return Architecture.from_plans_dict(
            self.settings_of_configuration["architecture"], self.provenance.architecture_preset
        )

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Of a 2D configuration, whose file has two numbers, one slice: (1, Y, X)."""
        z, y, x = (1, *self._patch_in_file)[-3:]
        return z, y, x

    @property
    def _patch_in_file(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.settings_of_configuration["patch_size"])

    @property
    def is_planar(self) -> bool:
        """Whether its network sees slices (nnU-Net's ``2d``). Its spacing has two numbers, within a slice."""
        return len(self._patch_in_file) == 2

    def axes_to_mirror(self, asked: Sequence[int]) -> tuple[int, ...]:
        """Those of the axes asked for (0 is Z) that its patches have."""
        return tuple(axis for axis in asked if not (self.is_planar and axis == 0))

    def mirrored_in_file(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Axes that may be mirrored (0 is Z), as checkpoints of this configuration count them: in a 2D one, 0 is Y."""
        return tuple(axis - 1 for axis in axes if axis > 0) if self.is_planar else tuple(axes)

    def mirrored_in_volume(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The inverse of :meth:`mirrored_in_file`."""
        return tuple(axis + 1 for axis in axes) if self.is_planar else tuple(axes)

    @property
    def batch_size(self) -> int:
        return int(self.settings_of_configuration["batch_size"])

    @property
    def batch_dice(self) -> bool:
        """Whether Dice is computed over the batch as a whole rather than for each sample."""
        return bool(self.settings_of_configuration.get("batch_dice", False))

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Spacing (mm) that images are resampled to, or None when they keep their own."""
        return self.settings.spacing

    @property
    def num_channels(self) -> int:
        return len(self.settings_of_configuration["normalization_schemes"])

    @property
    def previous_stage(self) -> str | None:
        """Configuration whose segmentation this one sees as further channels; None where it is no cascade."""
        name = self.settings_of_configuration.get("previous_stage")
        return None if name is None else str(name)

    @property
    def next_stages(self) -> tuple[str, ...]:
        """Configurations that see the segmentation of this one."""
        names = self.settings_of_configuration.get("next_stage") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def stage_channels(self, labels: LabelScheme) -> tuple[int, ...]:
        """The labels of the previous stage that the network sees as channels, in order; none where there is no such stage."""
        return () if self.previous_stage is None else labels.foreground_labels

    @property
    def transpose_forward(self) -> tuple[int, ...]:
        return tuple(self.content["transpose_forward"])

    @property
    def transpose_backward(self) -> tuple[int, ...]:
        return tuple(self.content["transpose_backward"])

    @property
    def settings(self) -> PreprocessSettings:
        """Everything that preprocessing needs to know."""
        chosen = self.settings_of_configuration
        intensity = self.content.get("foreground_intensity_properties_per_channel")
        if intensity is None:  # the name before nnU-Net 2.0 was final
            intensity = self.content.get("foreground_intensity_properties_by_modality", {})
        return PreprocessSettings(
            spacing=None if chosen["resampling_fn_data"] == KEEP else tuple(float(s) for s in chosen["spacing"]),
            transpose_forward=self.transpose_forward,
            transpose_backward=self.transpose_backward,
            normalization_schemes=tuple(chosen["normalization_schemes"]),
            use_mask_for_norm=tuple(bool(m) for m in chosen["use_mask_for_norm"]),
            intensity_properties={str(k): dict(v) for k, v in intensity.items()},
            patch_size=self.patch_size,
            resampling_data=_rule(chosen.get("resampling_fn_data_kwargs"), order=3),
            resampling_seg=_rule(chosen.get("resampling_fn_seg_kwargs"), order=1),
        )

    @property
    def resampling_for_export(self) -> ResamplingRule:
        """How logits go back to the image's own grid."""
        return _rule(self.settings_of_configuration.get("resampling_fn_probabilities_kwargs"), order=1)

    @cached_property
    def dataset_json(self) -> DatasetJson:
        """The copy of ``dataset.json`` that lies beside the plan."""
        return DatasetJson.load(self.dataset_folder / "dataset.json")

    @cached_property
    def labels(self) -> LabelScheme:
        return LabelScheme.from_dataset_json(self.dataset_json.raw)

    @property
    def pretrain_info(self) -> dict[str, Any]:
        """What nnU-Net's own nnssl integration wants to know of the weights; empty in a plan without weights."""
        return dict(self.content.get("pretrain_info", {}))

    @cached_property
    def provenance(self) -> Provenance:
        """Our own entries: where the weights come from, their digest, the spacing mode; empty in nnU-Net's plans."""
        return Provenance.parse(self.content.get(KEY), self.path or "the plan")

    @property
    def transfer_settings(self) -> TransferSettings:
        """How the weights are to be fitted to the network."""
        return self.provenance.transfer

    # -- variations ------------------------------------------------------------------------------------------------

    def seen_through(self, configuration: str) -> FinetunePlan:
        """The same plan, seen through another of its configurations. Raises PlanError where it has none of this name."""
        return self if configuration == self.configuration else FinetunePlan(self.content, configuration, self.path)

    def replaced(self, patch_size: Sequence[int] | None = None, batch_size: int | None = None) -> FinetunePlan:
        """Return a copy with another patch or batch size (the architecture's entries follow the patch)."""
        content = copy.deepcopy(self.content)
        chosen = resolve_configuration(content, self.configuration)
        if patch_size is not None:
            patch = tuple(int(n) for n in patch_size)
            chosen["architecture"] = self.architecture.to_plans_dict(patch)
            chosen["patch_size"] = list(patch[1:] if self.is_planar else patch)
        if batch_size is not None:
            chosen["batch_size"] = int(batch_size)
        content["configurations"][self.configuration] = chosen
        return FinetunePlan(content, self.configuration, self.path)

    def __str__(self) -> str:
        spacing = "each image's own" if self.spacing is None else " × ".join(f"{s:g}" for s in self.spacing) + " mm"
        patch = " × ".join(str(n) for n in self._patch_in_file)
        weights = self.provenance.source
        source = "no pre-trained weights" if weights is None else weights.source
        fit = self.provenance.fit_gpu
        fit = fit and fit.get(self.configuration, fit)
        return (
            f"{self.plans_name} ({self.dataset_name}, {self.configuration})\n"
            f"  spacing {spacing}, patch {patch}, batch {self.batch_size}, "
            f"normalisation {', '.join(self.settings.normalization_schemes)}\n"
            f"  {self.architecture.preset or self.architecture.class_name} from {source}"
            + (f"\n  {fit['reason']}" if fit else "")
        )


def resolve_configuration(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Entries of a configuration with those of the ones it inherits from (nnU-Net's ``inherits_from``).

    Raises PlanError when the configuration does not exist or inherits in a circle.
    """
    configurations = content["configurations"]
    chain: list[str] = []
    step: str | None = name
    while step is not None:
        if step not in configurations:
            raise PlanError(
                f"plan {content.get('plans_name', '?')} has no configuration {step!r}; it has: {', '.join(configurations)}"
            )
        if step in chain:
            raise PlanError(f"configurations inherit in a circle: {' -> '.join([*chain, step])}")
        chain.append(step)
        step = configurations[step].get("inherits_from")
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged.update(copy.deepcopy(configurations[ancestor]))
    merged.pop("inherits_from", None)
    return merged


def _rule(kwargs: Mapping[str, Any] | None, order: int) -> ResamplingRule:
    kwargs = kwargs or {}
    return ResamplingRule(
        order=int(kwargs.get("order", order)),
        order_z=int(kwargs.get("order_z", 0)),
        force_separate_z=kwargs.get("force_separate_z"),
    )


def _check(content: Any, configuration: str, path: Path | None) -> None:
    where = str(path) if path is not None else "the plan"
    if not isinstance(content, dict):
        raise PlanError(
            f"{where}: expected a JSON object with nnU-Net's plans, got {type(content).__name__}", path=path
        )
    problems = list(mistakes_of_plan(content))
    if not problems:
        chosen = resolve_configuration(content, configuration)
        problems = list(mistakes_of_configuration(chosen, configuration))
    if problems:
        raise PlanError(f"{where} is not a usable plans file: {'; '.join(problems)}", path=path, mistakes=problems)
    Provenance.parse(content.get(KEY), path or where)
