"""What pre-trained weights gain on a small dataset, and our training beside nnU-Net's own: Dice after equal short schedules.

    python benchmarks/gain.py -o FOLDER [--quick] [--seeds 3] [--epochs 8] [--iterations 12]

Four arms, all with the network of the bundled checkpoint (ResEnc, 12 to 96 features), the demo's dataset, the same plan, the
same splits and no mirroring. Seed k trains and validates fold k, so that every comparison is between pairs.

- pretrained  the bundled weights, AdamW with warm-up (recipe tiny_cpu)
- scratch     the same in everything but the weights, which are random
- ours        random weights and nnU-Net's schedule: SGD, polynomial decay, deep supervision (-tr nnUNetTrainerNoMirroring)
- nnunetv2    nnUNetTrainer itself, with fewer epochs and steps; left out where nnunetv2 is not installed

Prints a table of the real validation's Dice (mean over classes and cases), mean ± standard deviation over seeds and of the
differences between pairs, and writes results.json and gain.png into FOLDER. Runs that are in results.json already are not
repeated, so that it can be stopped and started again; other settings need another folder.

The dataset is real anatomy, but only just: smooth deformations of one brain template, which the checkpoint has seen in its
pre-training. So the gain is an upper bound of sorts, for an easy task; nothing follows from it for patients.

Needs nilearn. The whole takes 20 to 40 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS = ("pretrained", "scratch", "ours", "nnunetv2")
PAIRS = (("pretrained", "scratch"), ("ours", "nnunetv2"))
PATCH = (40, 40, 40)
PLAN_NAME = "gain"


def main() -> None:
    arguments = parsed()
    folder = Path(arguments.folder).resolve()
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(folder / f"nnUNet_{variable}")
    if arguments.run is not None:  # a process of its own for each run: no state is carried over, nnU-Net's least of all
        arm, seed = arguments.run
        print(json.dumps({"result": train(arm, int(seed), arguments)}))
        return
    arms = [arm for arm in ARMS if arm != "nnunetv2" or importlib.util.find_spec("nnunetv2")]
    if len(arms) < len(ARMS):
        print("nnunetv2 is not installed: without its arm")
    prepare(folder)
    settings = {name: getattr(arguments, name) for name in ("epochs", "iterations", "validation", "seeds", "threads")}
    results = earlier_results(folder / "results.json", settings)
    wanted = [(arm, seed) for seed in range(arguments.seeds) for arm in arms]
    began, todo = time.monotonic(), [pair for pair in wanted if key(*pair) not in results]
    for number, (arm, seed) in enumerate(todo, 1):
        results[key(arm, seed)] = in_process(arm, seed, arguments)
        (folder / "results.json").write_text(json.dumps({"settings": settings, "runs": results}, indent=1))
        left = (time.monotonic() - began) / number * (len(todo) - number)
        dice = results[key(arm, seed)]["dice"]
        print(
            f"{arm:<10}  seed {seed}  Dice {dice:.4f}  ({number} of {len(todo)}, {left / 60:.0f} min left)", flush=True
        )
    report(results, arms, arguments)
    draw(results, arms, arguments.seeds, folder / "gain.png")
    print(f"picture   {folder / 'gain.png'}\nfigures   {folder / 'results.json'}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="folder", default="gain", help="folder to work in (default ./gain)")
    parser.add_argument("--seeds", type=int, default=3, help="1 to 5 (default 3)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=12, help="steps an epoch (default 12)")
    parser.add_argument("--validation", type=int, default=2, help="random validation batches an epoch (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 2 epochs of 2 steps: to see that it runs")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs, arguments.iterations, arguments.validation = 2, 2, 2, 1
    if not 1 <= arguments.seeds <= 5:
        parser.error(f"--seeds: expected 1 to 5, since there are five folds, got {arguments.seeds}")
    if arguments.epochs < 2:
        parser.error(f"--epochs: expected at least 2, the first of which is the warm-up, got {arguments.epochs}")
    return arguments


def key(arm: str, seed: int) -> str:
    return f"{arm}/{seed}"


def prepare(folder: Path) -> None:
    """Dataset, plan and preprocessed cases, for all arms the same."""
    import nnssl_adapt as na
    from nnssl_adapt import demo

    demo.make_demo_dataset(folder / "nnUNet_raw")
    checkpoint = na.open_checkpoint(demo.demo_checkpoint())
    plan = na.make_plan(demo.DATASET_NAME, checkpoint, mode="like_pretrained", name=PLAN_NAME, workers=1)
    plan = plan.replaced(patch_size=PATCH)
    plan.save()
    na.preprocess_dataset(plan, workers=1)
    print(plan)


def find_plan() -> Any:
    import nnssl_adapt as na
    from nnssl_adapt import demo

    (path,) = (Path(os.environ["nnUNet_preprocessed"]) / demo.DATASET_NAME).glob(f"ptPlans__{PLAN_NAME}____*.json")
    return na.FinetunePlan.load(path)


def earlier_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if {**content["settings"], "seeds": None} != {**settings, "seeds": None}:
        sys.exit(f"{path} was made with other settings ({content['settings']}): give another folder with -o")
    return dict(content["runs"])


def in_process(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, in a process of its own; its last line is the result."""
    words = [sys.executable, __file__, "-o", arguments.folder, "--run", arm, str(seed)]
    for name in ("seeds", "epochs", "iterations", "validation", "threads"):
        words += [f"--{name}", str(getattr(arguments, name))]
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **threads})
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        sys.exit(f"{arm}, seed {seed} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1])["result"])


# -- one run -----------------------------------------------------------------------------------------------------------


def train(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Dice of the validation, the pseudo-Dice and training loss of each epoch, and the seconds of the training."""
    import torch

    torch.set_num_threads(arguments.threads)
    return train_theirs(seed, arguments) if arm == "nnunetv2" else train_ours(arm, seed, arguments)


def train_ours(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import nnssl_adapt as na
    from nnssl_adapt import demo

    recipe = na.Recipe.for_trainer_name("nnUNetTrainerNoMirroring") if arm == "ours" else na.Recipe.load("tiny_cpu")
    recipe = recipe.override(
        epochs=arguments.epochs,
        iterations_per_epoch=arguments.iterations,
        validation_iterations=arguments.validation,
        patch_size=None,  # the plan's
        seed=seed,
        trainer_name=f"Gain_{arm}",
        checkpoint_every=arguments.epochs,
    )
    trainer = na.PretrainedTrainer(
        find_plan(),
        fold=seed,
        recipe=recipe,
        device="cpu",
        checkpoint=demo.demo_checkpoint() if arm == "pretrained" else None,
        from_scratch=arm != "pretrained",
        workers=0,
        progress=False,
    )
    trainer.run()
    assert trainer.summary is not None
    history = trainer.history
    return {
        "dice": trainer.summary.foreground_mean_dice,
        "curve": history.mean_fg_dice,
        "losses": history.train_losses,
        "seconds": sum(history.durations),
    }


def train_theirs(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """nnUNetTrainer with a shorter schedule and without mirroring; everything else is its own."""
    import random

    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class ShortTrainer(nnUNetTrainer):
        def __init__(  # it looks its arguments up by these names
            self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: Any
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = arguments.epochs
            self.num_iterations_per_epoch = arguments.iterations
            self.num_val_iterations_per_epoch = arguments.validation

        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
            *others, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            self.inference_allowed_mirroring_axes = None
            return (*others, None)

    for draw_from in (random.seed, np.random.seed, torch.manual_seed):
        draw_from(seed)
    plan = find_plan()
    dataset_json = json.loads((plan.dataset_folder / "dataset.json").read_text())
    plans = {**json.loads(plan.plans_file.read_text()), "continue_training": False}
    trainer = ShortTrainer(plans, plan.configuration, seed, dataset_json, device=torch.device("cpu"))
    trainer.run_training()
    trainer.perform_actual_validation()
    figures = trainer.logger.get_checkpoint()
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    stamps = zip(figures["epoch_start_timestamps"], figures["epoch_end_timestamps"], strict=True)
    return {
        "dice": summary["foreground_mean"]["Dice"],
        "curve": [float(value) for value in figures["mean_fg_dice"]],
        "losses": [float(value) for value in figures["train_losses"]],
        "seconds": sum(end - start for start, end in stamps),
    }


# -- what came out -----------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of a sample)."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def report(results: dict[str, Any], arms: list[str], arguments: argparse.Namespace) -> None:
    import torch

    seeds = range(arguments.seeds)
    print(
        f"\n{arguments.seeds} seeds, {arguments.epochs} epochs of {arguments.iterations} steps, patch {PATCH}; torch "
        f"{torch.__version__}, {platform.processor() or platform.machine()}, {arguments.threads} threads"
    )
    print(f"\n{'arm':<12}{'Dice, mean ± sd':<22}{'each seed':<30}{'pseudo-Dice after 1 epoch':<28}seconds of training")
    for arm in arms:
        runs = [results[key(arm, seed)] for seed in seeds]
        each = " ".join(f"{run['dice']:.4f}" for run in runs)
        early = spread([run["curve"][0] for run in runs])
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"{arm:<12}{spread([run['dice'] for run in runs]):<22}{each:<30}{early:<28}{seconds:.0f}")
    print()
    for one, other in PAIRS:
        if one in arms and other in arms:
            differences = [results[key(one, seed)]["dice"] - results[key(other, seed)]["dice"] for seed in seeds]
            each = " ".join(f"{difference:+.4f}" for difference in differences)
            print(f"{one} - {other}: {spread(differences)}  ({each})")


def draw(results: dict[str, Any], arms: list[str], seeds: int, path: Path) -> None:
    """Pseudo-Dice over the epochs (mean, and from lowest to highest), and the Dice of the real validation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours = dict(zip(ARMS, ("tab:blue", "tab:orange", "tab:green", "tab:gray"), strict=True))
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, arm in enumerate(arms):
        runs = [results[key(arm, seed)] for seed in range(seeds)]
        curves = [run["curve"] for run in runs]
        epochs = range(1, len(curves[0]) + 1)
        columns = list(zip(*curves, strict=True))
        left.plot(epochs, [statistics.mean(column) for column in columns], color=colours[arm], marker=".", label=arm)
        left.fill_between(
            epochs, [min(c) for c in columns], [max(c) for c in columns], color=colours[arm], alpha=0.15, linewidth=0
        )
        dice = [run["dice"] for run in runs]
        right.scatter([place] * len(dice), dice, color=colours[arm], s=18)
        right.hlines(statistics.mean(dice), place - 0.25, place + 0.25, color=colours[arm])
    left.set(xlabel="epochs of training", ylabel="pseudo-Dice (random patches)", title="while training: mean and range")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    right.set_xticks(range(len(arms)), arms)
    right.set_xlim(-0.6, len(arms) - 0.4)
    right.set(ylabel="Dice (whole images)", title="after it: each seed and mean")
    right.grid(axis="y", alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
