"""Networks, patches and batches planned here, against those of released nnU-Net's planners, dataset by dataset."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.synthetic import make_dataset

pytest.importorskip("nnunetv2")

from nnssl_adapt.geometry.spacing import median_spacing, resampled_shape
from nnssl_adapt.planning.topology import low_resolution, needs_low_resolution, plan_network
from nnssl_adapt.weights.network.architectures import Architecture

# Median spacing (mm) and shape (voxels) of a dataset, its cases, its labels, and the ResEnc preset it is planned with too.
TABLE = [
    ((1, 1, 1), (138, 170, 138), 484, 4, "ResEncM"),  # brains
    ((1, 1, 1), (182, 218, 182), 20, 3, "ResEncL"),
    ((1, 1, 1), (240, 240, 240), 600, 2, "ResEncXL"),
    ((1, 1, 1), (36, 50, 35), 260, 3, "ResEncM"),  # hippocampus
    ((1.2, 1, 1), (60, 62, 64), 12, 3, "ResEncL"),
    ((5, 1.56, 1.56), (10, 237, 208), 200, 4, "ResEncL"),  # heart
    ((10, 1.4, 1.4), (9, 256, 216), 100, 4, "ResEncM"),
    ((1.37, 1.25, 1.25), (115, 320, 232), 20, 2, "ResEncXL"),
    ((3.6, 0.62, 0.62), (20, 320, 319), 32, 3, "ResEncM"),  # prostate
    ((3, 0.6, 0.6), (20, 384, 384), 50, 2, "ResEncXL"),
    ((1, 0.77, 0.77), (432, 512, 512), 131, 3, "ResEncL"),  # abdomen
    ((2.5, 0.8, 0.8), (93, 512, 512), 281, 3, "ResEncM"),
    ((5, 0.79, 0.79), (49, 512, 512), 303, 3, "ResEncXL"),
    ((3, 0.76, 0.76), (148, 512, 512), 30, 14, "ResEncL"),
    ((0.78, 0.78, 0.78), (527, 512, 512), 489, 4, "ResEncXL"),
    ((1.24, 0.79, 0.79), (252, 512, 512), 63, 2, "ResEncM"),  # lungs
    ((0.7, 0.7, 0.7), (400, 400, 400), 5, 105, "ResEncXL"),
    ((0.8, 0.8, 0.8), (900, 320, 64), 100, 2, "ResEncL"),  # spines, in any order of axes
    ((0.5, 0.8, 3.3), (320, 900, 15), 80, 9, "ResEncM"),
    ((0.9, 4.4, 0.9), (384, 18, 380), 45, 12, "ResEncL"),
    ((2, 1, 1), (100, 205, 198), 7, 2, "ResEncM"),  # spacings at and around a factor of two
    ((2.01, 1, 1), (100, 205, 198), 7, 2, "ResEncL"),
    ((1.99, 1, 1), (100, 205, 198), 7, 2, "ResEncXL"),
    ((4, 2, 1), (64, 128, 256), 15, 5, "ResEncM"),
    ((8.1, 4, 0.99), (33, 57, 301), 15, 5, "ResEncL"),
    ((6, 0.4, 0.4), (30, 1024, 1024), 25, 2, "ResEncL"),  # very fine planes
    ((0.1, 0.1, 0.1), (160, 700, 900), 4, 3, "ResEncM"),
    ((12, 1, 1), (5, 180, 160), 33, 3, "ResEncM"),  # hardly 3D
    ((3, 3, 3), (16, 20, 24), 9, 2, "ResEncL"),
    ((1, 1.1, 1.3), (13, 40, 17), 3, 3, "ResEncM"),
    ((0.33, 0.51, 0.74), (221, 133, 97), 11, 7, "ResEncXL"),
    ((7, 3, 2), (25, 61, 145), 18, 31, "ResEncL"),
    ((1, 1, 1), (512, 12, 512), 21, 2, "ResEncM"),
    ((2.7, 2.7, 2.7), (128, 64, 31), 2, 2, "ResEncXL"),
    ((999, 1, 1), (1, 480, 640), 90, 3, "ResEncM"),  # pictures
    ((999, 1, 1), (1, 130, 61), 7, 2, "ResEncXL"),
]

WITH_SLICES = 5
"""Of every so many rows, and of pictures, the 2D network is compared as well; nnU-Net takes long for these."""


def has_planar(number: int) -> bool:
    return number % WITH_SLICES == 0 or TABLE[number][1][0] == 1


PLANNING = """
import contextlib, io, json, sys
from pathlib import Path
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as residual
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from support.quick_planning import count_without_weights

count_without_weights()
planar = False
for planner in (ExperimentPlanner, residual.ResEncUNetPlanner):
    def some(self, spacing, *rest, plan=planner.get_plans_for_configuration):
        return plan(self, spacing, *rest) if planar or len(spacing) == 3 else {}
    planner.get_plans_for_configuration = some

raw, folder = (Path(root) / "Dataset991_Tiny" for root in (nnUNet_raw, nnUNet_preprocessed))
plans = []
for row in json.loads(Path(sys.argv[1]).read_text()):
    planar = row["planar"]
    (raw / "dataset.json").write_text(json.dumps(row["dataset_json"]))
    (folder / "dataset_fingerprint.json").write_text(json.dumps(row["fingerprint"]))
    for planner in (ExperimentPlanner, getattr(residual, "nnUNetPlanner" + row["preset"])):
        with contextlib.redirect_stdout(io.StringIO()):
            plans.append(planner(991).plan_experiment())
Path(sys.argv[2]).write_text(json.dumps(plans))
"""


def dataset_of(row, number):
    """Fingerprint and dataset.json: cases that vary about the row's spacing and shape."""
    spacing, shape, cases, labels, preset = row
    random = np.random.default_rng(number)
    shown = 5  # the median is of these; nnU-Net takes the number of cases from dataset.json
    fingerprint = {
        "spacings": [
            [float(s) for s in spacing],
            *(np.array(spacing) * random.uniform(0.93, 1.08, (shown - 1, 3))).tolist(),
        ],
        "shapes_after_crop": (np.array(shape) * random.uniform(0.85, 1.15, (shown, 3))).astype(int).clip(1).tolist(),
        "foreground_intensity_properties_per_channel": {"0": {}},
        "median_relative_size_after_cropping": 1.0,
    }
    names = ["background", *(f"organ {label}" for label in range(1, labels))]
    dataset_json = {
        "channel_names": {"0": "T1"},
        "labels": {name: label for label, name in enumerate(names)},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    return {"fingerprint": fingerprint, "dataset_json": dataset_json, "preset": preset, "planar": has_planar(number)}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Each row's data, with nnU-Net's default plan and that of the row's preset."""
    root = tmp_path_factory.mktemp("topology")
    folders = {f"nnUNet_{part}": str(root / part) for part in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        os.makedirs(folder)  # noqa: PTH103
    raw = make_dataset(root / "raw", cases=2)
    (root / "preprocessed" / raw.name).mkdir()
    rows = [dataset_of(row, number) for number, row in enumerate(TABLE)]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "planning.py").write_text(PLANNING)
    calm = {**os.environ, **folders, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    calm["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [
        sys.executable,
        "-W",
        "ignore",
        *(str(root / name) for name in ("planning.py", "rows.json", "plans.json")),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=calm)
    assert result.returncode == 0, result.stderr[-3000:]
    plans = json.loads((root / "plans.json").read_text())
    return [SimpleNamespace(**row, plans=plans[2 * i : 2 * i + 2]) for i, row in enumerate(rows)]


@pytest.mark.parametrize("number", range(len(TABLE)), ids=[str(row[:2]) for row in TABLE])
def test_planned_as_by_nnunet(planned, number):
    row = planned[number]
    spacings, shapes = row.fingerprint["spacings"], row.fingerprint["shapes_after_crop"]
    target = median_spacing(spacings, shapes)
    resampled = [resampled_shape(shape, spacing, target) for shape, spacing in zip(shapes, spacings, strict=True)]
    for preset, plan in zip(("default", row.preset), row.plans, strict=True):
        if resampled[0][0] == 1:
            continue  # pictures, for which there is no 3D network
        theirs = plan["configurations"]["3d_fullres"]
        forward = plan["transpose_forward"]
        spacing = [target[axis] for axis in forward]
        median = np.median(resampled, axis=0)[forward]
        labels = len(row.dataset_json["labels"])
        ours = plan_network(preset, spacing, median, labels, float(np.prod(median)) * row.dataset_json["numTraining"])
        assert theirs["spacing"] == spacing
        assert (theirs["patch_size"], theirs["batch_size"]) == (list(ours.patch_size), ours.batch_size)
        assert Architecture.from_plans_dict(theirs["architecture"]) == ours.architecture
        assert theirs["batch_dice"] == needs_low_resolution(preset, spacing, median, labels)
        coarse = low_resolution(preset, spacing, median, labels)
        if (
            not coarse.is_worth_it
        ):  # and neither for nnU-Net, by the line above; a file of an earlier row may still have one
            continue
        low = plan["configurations"]["3d_lowres"]
        voxels = float(np.prod(coarse.median_shape)) * row.dataset_json["numTraining"]
        ours = plan_network(preset, coarse.spacing, coarse.rounded_shape, labels, voxels)
        assert (low["spacing"], low["median_image_size_in_voxels"]) == (
            list(coarse.spacing),
            list(coarse.rounded_shape),
        )
        assert (low["patch_size"], low["batch_size"]) == (list(ours.patch_size), ours.batch_size)
        assert Architecture.from_plans_dict(low["architecture"]) == ours.architecture


@pytest.mark.parametrize("number", [*filter(has_planar, range(len(TABLE)))])
def test_networks_of_slices_are_planned_as_by_nnunet(planned, number):
    row = planned[number]
    spacings, shapes = row.fingerprint["spacings"], row.fingerprint["shapes_after_crop"]
    target = median_spacing(spacings, shapes)
    resampled = [resampled_shape(shape, spacing, target) for shape, spacing in zip(shapes, spacings, strict=True)]
    for preset, plan in zip(("default", row.preset), row.plans, strict=True):
        theirs, forward = plan["configurations"]["2d"], plan["transpose_forward"]
        spacing = [target[axis] for axis in forward][1:]
        median = np.median(resampled, axis=0)[forward]
        voxels = float(np.prod(median)) * row.dataset_json["numTraining"]
        ours = plan_network(preset, spacing, median[1:], len(row.dataset_json["labels"]), voxels)
        assert theirs["spacing"] == spacing
        assert (theirs["patch_size"], theirs["batch_size"]) == (list(ours.patch_size), ours.batch_size)
        assert Architecture.from_plans_dict(theirs["architecture"]) == ours.architecture


def test_the_table_is_worth_its_name(planned):
    """Patches, depths, kernels, batches and Dice settings of many kinds."""
    found = [plan["configurations"] for row in planned for plan in row.plans]
    configurations = [entries["3d_fullres"] for entries in found if "3d_fullres" in entries]
    networks = [configuration["architecture"]["arch_kwargs"] for configuration in configurations]
    assert len(planned) >= 30
    assert len({tuple(configuration["patch_size"]) for configuration in configurations}) > 30
    assert len({configuration["batch_size"] for configuration in configurations}) > 4
    assert len({network["n_stages"] for network in networks}) >= 4
    assert {configuration["batch_dice"] for configuration in configurations} == {True, False}
    assert any([1, 3, 3] in network["kernel_sizes"] for network in networks)
    assert len({json.dumps(network["strides"]) for network in networks}) > 15
