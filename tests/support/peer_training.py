"""What nnU-Net's users do before us: its planning, preprocessing and (very short) training, by its own code.

Run as a script: ``python peer_training.py DATASET_ID [CONFIGURATION]``, with nnU-Net's variables set. A process of its own, as
nnU-Net changes global state (threads, multiprocessing, determinism).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is run as a script


def main(dataset: str, configuration: str = "3d_fullres") -> None:
    os.environ["nnUNet_n_proc_DA"] = "1"  # planning wants at least one
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.run.run_training import get_trainer_from_args
    from support.peer_threads import pool_threads
    from support.quick_planning import count_without_weights, draw_few

    torch.set_num_threads(1)
    pool_threads()
    number = int(dataset)
    draw_few()
    extract_fingerprints([number], num_processes=1, show_progress_bar=False)
    count_without_weights()
    plan_experiments([number])
    make_network_tiny(number, configuration)
    preprocess([number], configurations=[configuration], num_processes=[1], show_progress_bar=False)

    os.environ["nnUNet_n_proc_DA"] = "0"  # batches are made in this process
    torch.manual_seed(0)
    trainer = get_trainer_from_args(dataset, configuration, 0, device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 6, 1
    trainer.run_training()


def make_network_tiny(number: int, configuration: str = "3d_fullres") -> None:
    """Few features instead of 32 to 320; everything else as it was planned."""
    (path,) = Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{number:03d}_*/nnUNetPlans.json")
    plans = json.loads(path.read_text())
    arguments = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4 + 2 * stage for stage in range(arguments["n_stages"])]
    path.write_text(json.dumps(plans, indent=4))


if __name__ == "__main__":
    main(*sys.argv[1:])
