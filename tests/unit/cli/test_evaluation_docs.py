"""Every command in docs/evaluation.md runs, in their order, on a tiny model; every flag in its text exists."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.crossval_folders import DATASET, LABELS, write_model, write_references
from support.model_folders import write_model_folder
from support.synthetic import write_image

from nnssl_adapt.cli.main import build_parser, main
from nnssl_adapt.inference.postprocess import Postprocessing

TEXT = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
MODEL, OTHER = "nnUNetTrainer__nnUNetPlans__3d_fullres", "nnUNetTrainer__otherPlans__3d_fullres"
SMALL = {"predict": ["-device", "cpu", "--no-tta"], "evaluate": ["-np", "1"], "find-best": ["-np", "1"]}
"""What a small machine needs."""


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    inline = re.findall(r"`(nnssl-adapt report [^`]*)`", TEXT)
    return [shlex.split(line) for line in [*"\n".join(blocks).splitlines(), *inline] if line]


@pytest.fixture
def workplace(nnunet_folders, monkeypatch):
    """Two models with checkpoints and a validated cross-validation, an image with its label, and steps."""
    monkeypatch.chdir(nnunet_folders)
    references = write_references(nnunet_folders)
    truth = Path("nnUNet_raw", DATASET, "labelsTr")
    for seed, name in enumerate((MODEL, OTHER)):
        write_model_folder(Path("nnUNet_results"), folds=(0, 1, 2), name=name, heads=4, labels=LABELS)
        model = write_model(nnunet_folders, name, LABELS, references, [1.0] * 4, seed, islands=(2,))
        for fold in range(3):
            words = ("-p", str(model / f"fold_{fold}" / "validation"), "-g", str(truth), "--chill", "-np", "1")
            assert main(["evaluate", "--dataset-json", str(model / "dataset.json"), *words]) == 0
    for folder in ("IMAGES", "LABELS"):
        Path(folder).mkdir()
    write_image(Path("IMAGES", "a_0000.nii.gz"), references["a"].astype("int16"), (3.0, 1.2, 0.8))
    shutil.copy(truth / "a.nii.gz", "LABELS")
    Postprocessing(((1, 2, 3),)).save("postprocessing.json")


def test_every_command_runs(workplace, capsys):
    results = Path("nnUNet_results", DATASET).resolve()
    places = {
        "MODEL_FOLDER": str(results / MODEL),
        "scratch=MODEL_FOLDER": f"scratch={results / MODEL}",
        "mae=MODEL_FOLDER": f"mae={results / OTHER}",
        "41": "991",
        "PLANS": "otherPlans",
        "OTHER_SEGMENTATIONS": "SEGMENTATIONS",
        "SEGMENTATIONS_A": str(results / MODEL / "fold_0" / "validation"),
        "SEGMENTATIONS_B": str(results / OTHER / "fold_0" / "validation"),
    }
    ran = []
    for _, command, *words in commands():
        given = [places.get(word, word) for word in words if word not in ("3", "4")]  # of the folds
        assert main([command, *given, *SMALL.get(command, [])]) == 0, capsys.readouterr().err
        ran.append(command)
    assert set(ran) == {"predict", "evaluate", "compare", "find-best", "ensemble", "postprocess", "report"}
    for made in ("SEGMENTATIONS/summary.csv", "POSTPROCESSED/a.nii.gz", "comparison/comparison.png"):
        assert Path(made).is_file()
    assert (results / MODEL / "report.html").is_file()


def test_every_flag_in_the_text_exists():
    """Those of our commands; --npz is training's."""
    parser = build_parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    known = {
        flag for command in (*SMALL, "train", "compare") for flag in subparsers.choices[command]._option_string_actions
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT))
    elsewhere = {"--steps": "postprocess", "--viewer": "report", "--viewer-mb": "report"}
    assert len(named) > 8 and named - known == set(elsewhere)
    assert all(flag in subparsers.choices[name]._option_string_actions for flag, name in elsewhere.items())
