"""A training by two processes, from the command line: it gives what one process gives; stopped, killed and gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training_runs import assert_same_training

import nnssl_adapt
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.run.checkpointing import load_checkpoint

PATIENCE = 240  # seconds that a test waits at most for what takes ten
FLAGS = (  # noqa: SIM905 - as one types them
    "-d 991 -f 0 -device cpu --workers 0 --from_scratch --epochs 3 --iters 6 --val-iters 2 --warmup 1 --lr 0.01 --batch 3 "
    "--accumulate 2 --deep-supervision --set checkpoint_every=1"
).split()


class Run:
    """A training under way, with its results in a folder of its own."""

    def __init__(self, plan, results, *flags, launcher=("-m", "nnssl_adapt.cli.main", "train"), **environment):
        package = str(Path(nnssl_adapt.__file__).parents[1])
        settings = {"nnUNet_results": str(results), "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **environment}
        self.results = results
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-p", plan.plans_name, *FLAGS, *flags],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def fold(self):
        return next(self.results.glob("*/*__3d_fullres/fold_0"))

    @property
    def model(self):
        return ModelFolder.open(self.fold.parent)

    def end(self):
        """Its exit code and what it had to say."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output, errors

    def wait_for_epoch(self, number):
        """Until so many epochs are done and their checkpoint is written."""
        until = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None and time.monotonic() < until, self.end()
            if f"epoch {number}/" in "".join(
                path.read_text() for path in self.results.glob("*/*/fold_0/training_log*")
            ):
                return
            time.sleep(0.01)

    def pid_of(self, rank):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(c) for c in children if f"\0RANK={rank}\0" in Path(f"/proc/{c}/environ").read_text())


@pytest.fixture
def ignoring_plan(make_plan):
    """With Dice over the batch, and a label to ignore: what a loss has to count over all ranks. Two validation cases."""
    plan = make_plan(ignore=True, cases=10)
    content = json.loads(plan.plans_file.read_text())
    content["configurations"]["3d_fullres"]["batch_dice"] = True
    plan.plans_file.write_text(json.dumps(content))
    return FinetunePlan.load(plan.plans_file)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for a process in /proc")
def test_two_ranks_train_what_one_does_even_if_killed_and_stopped(ignoring_plan, tmp_path):
    alone = Run(ignoring_plan, tmp_path / "alone")
    code, output, errors = alone.end()
    assert code == 0, errors
    whole = Run(ignoring_plan, tmp_path / "whole", "-num_gpus", "2")
    code, told_by_two, errors = whole.end()
    assert code == 0, errors
    one, two = (load_checkpoint(run.fold / "checkpoint_final.pth") for run in (alone, whole))
    for name, tensor in one["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][name], tensor, rtol=1e-4, atol=1e-5)
    for key in ("train_losses", "val_losses", "mean_fg_dice"):
        assert np.allclose(one["logging"][key], two["logging"][key], rtol=1e-4), key
    # Only one of them talks, and it says what a single process does.
    assert [len(re.findall("epoch [123]/3", text)) for text in (output, told_by_two)] == [3, 3]
    assert len((whole.fold / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(list(whole.fold.glob("training_log_*"))) == 1
    summaries = [json.loads((run.fold / "validation/summary.json").read_text()) for run in (alone, whole)]
    assert len(summaries[1]["metric_per_case"]) == 2
    assert summaries[1]["foreground_mean"]["Dice"] == pytest.approx(summaries[0]["foreground_mean"]["Dice"], abs=0.02)

    killed = Run(ignoring_plan, tmp_path / "disturbed", "-num_gpus", "2", "--c", "auto")
    killed.wait_for_epoch(1)
    os.kill(killed.pid_of(1), signal.SIGKILL)
    code, _, errors = killed.end()
    assert code == 1
    assert re.search(r"error: rank 1 of 2 was killed by SIGKILL; .*memory.*go on with --c\n$", errors)
    stopped = Run(ignoring_plan, tmp_path / "disturbed", "-num_gpus", "2", "--c", "auto")
    stopped.wait_for_epoch(2)
    stopped.process.send_signal(signal.SIGUSR1)
    code, _, errors = stopped.end()
    assert code == 75, errors
    assert re.search("stopped by SIGUSR1 in (epoch 3|validation)", errors)
    resumed = Run(ignoring_plan, tmp_path / "disturbed", "-num_gpus", "2", "--c", "auto")
    code, _, errors = resumed.end()
    assert code == 0, errors
    assert_same_training(whole.model, resumed.model)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(ignoring_plan, tmp_path):
    exact = ("-device", "cuda", "--precision", "fp32")
    runs = [Run(ignoring_plan, tmp_path / str(count), *exact, "-num_gpus", str(count)) for count in (1, 2)]
    for run in runs:
        code, _, errors = run.end()
        assert code == 0, errors
    one, two = (load_checkpoint(run.fold / "checkpoint_final.pth") for run in runs)
    for key in ("train_losses", "val_losses"):
        assert np.allclose(one["logging"][key], two["logging"][key], rtol=1e-2), key
