"""What a plan is asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.normalization import FROM_PRETRAINING
from nnssl_adapt.planning.plan import CASCADE, CONFIGURATION, LOW_RESOLUTION, PLANAR
from nnssl_adapt.weights.transfer.settings import TransferSettings

CONFIGURATIONS = (CONFIGURATION, LOW_RESOLUTION, CASCADE, PLANAR)
"""Names of the configurations that are planned here."""


@dataclass(frozen=True)
class PlanRequest:
    """How the fine-tuning of a checkpoint on a dataset is to be planned. The fields are keywords of :func:`make_plan`.

    Attributes:
        mode: where the spacing comes from. ``like_pretrained``: the pre-training's (the dataset's median when the
            pre-training kept every image's own); ``median`` (also ``default_nnunet``): nnU-Net's rule; ``fixed``: ``spacing``;
            ``no_resample``: every image keeps its own; ``auto``: see :func:`spacing_advice`, whose table is logged.
        name: short name of the pre-training, part of the plan's file name.
        spacing: millimetres (Z, Y, X) in the image's array order, for mode ``fixed`` only.
        base_plans: name of an existing nnU-Net plans file whose reader, intensity statistics and Dice setting are
            taken over; by default ``nnUNetPlans`` where it exists.
        transfer: how the weights will be fitted to the network (by default as suits most).
        plans_name: full name of the plan, e.g. ``nnUNetPlans_contrast_agnostic``, instead of one made up of ``name``,
            spacing and normalisation.
        keep_topology: keep the network, spacing, patch and everything else of ``base_plans`` and fit the weights to it; the
            plan is called ``ptPlans_dynamic__NAME``. Where there are no nnU-Net plans, its rules are followed here.
        reorient: a code such as ``RPI``: plan for copies of the images in this orientation, see :func:`reorient_dataset`.
            The plan is then of another dataset, ``plan.dataset_name``.
        ignore_orientation: go on although images lie another way than the weights want.
        normalization: ``from_pretraining``, ``from_data`` or a scheme, see :func:`choose_normalization`.
        preset: with ``keep_topology``: follow this planner of nnU-Net (``default``, ``ResEncM``, ``ResEncL`` or
            ``ResEncXL``) although there may be plans; by default the one that the weights fit, where there are none.
        fit_gpu: choose patch and batch for the memory of a GPU: ``auto`` or an amount, see :func:`fit_plan`.
        configurations: of nnU-Net's, that the plan must have; the plan is seen through the first.

    Raises ConfigurationError for configurations that are unknown, none, or named twice.
    """

    mode: str = "like_pretrained"
    name: str = "pretrained"
    spacing: Sequence[float] | None = None
    base_plans: str | None = None
    transfer: TransferSettings | None = None
    plans_name: str | None = None
    keep_topology: bool = False
    reorient: str | None = None
    ignore_orientation: bool = False
    normalization: str = FROM_PRETRAINING
    preset: str | None = None
    fit_gpu: str | None = None
    configurations: Sequence[str] = (CONFIGURATION,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "configurations", check_configurations(self.configurations))

    @property
    def wants_stages(self) -> bool:
        """Whether a low resolution, or the cascade that continues it, is requested."""
        return bool({LOW_RESOLUTION, CASCADE} & set(self.configurations))

    @property
    def settings(self) -> TransferSettings:
        """How the weights will be fitted to the network."""
        return self.transfer or TransferSettings()


def check_configurations(names: Sequence[str]) -> tuple[str, ...]:
    """The names of configurations as they are; ConfigurationError where one is not planned here, or there is none."""
    if isinstance(names, str):
        names = (names,)
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown or not names or len(set(names)) != len(names):
        given = " ".join(map(str, names)) or "none"
        raise ConfigurationError(
            f"configurations {given}: expected one or several of {', '.join(CONFIGURATIONS)}, each once"
        )
    if PLANAR in names and len(names) > 1:
        raise ConfigurationError(
            f"configurations {' '.join(names)}: no weights fit both 2D and 3D networks: plan {PLANAR} by itself, and the "
            "others in a plan of another name (-n)"
        )
    return tuple(names)
