"""nnU-Net's folders and our commands for tests on a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from nnssl_adapt.training.run.checkpointing import load_checkpoint

SOURCE = Path(__file__).parents[1] / "data" / "nnssl_checkpoints" / "small_resenc"
RECIPE = [
    "-device",
    "cpu",
    "--workers",
    "0",
    "--epochs",
    "3",
    "--iters",
    "3",
    "--val-iters",
    "1",
    "--warmup",
    "1",
    "--patch",
    "16",
    "24",
    "16",
]


def submit(*words: str, code: int = 0, results: Path | None = None) -> str:
    """What ``nnssl-adapt submit`` says, errors included."""
    environment = {**os.environ, **({"nnUNet_results": str(results)} if results else {})}
    done = subprocess.run(
        [sys.executable, "-m", "nnssl_adapt.cli.main", "submit", "-d", "991", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def model_in(results: Path) -> Path:
    """The one model folder."""
    (model,) = results.glob("Dataset991_Tiny/*__3d_fullres")
    return model


def said_in(folder: Path) -> str:
    """The logs of all jobs, for when a test fails."""
    logs = sorted(folder.rglob("submission/logs/*.txt"))
    return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)


def assert_same_weights(left: Path, right: Path, *folds: int) -> None:
    """The folds' final weights and figures are the same, bit for bit."""
    for fold in folds:
        one, two = (load_checkpoint(model / f"fold_{fold}" / "checkpoint_final.pth") for model in (left, right))
        assert one["network_weights"].keys() == two["network_weights"].keys()
        for name, tensor in one["network_weights"].items():
            assert torch.equal(tensor, two["network_weights"][name]), f"fold {fold}: {name}"
        for key in ("train_losses", "val_losses", "mean_fg_dice"):
            assert one["logging"][key] == two["logging"][key], f"fold {fold}: {key}"
