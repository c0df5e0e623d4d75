"""How released nnU-Net finds the network of a model folder: by the name of a trainer class.

Its own trainers build every CNN that a plan spells out, and the published sizes of Primus. For any other network the class
is written beside the model, where nnU-Net (2.7 on) finds it by the environment variable ``nnUNet_extTrainer``. Where the network
is one of ours, the file holds the network too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from nnssl_adapt.files import write_text
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.network.other_kinds import OTHER_KINDS

TRAINER_FILE = "trainer_class.py"
PRIMUS_FROM_PLANS = "nnsslAdaptPrimusFromPlansTrainer"
"""Name of the class in that file: unlike any of nnU-Net's, which are looked for first."""

STOCK_TRAINER = "nnUNetTrainer"

_USE = """#     export nnUNet_extTrainer=/path/to/the/folder/of/this/file
#     nnUNetv2_predict_from_modelfolder -i IMAGES -o OUTPUT -m /path/to/the/folder/of/this/file
"""

_PRIMUS_CLASS = f'''# The trainer that released nnU-Net needs in order to build this model's network, a Primus of its own size.
#
{_USE}
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans


class {PRIMUS_FROM_PLANS}(nnUNetTrainer):
    """Builds what the plans describe, without the deep supervision that Primus does not have."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
        )

    def set_deep_supervision_enabled(self, enabled):
        pass
'''

_OTHER_CLASS = '''# The network of this model, and the trainer that released nnU-Net needs in order to build it.{needs}
#
{use}
{network}

# -- nnU-Net's trainer ---------------------------------------------------------------------------------------------------

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402


class {trainer}(nnUNetTrainer):
    """Builds the network above with the arguments in the plans."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.enable_deep_supervision = {supervision}

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        return {class_name}(
            num_input_channels,
            num_output_channels,
            **configuration_manager.network_arch_init_kwargs,
            deep_supervision={supervision} and enable_deep_supervision,
        )

    def set_deep_supervision_enabled(self, enabled):
        if {supervision}:
            super().set_deep_supervision_enabled(enabled)
'''


def trainer_for_nnunet(architecture: Architecture) -> str:
    """Name of the trainer class with which nnU-Net builds this network: its own, or one that is written beside the model."""
    if architecture.class_name in OTHER_KINDS:
        return f"nnsslAdapt{architecture.class_name}Trainer"
    if not architecture.is_transformer:
        return STOCK_TRAINER
    for preset, trainer in PRIMUS_TRAINERS.items():
        known = Architecture.named(preset)
        if (architecture.class_name, dict(architecture.kwargs)) == (known.class_name, dict(known.kwargs)):
            return trainer
    return PRIMUS_FROM_PLANS


def needs_trainer_class(architecture: Architecture) -> bool:
    """Whether no trainer of nnU-Net's builds this network, so that a class is written beside its models."""
    return architecture.class_name in OTHER_KINDS or trainer_for_nnunet(architecture) == PRIMUS_FROM_PLANS


def write_trainer_class(model_folder: str | Path, architecture: Architecture) -> Path | None:
    """Write ``trainer_class.py`` into a model folder whose network no trainer of nnU-Net's builds.

    Returns the file, or None where none is needed. The checkpoints must name :func:`trainer_for_nnunet`.
    Raises OutputError when it can't be written.
    """
    if not needs_trainer_class(architecture):
        return None
    is_ours = architecture.class_name in OTHER_KINDS
    text = _text_of_other(architecture, trainer_for_nnunet(architecture)) if is_ours else _PRIMUS_CLASS
    path = Path(model_folder) / TRAINER_FILE
    write_text(path, text)
    return path


def _text_of_other(architecture: Architecture, trainer: str) -> str:
    kind = architecture.kind
    spec = importlib.util.find_spec(kind.module)
    assert spec is not None and spec.origin is not None  # it is a file of this package
    return _OTHER_CLASS.format(
        needs=f"\n# It needs {kind.needs[0]}: pip install {kind.needs[0]}" if kind.needs else "",
        use=_USE,
        network=Path(spec.origin).read_text(encoding="utf-8").rstrip(),
        trainer=trainer,
        class_name=architecture.class_name,
        supervision=kind.has_deep_supervision,
    )
