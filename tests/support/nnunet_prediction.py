"""nnU-Net's prediction by its own predictor, in this process: its command starts several, each of which imports nnU-Net."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch


def predict_by_nnunet(
    model: str | Path,
    images: str | Path,
    output: str | Path,
    folds: Sequence[int] = (0,),
    *,
    first: str | Path | None = None,
    trainers: str | Path | None = None,
    probabilities: bool = False,
) -> torch.nn.Module:
    """Predict as nnU-Net does: its trainers give the network, and its sums are in float16.

    ``first`` has the segmentations of a cascade's first stage, ``trainers`` a ``trainer_class.py``. Returns the network that
    it built.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    threads = torch.get_num_threads()
    found = {} if trainers is None else {"nnUNet_extTrainer": str(trainers)}
    try:
        with mock.patch.dict(os.environ, found):
            predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(model), tuple(folds))
            Path(output).mkdir(exist_ok=True)
            given = None if first is None else str(first)
            predictor.predict_from_files_sequential(
                str(images), str(output), save_probabilities=probabilities, folder_with_segs_from_prev_stage=given
            )
            return predictor.network
    finally:
        torch.set_num_threads(threads)  # nnU-Net takes all it finds
