"""nnU-Net's prediction, in a process of its own: ``python nnunet_prediction.py MODEL IMAGES OUTPUT FOLD…``.

What its command does, by the same predictor, but without the processes that read and write, each of which imports nnU-Net.
"""

import sys
from pathlib import Path

import torch


def predict(model: str, images: str, output: str, folds: list[str]) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, tuple(map(int, folds)))
    Path(output).mkdir(exist_ok=True)
    predictor.predict_from_files_sequential(images, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    predict(*sys.argv[1:4], sys.argv[4:])
