"""A cascade trained by nnU-Net's own code, from plans and cases that are there already. ``python peer_cascade.py ID PLANS``.

Both folds of the low resolution, whose validation leaves what the cascade sees, then fold 0 of the cascade. A process of its
own, because nnU-Net changes global state.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is run as a script


def main(dataset: str, plans: str) -> None:
    os.environ["nnUNet_n_proc_DA"] = "0"  # batches are made in this process
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args
    from support.peer_threads import pool_threads

    torch.set_num_threads(1)
    pool_threads()
    for configuration, fold in (("3d_lowres", 0), ("3d_lowres", 1), ("3d_cascade_fullres", 0)):
        torch.manual_seed(fold)
        trainer = get_trainer_from_args(
            dataset, configuration, fold, "nnUNetTrainerNoMirroring", plans, device=torch.device("cpu")
        )
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 6, 1
        trainer.run_training()
        trainer.perform_actual_validation()


if __name__ == "__main__":
    main(*sys.argv[1:])
