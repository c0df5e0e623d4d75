"""A fine-tuned model is a pre-trained one for the next task: fine-tune, push, and fine-tune from what was pushed."""

import json
import os
from pathlib import Path

import torch

from nnssl_adapt.cli import main

TINY = [
    "--epochs",
    "1",
    "--iters",
    "1",
    "--warmup",
    "0",
    "--patch",
    "16",
    "24",
    "16",
    "--set",
    "validation_iterations=1",
]
HERE = ["-am", "median", "-np", "1", "-device", "cpu", "--workers", "0"]


def fine_tune(name, source, *more):
    """Fold 0 of the tiny dataset from this source; returns the model's folder."""
    assert main.main(["finetune", "-d", "991", "-pc", str(source), "-n", name, *TINY, *HERE, *more]) == 0
    (model,) = Path(os.environ["nnUNet_results"], "Dataset991_Tiny").glob(f"PretrainedTrainer__ptPlans__{name}____*")
    return model


def weights_of(model):
    return torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]


def test_fine_tune_push_and_fine_tune_from_it(tiny_dataset, small_resenc, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl_adapt.evaluation.report.report.case_section", lambda *_: None)  # seconds of drawing
    tiny_dataset(cases=2, shape=(14, 22, 15))
    first = fine_tune("first", small_resenc)
    assert main.main(["push", "someone/cord", str(first), "--licence", "CC-BY-4.0", "--orientation", "RAI"]) == 0
    # A learning rate of next to nothing leaves the weights as they were taken over.
    second = fine_tune("second", "someone/cord", "--cache-dir", str(tmp_path / "hub"), "--lr", "1e-12")
    before, after = weights_of(first), weights_of(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], atol=1e-6), name
    start = torch.load(small_resenc / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert not torch.allclose(start["encoder.stem.convs.0.conv.weight"], after["encoder.stem.convs.0.conv.weight"])
    report = json.loads((second / "fold_0" / "transfer_report.json").read_text())
    assert report["coverage"] == 1.0
    ours = json.loads((second / "plans.json").read_text())["nnssl_adapt"]
    assert ours["source"]["repo_id"] == "someone/cord" and ours["source"]["revision"]
