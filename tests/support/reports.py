"""A trained model folder with a validated fold, as a report is made of it."""

import json

import numpy as np
from support.model_folders import LABELS, write_model_folder
from support.synthetic import write_image

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.evaluation.metrics import evaluate_folder

SHAPE, SPACING = (8, 14, 11), (2.0, 1.0, 1.5)
MODEL = "PretrainedTrainer__ptPlans__mae____X__3d_fullres"


def write_validated_model(folders, names=("case_0", "case_1", "case_2"), labels=LABELS, second_class=False):
    """A model folder below ``folders / "nnUNet_results"`` and its raw dataset beside it; returns the former.

    Each case's prediction is the reference rolled by one voxel more than the last one's. ``second_class``: a part of the
    reference is of class 2.
    """
    folder = write_model_folder(folders / "nnUNet_results", name=MODEL)
    raw = folders / "nnUNet_raw" / "Dataset991_Tiny"
    for needed in (raw / "imagesTr", raw / "labelsTr", folder / "fold_0" / "validation"):
        needed.mkdir(parents=True)
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    random = np.random.default_rng(0)
    for number, name in enumerate(names):
        reference = np.zeros(SHAPE, np.uint8)
        reference[2:6, 3:10, 2:8] = 1
        if second_class:
            reference[3:5, 4:6, 3:6] = 2
        predicted = np.roll(reference, number, axis=1)
        image = random.normal(size=SHAPE).astype(np.float32)
        write_image(raw / "imagesTr" / f"{name}_0000.nii.gz", image, SPACING)
        write_image(raw / "labelsTr" / f"{name}.nii.gz", reference, SPACING)
        write_image(folder / "fold_0" / "validation" / f"{name}.nii.gz", predicted, SPACING)
    evaluate_folder(
        folder / "fold_0" / "validation",
        raw / "labelsTr",
        LabelScheme.from_dataset_json({"labels": labels}),
        ".nii.gz",
        output=folder / "fold_0" / "validation" / "summary.json",
    )
    return folder
