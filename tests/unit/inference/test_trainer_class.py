"""Which trainer of nnU-Net builds a network, and the class that is written where none does."""

import ast

import pytest
from support.model_folders import ARCHITECTURE

from nnssl_adapt.inference.trainer_class import (
    PRIMUS_FROM_PLANS,
    trainer_for_nnunet,
    write_trainer_class,
)
from nnssl_adapt.weights.families.nnunet import architecture_of_trainer
from nnssl_adapt.weights.network.architectures import Architecture


@pytest.mark.parametrize(
    ("architecture", "trainer"),
    [
        (ARCHITECTURE, "nnUNetTrainer"),
        (Architecture.named("ResEncL"), "nnUNetTrainer"),
        (Architecture.named("PrimusB"), "nnUNet_Primus_B_Trainer"),
        (Architecture.named("PrimusV2B"), "nnUNet_PrimusV2B_Trainer"),
        (Architecture.named("PrimusV3L"), "nnUNet_PrimusV3L_Trainer"),
        (Architecture.named("PrimusM", eva_depth=3), PRIMUS_FROM_PLANS),
        (Architecture.named("PrimusM", patch_embed_size=[8, 4, 8]), PRIMUS_FROM_PLANS),
    ],
)
def test_a_class_is_written_only_where_no_trainer_builds_the_network(tmp_path, architecture, trainer):
    assert trainer_for_nnunet(architecture) == trainer
    path = write_trainer_class(tmp_path, architecture)
    if trainer != PRIMUS_FROM_PLANS:
        assert path is None and not list(tmp_path.iterdir())
        return
    assert path == tmp_path / "trainer_class.py"
    tree = ast.parse(path.read_text())
    (written,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert written.name == PRIMUS_FROM_PLANS
    methods = {node.name: node for node in written.body if isinstance(node, ast.FunctionDef)}
    # nnU-Net takes a method without this argument for one of the old kind, and calls it otherwise.
    assert methods["build_network_architecture"].args.args[0].arg == "plans_manager"


@pytest.mark.parametrize(
    ("trainer", "preset"),
    [
        ("nnUNet_Primus_L_Trainer", "PrimusL"),
        ("nnUNet_Primus_M_Trainer_BS8", "PrimusM"),
        ("nnUNet_Primus_M_Trainerx", None),
        ("nnUNet_PrimusV2S_Trainer", "PrimusV2S"),
        ("nnUNet_PrimusV3M_Trainer", "PrimusV3M"),
        ("nnUNetTrainer", None),
        (PRIMUS_FROM_PLANS, None),
    ],
)
def test_trainers_that_build_a_primus_whatever_the_plans_say(trainer, preset):
    assert architecture_of_trainer(trainer) == (Architecture.named(preset) if preset else None)
