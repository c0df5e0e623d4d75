"""Tiny datasets of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_picture_dataset(folder: Path, cases: int = 6, height: int = 44, width: int = 60) -> Path:
    """RGB pictures with a bright square each, which is what is to be segmented; returns the folder."""
    random = np.random.default_rng(7)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for number in range(cases):
        labels = np.zeros((height, width), np.uint8)
        y, x = random.integers(4, height - 16), random.integers(4, width - 16)
        labels[y : y + 12, x : x + 10] = 1
        picture = random.integers(20, 90, (height, width, 3))
        picture[labels > 0] += 120
        Image.fromarray(picture.astype(np.uint8)).save(folder / "imagesTr" / f"cell_{number:02d}_0000.png")
        Image.fromarray(labels).save(folder / "labelsTr" / f"cell_{number:02d}.png")
    content = {
        "channel_names": {"0": "red", "1": "green", "2": "blue"},
        "labels": {"background": 0, "square": 1},
        "numTraining": cases,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
