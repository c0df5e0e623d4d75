"""Cross-validation results as training leaves them: models of known quality, label files and probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from support.model_folders import plans_content
from support.synthetic import write_image

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.inference.export import write_probabilities

SPACING = (3.0, 1.2, 0.8)
DATASET = "Dataset991_Tiny"
FOLDS = {0: ("a", "d"), 1: ("b", "e"), 2: ("c",)}

LABELS = {"labels": {"background": 0, "core": 1, "rim": 2, "shell": 3}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "inner": [2, 3], "tip": 3}, "regions_class_order": [1, 2, 3]}


def description(scheme):
    return {"channel_names": {"0": "MR"}, "numTraining": 5, "file_ending": ".nii.gz", **scheme}


def write_references(root: Path) -> dict[str, np.ndarray]:
    """gt_segmentations and labelsTr of five cases of different shapes; returns the labels (Z, Y, X).

    Label 1 is around 2, which is around 3; a second, smaller piece of 3 lies in 1.
    """
    references = {}
    for number, name in enumerate("abcde"):
        labels = np.zeros((12 + number, 26, 33 - number), np.uint8)
        labels[1:9, 2:20, 2:24] = 1
        labels[2:8, 4:16, 4 : 16 + number // 2] = 2
        labels[3:7, 6:13, 6:13] = 3
        labels[3:5, 17:19, 19:22] = 3
        references[name] = labels
        for folder in (
            root / "nnUNet_preprocessed" / DATASET / "gt_segmentations",
            root / "nnUNet_raw" / DATASET / "labelsTr",
        ):
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"{name}.nii.gz", references[name], SPACING)
    return references


def noisy_outputs(reference, scheme: LabelScheme, noise, seed, islands=()):
    """Probabilities (K, Z, Y, X) around a reference.

    ``noise``: one amplitude an output. ``islands``: false blobs of these label values in the corner that has no foreground;
    of negative ones within label 1.
    """
    random = np.random.default_rng(seed)
    truth = reference.copy()
    for value in islands:
        if value > 0:
            truth[-3:, -4:-1, -(3 + 2 * value) : -(1 + 2 * value)] = value
        else:
            truth[5 : 6 - value, 17:19, 3 + 5 * -value : 7 + 5 * -value] = -value
    values = scheme.regions if scheme.has_regions else scheme.all_labels
    logits = np.stack([np.where(np.isin(truth, entry), 2.0, -2.0) for entry in values])
    for head, amplitude in enumerate(noise):
        logits[head] += amplitude * 10 * gaussian_filter(random.normal(size=reference.shape), (1, 2, 2))
    if scheme.has_regions:
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    powers = np.exp(logits)
    return (powers / powers.sum(0)).astype(np.float32)


def labels_of(probabilities, scheme: LabelScheme):
    if not scheme.has_regions:
        return probabilities.argmax(0).astype(np.uint8)
    labels = np.zeros(probabilities.shape[1:], np.uint8)
    for probability, value in zip(probabilities, scheme.regions_class_order, strict=True):
        labels[probability > 0.5] = value
    return labels


def write_case(folder: Path, name: str, probabilities, scheme: LabelScheme) -> None:
    """One predicted case: ``.nii.gz``, ``.npz``, ``.pkl``."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = labels_of(probabilities, scheme)
    write_image(folder / f"{name}.nii.gz", labels, SPACING)
    image = sitk.ReadImage(str(folder / f"{name}.nii.gz"))
    geometry = ImageGeometry(SPACING, image.GetOrigin(), image.GetDirection(), labels.shape)
    write_probabilities(folder / name, probabilities, geometry.to_properties())


def write_model(root: Path, name: str, scheme_content, references, noise, seed=0, islands=()) -> Path:
    """A trained model with three validated folds, and its plans where nnU-Net looks for them."""
    scheme = LabelScheme.from_dataset_json(scheme_content)
    model = root / "nnUNet_results" / DATASET / name
    _, plans_name, configuration = name.split("__")
    content = plans_content(transpose=(0, 1, 2))
    content["plans_name"] = plans_name
    planned = root / "nnUNet_preprocessed" / DATASET / f"{plans_name}.json"
    others = json.loads(planned.read_text())["configurations"] if planned.is_file() else {}
    content["configurations"] = {**others, configuration: content["configurations"]["3d_fullres"]}
    for place in (model / "plans.json", planned):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content))
    (model / "dataset.json").write_text(json.dumps(description(scheme_content)))
    for fold, names in FOLDS.items():
        for number, case in enumerate(names):
            probabilities = noisy_outputs(references[case], scheme, noise, 100 * seed + 10 * fold + number, islands)
            write_case(model / f"fold_{fold}" / "validation", case, probabilities, scheme)
    return model
