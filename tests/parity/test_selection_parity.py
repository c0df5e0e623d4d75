"""Ensembles, postprocessing and the choice of the best model against nnU-Net's, on the same folders."""

import contextlib
import io
import itertools
import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from support.crossval_folders import (
    DATASET,
    LABELS,
    REGIONS,
    SPACING,
    description,
    noisy_outputs,
    write_case,
    write_model,
    write_references,
)
from support.model_folders import plans_content
from support.synthetic import write_image

pytest.importorskip("nnunetv2")

import nnunetv2.evaluation.accumulate_cv_results as peer_accumulate
import nnunetv2.evaluation.find_best_configuration as peer_best
import nnunetv2.utilities.dataset_name_id_conversion as peer_names
import nnunetv2.utilities.file_path_utilities as peer_paths
from nnunetv2.ensembling.ensemble import ensemble_folders as peer_ensemble
from nnunetv2.postprocessing import remove_connected_components as peer_postprocessing

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.evaluation.instructions import instructions_text
from nnssl_adapt.evaluation.postprocessing import determine_postprocessing
from nnssl_adapt.evaluation.selection import find_best, information, save_selection
from nnssl_adapt.inference.ensemble import ensemble_folders
from nnssl_adapt.inference.postprocess import Postprocessing, keep_largest_component, postprocess_folder

SCHEMES = {"labels": LABELS, "regions": REGIONS}


class OneProcess:
    """What nnU-Net uses of a context and its pool, done right here."""

    def Pool(self, processes):
        return contextlib.nullcontext(self)

    def starmap(self, function, arguments):
        return list(itertools.starmap(function, arguments))


@pytest.fixture
def peer(monkeypatch):
    """nnU-Net's functions without the seconds that each of its pools of fresh processes takes to start."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind=None: OneProcess())


@pytest.fixture
def peer_folders(nnunet_folders, peer, monkeypatch):
    """nnU-Net reads its folders' names when it is imported."""
    for module in (peer_accumulate, peer_best, peer_names, peer_paths):
        for part in ("raw", "preprocessed", "results"):
            if hasattr(module, f"nnUNet_{part}"):
                monkeypatch.setattr(module, f"nnUNet_{part}", str(nnunet_folders / f"nnUNet_{part}"))
    return nnunet_folders


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def quietly(function, *arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **options)


def same_labels(ours, theirs):
    names = sorted(path.name for path in theirs.glob("*.nii.gz"))
    assert names and names == sorted(path.name for path in ours.glob("*.nii.gz"))
    for name in names:
        assert np.array_equal(read(ours / name), read(theirs / name)), name
        a, b = sitk.ReadImage(str(ours / name)), sitk.ReadImage(str(theirs / name))
        assert a.GetPixelID() == b.GetPixelID() and a.GetSpacing() == b.GetSpacing() and a.GetOrigin() == b.GetOrigin()


# -- ensembles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("members", [2, 3])
def test_ensembles_are_identical(kind, members, tmp_path, peer):
    content, heads = SCHEMES[kind], 4 if kind == "labels" else 3
    scheme = LabelScheme.from_dataset_json(content)
    references = write_references(tmp_path)
    folders = [tmp_path / f"member_{n}" for n in range(members)]
    for number, folder in enumerate(folders):
        for name in "ab":
            seed = 10 * number + ord(name)
            outputs = noisy_outputs(references[name], scheme, [0.8] * heads, seed).astype(
                np.float16 if number == 1 else np.float32
            )
            write_case(folder, name, outputs, scheme)
        (folder / "dataset.json").write_text(json.dumps(description(content)))
        (folder / "plans.json").write_text(json.dumps(plans_content()))
    peer_ensemble([str(folder) for folder in folders], str(tmp_path / "theirs"), True, 1)
    ensemble_folders(folders, tmp_path / "ours", save_probabilities=True)
    same_labels(tmp_path / "ours", tmp_path / "theirs")
    assert not np.array_equal(read(tmp_path / "ours" / "a.nii.gz"), read(folders[0] / "a.nii.gz"))
    for name in "ab":
        ours, theirs = (np.load(tmp_path / side / f"{name}.npz")["probabilities"] for side in ("ours", "theirs"))
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    # And theirs can be averaged further by us.
    ensemble_folders([tmp_path / "theirs", folders[0]], tmp_path / "again", dataset_json=folders[0] / "dataset.json")
    assert (tmp_path / "again" / "b.nii.gz").is_file()


# -- postprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("values", [(1,), (2, 3), (1, 2, 3), (7,)])
def test_the_largest_component_is_the_same(seed, values):
    labels = np.random.default_rng(seed).choice(5, (9, 14, 20), p=[0.75, 0.1, 0.05, 0.05, 0.05]).astype(np.uint8)
    before = labels.copy()
    theirs = peer_postprocessing.remove_all_but_largest_component_from_segmentation(labels, list(values))
    assert np.array_equal(keep_largest_component(labels, values), theirs)
    assert np.array_equal(labels, before)


ISLANDS = {"everything": (1, 2, 3), "everything, then a class": (1, -2), "classes": (-2, -3), "nothing": ()}
STEPS = {
    "labels": {
        "everything": ((1, 2, 3),),
        "everything, then a class": ((1, 2, 3), (2,)),
        "classes": ((2,), (3,)),
        "nothing": (),
    },
    "regions": {
        "everything": ((1, 2, 3),),
        "everything, then a class": ((1, 2, 3), (2, 3)),
        "classes": ((2, 3),),
        "nothing": (),
    },
}


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("islands", ISLANDS)
def test_postprocessing_is_decided_alike(kind, islands, tmp_path, peer):
    content = SCHEMES[kind]
    scheme = LabelScheme.from_dataset_json(content)
    references = write_references(tmp_path)
    noise = [0.05] * scheme.num_heads
    folder = tmp_path / "theirs"
    for number, name in enumerate("abcde"):
        write_case(folder, name, noisy_outputs(references[name], scheme, noise, number, ISLANDS[islands]), scheme)
    (folder / "dataset.json").write_text(json.dumps(description(content)))
    (folder / "plans.json").write_text(json.dumps(plans_content()))
    shutil.copytree(folder, tmp_path / "ours")
    truth = tmp_path / "nnUNet_preprocessed" / DATASET / "gt_segmentations"
    functions, _ = quietly(peer_postprocessing.determine_postprocessing, str(folder), str(truth), None, None, 1)
    decision = determine_postprocessing(tmp_path / "ours", truth, scheme, ".nii.gz")
    assert decision.postprocessing == Postprocessing.load(folder / "postprocessing.pkl")
    assert decision.postprocessing == Postprocessing.load(folder / "postprocessing.json")
    assert len(decision.postprocessing.steps) == len(functions)
    assert decision.postprocessing.steps == STEPS[kind][islands]
    same_labels(tmp_path / "ours" / "postprocessed", folder / "postprocessed")
    ours, theirs = (json.loads((place / "postprocessing.json").read_text()) for place in (tmp_path / "ours", folder))
    assert ours.keys() == theirs.keys()
    assert json.dumps([ours["input_folder"], ours["postprocessed"]], sort_keys=True) == json.dumps(
        [theirs["input_folder"], theirs["postprocessed"]], sort_keys=True
    )
    # nnU-Net loads our pickle and does the same with it; so do we with both.
    loaded, options = pickle.loads((tmp_path / "ours" / "postprocessing.pkl").read_bytes())
    assert all(
        function is peer_postprocessing.remove_all_but_largest_component_from_segmentation for function in loaded
    )
    applied = tmp_path / "applied"
    peer_postprocessing.apply_postprocessing_to_folder(str(folder), str(applied), loaded, options, num_processes=1)
    same_labels(folder / "postprocessed", applied)
    steps = Postprocessing.load(folder / "postprocessing.pkl")
    postprocess_folder(folder, tmp_path / "applied_by_us", steps, ".nii.gz")
    same_labels(tmp_path / "applied_by_us", applied)


IGNORE = {"labels": {**LABELS["labels"], "ignore": 4}}
REGIONS_AND_IGNORE = {**REGIONS, "labels": {**REGIONS["labels"], "ignore": 4}}


def blob_with_mistakes(random):
    """A reference (Z, Y, X) of nested labels around a random place, and a prediction with boxes of wrong labels in it."""
    shape = (10, 16, 20)
    axes = zip(np.indices(shape), (random.uniform(3, n - 3) for n in shape), (1, 1.5, 2), strict=True)
    heights = -sum(((place - centre) / width) ** 2 for place, centre, width in axes)
    heights = heights + random.uniform(0, 3) * random.normal(size=shape)
    reference = np.digitize(heights, np.quantile(heights, [0.8, 0.9, 0.96])).astype(np.uint8)
    prediction = reference.copy()
    for _ in range(random.integers(0, 6)):
        z, y, x = (int(random.integers(0, n - 3)) for n in shape)
        prediction[z : z + 2, y : y + 3, x : x + 3] = random.integers(0, 4)
    return reference, prediction


@pytest.mark.parametrize("seed", range(12))
def test_postprocessing_of_anything_is_decided_alike(seed, tmp_path, peer):
    random = np.random.default_rng(seed)
    content = (LABELS, REGIONS, IGNORE, REGIONS_AND_IGNORE)[seed % 4]
    scheme = LabelScheme.from_dataset_json(content)
    for part in ("truth", "theirs"):
        (tmp_path / part).mkdir()
    for name in "abc":
        reference, prediction = blob_with_mistakes(random)
        if scheme.ignore_label is not None:
            reference[:, :4, :4] = scheme.ignore_label
        write_image(tmp_path / "truth" / f"{name}.nii.gz", reference, SPACING)
        write_image(tmp_path / "theirs" / f"{name}.nii.gz", prediction, SPACING)
    (tmp_path / "theirs" / "dataset.json").write_text(json.dumps(description(content)))
    (tmp_path / "theirs" / "plans.json").write_text(json.dumps(plans_content()))
    shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    folders = str(tmp_path / "theirs"), str(tmp_path / "truth")
    quietly(peer_postprocessing.determine_postprocessing, *folders, None, None, 1)
    decision = determine_postprocessing(tmp_path / "ours", tmp_path / "truth", scheme, ".nii.gz")
    assert decision.postprocessing == Postprocessing.load(tmp_path / "theirs" / "postprocessing.pkl")
    same_labels(tmp_path / "ours" / "postprocessed", tmp_path / "theirs" / "postprocessed")


# -- the best model ----------------------------------------------------------------------------------------------------

NAMES = ("nnUNetTrainer__nnUNetPlans__3d_fullres", "nnUNetTrainer__otherPlans__3d_fullres")
SCENES = {  # noise of the outputs of either model
    "an ensemble": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "the second": ((0.9, 0.9, 0.9, 0.9), (0.01, 0.01, 0.01, 0.01)),
    "a tie": ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
}
WINNERS = {"an ensemble": "ensemble___", "the second": NAMES[1], "a tie": NAMES[0]}


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("scene", SCENES)
def test_the_same_model_is_chosen(kind, scene, peer_folders):
    noises = dict(zip(NAMES, SCENES[scene], strict=True))
    best = check_the_same_is_chosen(kind, noises, (["3d_fullres"], ["nnUNetPlans", "otherPlans"]), peer_folders)
    assert best.name.startswith(WINNERS[scene])


CONFIGURATIONS = ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
GOOD, BAD, FAIR = (0.01,) * 4, (8.0,) * 4, (4.0,) * 4
SCENES_OF_CONFIGURATIONS = {  # noise of each, and what is the best
    "the cascade": ((BAD, FAIR, BAD, GOOD), "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres"),
    "an ensemble": (((1, 1, 1, 1),) * 4, "ensemble___"),
    "a tie": (((0.0,) * 4,) * 4, "nnUNetTrainer__nnUNetPlans__2d"),
}


@pytest.mark.parametrize("scene", SCENES_OF_CONFIGURATIONS)
def test_the_same_configuration_is_chosen(scene, peer_folders):
    """All that nnU-Net has, slices and a cascade with its first stage, and their ensembles."""
    noises, winner = SCENES_OF_CONFIGURATIONS[scene]
    named = {f"nnUNetTrainer__nnUNetPlans__{name}": noise for name, noise in zip(CONFIGURATIONS, noises, strict=True)}
    best = check_the_same_is_chosen("labels", named, (CONFIGURATIONS, ["nnUNetPlans"]), peer_folders)
    assert best.name.startswith(winner)


def check_the_same_is_chosen(kind, noises, configurations_and_plans, peer_folders):
    references = write_references(peer_folders)
    heads = 4 if kind == "labels" else 3
    for seed, (name, noise) in enumerate(noises.items(), start=1):
        write_model(peer_folders, name, SCHEMES[kind], references, noise[:heads], seed, islands=(2,))
    results = peer_folders / "nnUNet_results" / DATASET
    theirs = quietly(
        peer_best.find_best_configuration,
        DATASET,
        peer_best.dumb_trainer_config_plans_to_trained_models_dict(["nnUNetTrainer"], *configurations_and_plans),
        num_processes=1,
        folds=(0, 1, 2),
    )
    peers_files = peer_folders / "theirs"
    shutil.copytree(results, peers_files)
    for path in [*results.glob("*/crossval_results*"), results / "ensembles"]:
        shutil.rmtree(path)
    selection = find_best(991)
    path = save_selection(selection, instructions_text(selection))
    ours = json.loads(path.read_text())
    assert ours == json.loads(json.dumps(information(selection)))
    expected = json.loads((peers_files / "inference_information.json").read_text())
    assert ours == expected | {"folds": [0, 1, 2]}
    assert ours["all_results"] == theirs["all_results"]
    for folder in (candidate.folder for candidate in selection.candidates):
        peers = peers_files / folder.relative_to(results)
        same_labels(folder, peers)
        assert (
            json.loads((folder / "summary.json").read_text())["mean"]
            == (json.loads((peers / "summary.json").read_text())["mean"])
        )
    best = selection.best.folder
    same_labels(best / "postprocessed", peers_files / best.relative_to(results) / "postprocessed")
    # nnU-Net's own instructions can be printed from our file.
    quietly(peer_best.print_inference_instructions, ours)
    return selection.best
