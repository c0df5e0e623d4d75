"""The nnU-Net plan of a dataset that a plan for fine-tuning starts from, where there is one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from nnssl_adapt.errors import PlanError
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.naming import NNUNET_PLANS
from nnssl_adapt.planning.plan import CONFIGURATION, FinetunePlan
from nnssl_adapt.planning.plans_json import refuse_ignored_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BasePlans:
    """What is taken over from an existing nnU-Net plan; ``content`` is empty when there is none."""

    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, dataset_name: str, name: str | None) -> BasePlans:
        """The plans file ``name`` of a dataset, by default ``nnUNetPlans`` where it exists. Raises PlanError."""
        path = preprocessed_folder() / dataset_name / f"{(name or NNUNET_PLANS[0]).removesuffix('.json')}.json"
        if not path.is_file():
            if name is not None:
                raise PlanError(
                    f"no base plans {path}; found: {plans_beside(dataset_name)}. Leave -pl out to do without"
                )
            return cls()
        plan = FinetunePlan.load(path)
        logger.info("using the nnU-Net plans %s for the image reader, intensity statistics and Dice setting", path)
        return cls(plan.content)

    @property
    def batch_dice(self) -> bool:
        configuration = self.content.get("configurations", {}).get(CONFIGURATION, {})
        return bool(configuration.get("batch_dice", False))

    @property
    def image_reader(self) -> str:
        return str(self.content.get("image_reader_writer", "SimpleITKIO"))


def find_topology(dataset_name: str, name: str | None) -> FinetunePlan | None:
    """The plan whose network is to be kept: ``name``, or ``nnUNetPlans`` where it exists; else None.

    Raises PlanError where ``name`` does not exist, or the plan found is not this dataset's.
    """
    chosen = (name or NNUNET_PLANS[0]).removesuffix(".json")
    path = preprocessed_folder() / dataset_name / f"{chosen}.json"
    if not path.is_file():
        if name is None:
            return None
        preset = _PRESET_OF_PLANS.get(chosen)
        instead = f"with --preset {preset}" if preset else "without it, or with another name"
        raise PlanError(
            f"-pl {name}: there is no {path} (found: {plans_beside(dataset_name)}). Run this command {instead}: the "
            "network is then planned here, by nnU-Net's rules"
        )
    plan = FinetunePlan.load(path)
    refuse_ignored_keys(plan.settings_of_configuration, CONFIGURATION, path)
    if plan.dataset_name != dataset_name:
        raise PlanError(f"{path} is a plan for {plan.dataset_name}, not for {dataset_name}")
    return plan


_PRESET_OF_PLANS = dict(zip(NNUNET_PLANS, ("default", "ResEncM", "ResEncL", "ResEncXL"), strict=True))
"""Which preset nnU-Net's planners of these names are."""


def plans_beside(dataset_name: str) -> str:
    """Names of the plans files that a dataset has, for messages."""
    folder = preprocessed_folder() / dataset_name
    return ", ".join(sorted(p.stem for p in folder.glob("*Plans*.json"))) or "none"
