"""Raw data in, the same preprocessed data out as from nnunetv2, and each reads the other's files."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from support.peer_preprocessing import Z_SCORE, assert_same_locations, plans_of, settings
from support.synthetic import make_dataset

nnunetv2 = pytest.importorskip("nnunetv2")

from nnssl_adapt.data.arrays import piece_shapes  # noqa: E402
from nnssl_adapt.data.dataset import RawDataset  # noqa: E402
from nnssl_adapt.data.labels import LabelScheme  # noqa: E402
from nnssl_adapt.data.preprocess import (  # noqa: E402
    PreprocessSettings,
    ResamplingRule,
    class_locations,
    preprocess_case,
)
from nnssl_adapt.data.preprocess_cases import preprocess_cases  # noqa: E402
from nnssl_adapt.data.splits import crossval_splits  # noqa: E402
from nnssl_adapt.data.store import CaseStore  # noqa: E402
from nnssl_adapt.data.verifying.examine import fingerprint_dataset  # noqa: E402
from nnssl_adapt.data.verifying.fingerprint import TOTAL_DRAWS, DatasetFingerprint  # noqa: E402
from nnssl_adapt.planning.scaling import read_scaling  # noqa: E402


def run_nnunet(dataset: RawDataset, case_number: int, settings: PreprocessSettings) -> tuple[Any, Any, dict[str, Any]]:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(plans_of(settings))
    case = dataset.cases[case_number]
    return DefaultPreprocessor(verbose=False).run_case(
        [str(path) for path in case.images],
        None if case.label is None else str(case.label),
        plans,
        plans.get_configuration("3d_fullres"),
        copy.deepcopy(dataset.json.raw),
    )


def assert_same_properties(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs)
    np.testing.assert_array_equal(ours["spacing"], theirs["spacing"])
    assert ours["sitk_stuff"] == theirs["sitk_stuff"]
    for key in ("shape_before_cropping", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling"):
        assert ours[key] == theirs[key], key
    assert_same_locations(ours["class_locations"], theirs["class_locations"])


SEPARATE = {"shape": (7, 40, 36), "spacing": (5.0, 0.8, 0.9)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "same spacing, no resampling needed": ({}, {"spacing": (2.0, 1.0, 1.3)}),
    "no_resample": ({}, {"spacing": None}),
    "separate z": (SEPARATE, {"spacing": (2.5, 1.0, 1.0)}),
    "separate z, same number of slices": (SEPARATE, {"spacing": (5.0, 1.0, 1.1)}),
    "separate z in the target only": ({}, {"spacing": (6.0, 1.4, 1.1)}),
    "separate z forced off": (
        SEPARATE,
        {
            "spacing": (2.5, 1.0, 1.0),
            "resampling_data": ResamplingRule(3, 0, False),
            "resampling_seg": ResamplingRule(1, 0, False),
        },
    ),
    "linear": ({}, {"resampling_data": ResamplingRule(1)}),
    "transposed": ({"shape": (22, 9, 30), "spacing": (1.0, 4.0, 0.9)}, {"transpose_forward": (1, 0, 2)}),
    "transposed in a circle": ({}, {"transpose_forward": (2, 0, 1)}),
    "transposed, separate z": (
        {"shape": (36, 40, 7), "spacing": (0.9, 0.8, 5.0)},
        {"transpose_forward": (2, 0, 1), "spacing": (2.5, 1.0, 1.0)},
    ),
    "two channels, mask": (
        {"channels": 2},
        {"normalization_schemes": (Z_SCORE, Z_SCORE), "use_mask_for_norm": (True, False)},
    ),
    "CT and 0..1": (
        {"channels": 2},
        {"normalization_schemes": ("CTNormalization", "RescaleTo01Normalization"), "use_mask_for_norm": (False, False)},
    ),
    "none": ({}, {"normalization_schemes": ("NoNormalization",)}),
    "RGB": ({"dtype": "uint8"}, {"normalization_schemes": ("RGBTo01Normalization",)}),
    "regions": ({"regions": True, "labels": 4}, {}),
    "ignore label": ({"ignore": True}, {"use_mask_for_norm": (True,)}),
    "regions and ignore label, transposed": (
        {"regions": True, "ignore": True, "labels": 4},
        {"transpose_forward": (1, 2, 0)},
    ),
    "floats": ({"dtype": "float32"}, {"use_mask_for_norm": (True,)}),
    "doubles": ({"dtype": "float64"}, {}),
    "many labels": ({"labels": 6, "shape": (26, 30, 24)}, {"spacing": (1.1, 1.3, 0.9)}),
}


@pytest.mark.parametrize("name", CASES)
def test_case_is_preprocessed_as_by_nnunet(tmp_path: Path, name: str) -> None:
    data_options, setting_options = CASES[name]
    dataset = RawDataset.open(make_dataset(tmp_path, cases=2, **data_options))
    chosen = settings(**setting_options)
    for number in range(2):
        data, seg, properties = run_nnunet(dataset, number, chosen)
        ours = preprocess_case(dataset.cases[number], chosen, dataset.labels)
        assert ours.data.dtype == np.float32 and ours.seg is not None and ours.seg.dtype == np.int16
        assert ours.data.shape == data.shape
        scale = max(1.0, float(np.abs(data).max()) / 10)  # unnormalised intensities are in the hundreds
        np.testing.assert_allclose(ours.data, data, atol=1e-5 * scale, rtol=0)
        np.testing.assert_array_equal(ours.seg, seg)
        assert_same_properties(ours.properties, properties)


def test_a_window_and_a_range_are_what_nnunet_computes_by_the_plan(tmp_path: Path) -> None:
    """``--normalization window:LOW:HIGH:-1:1,range`` as the plan says it, and as it is meant."""
    dataset = RawDataset.open(make_dataset(tmp_path, cases=1, channels=2, spacing=(1.5, 1.2, 1.0)))
    words = [read_scaling(word) for word in ("window:120:430:-1:1", "range")]
    chosen = settings(
        normalization_schemes=tuple(word.scheme for word in words if word),
        use_mask_for_norm=(False, False),
        intensity_properties={"0": words[0].window.statistics(), "1": {}},
    )
    ours = preprocess_case(dataset.cases[0], chosen, dataset.labels).data
    theirs, _, properties = run_nnunet(dataset, 0, chosen)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    box = tuple(slice(*limits) for limits in properties["bbox_used_for_cropping"])
    images = [sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[box].astype(float) for path in dataset.cases[0].images]
    meant = (np.clip(images[0], 120, 430) - 120) / 310 * 2 - 1, (images[1] - images[1].min()) / np.ptp(images[1])
    for found, expected in zip(ours, meant, strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_prediction_input_is_preprocessed_as_by_nnunet(tmp_path: Path) -> None:
    """Without labels the mask for normalisation is the nonzero region alone."""
    dataset = RawDataset.open(make_dataset(tmp_path, cases=1, channels=2))
    unlabelled = RawDataset(
        dataset.folder, dataset.json, dataset.labels, (type(dataset.cases[0])("case_00", dataset.cases[0].images),)
    )
    chosen = settings(normalization_schemes=(Z_SCORE, Z_SCORE), use_mask_for_norm=(True, True))
    data, _, properties = run_nnunet(unlabelled, 0, chosen)
    ours = preprocess_case(unlabelled.cases[0], chosen, dataset.labels)
    np.testing.assert_allclose(ours.data, data, atol=1e-5, rtol=0)
    assert ours.seg is None
    assert {**ours.properties, "spacing": 0} == {**properties, "spacing": 0}


def test_an_image_of_zeros_is_not_cropped(tmp_path: Path) -> None:
    from support.synthetic import write_image

    root = make_dataset(tmp_path, cases=1, shape=(8, 12, 10))
    write_image(root / "imagesTr" / "case_00_0000.nii.gz", np.zeros((8, 12, 10), np.int16), (2.0, 1.0, 1.3))
    dataset = RawDataset.open(root)
    data, seg, properties = run_nnunet(dataset, 0, settings())
    ours = preprocess_case(dataset.cases[0], settings(), dataset.labels)
    np.testing.assert_array_equal(ours.data, data)
    np.testing.assert_array_equal(ours.seg, seg)
    assert_same_properties(ours.properties, properties)


@pytest.mark.parametrize("seed", range(4))
def test_class_locations_of_large_classes(seed: int) -> None:
    """More than ten thousand voxels of a class, and more than a million, where the hundredth takes over."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    random = np.random.default_rng(seed)
    seg = random.choice([-1, 0, 1, 2, 5], size=(1, 90, 130, 140), p=[0.1, 0.1, 0.7, 0.06, 0.04]).astype(np.int16)
    classes: list[Any] = [1, 2, 3, (1, 2), (5, 3, 2), (3, 4), (-1, 0, 1, 2, 3, 4, 5)]
    theirs = DefaultPreprocessor._sample_foreground_locations(seg, copy.deepcopy(classes))
    assert_same_locations(class_locations(seg, classes), theirs)


@pytest.fixture(scope="module")
def nnunet_dataset(tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    return RawDataset.open(
        make_dataset(tmp_path_factory.mktemp("raw"), cases=5, channels=2, shape=(24, 20, 28), seed=3, ignore=True)
    )


def test_nnunet_reads_our_store(tmp_path: Path, nnunet_dataset: RawDataset) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2

    chosen = settings(normalization_schemes=(Z_SCORE, Z_SCORE), use_mask_for_norm=(False, True))
    store = preprocess_cases(nnunet_dataset, chosen, tmp_path / "store", workers=2)
    assert infer_dataset_class(str(store.folder)) is nnUNetDatasetBlosc2
    theirs = nnUNetDatasetBlosc2(str(store.folder))
    assert theirs.identifiers == store.identifiers == [f"case_{n:02d}" for n in range(5)]
    for identifier in theirs.identifiers:
        data, seg, previous, properties = theirs.load_case(identifier)
        ours = store.open(identifier)
        assert previous is None and data.dtype == np.float32 and seg.dtype == np.int16
        np.testing.assert_array_equal(data[:], ours.data[:])
        np.testing.assert_array_equal(seg[:, 2:5, 3:9], ours.seg[:, 2:5, 3:9])
        assert_same_properties(ours.properties, properties)
        assert type(properties["class_locations"][1]) is np.ndarray


def test_we_read_nnunets_store(tmp_path: Path, nnunet_dataset: RawDataset) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    chosen = settings(normalization_schemes=(Z_SCORE, Z_SCORE), use_mask_for_norm=(False, True))
    plans = PlansManager(plans_of(chosen))
    for case in nnunet_dataset.cases[:2]:
        DefaultPreprocessor(verbose=False).run_case_save(
            str(tmp_path / case.identifier),
            [str(path) for path in case.images],
            str(case.label),
            plans,
            plans.get_configuration("3d_fullres"),
            copy.deepcopy(nnunet_dataset.json.raw),
        )
    store = CaseStore(tmp_path)
    assert store.identifiers == ["case_00", "case_01"]
    for case in nnunet_dataset.cases[:2]:
        stored = store.open(case.identifier)
        ours = preprocess_case(case, chosen, nnunet_dataset.labels)
        np.testing.assert_allclose(stored.data[:], ours.data, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(stored.seg[:], ours.seg)
        assert_same_properties(ours.properties, stored.properties)


def test_pieces_are_cut_as_by_nnunet() -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

    random = np.random.default_rng(0)
    for _ in range(300):
        shape = (int(random.integers(1, 4)), *(int(n) for n in random.integers(1, 600, 3)))
        patch = tuple(int(n) for n in random.integers(1, 260, 3))
        for itemsize in (2, 4):
            assert piece_shapes(shape, patch, itemsize) == comp_blosc2_params(shape, patch, itemsize), (shape, patch)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_fingerprint_is_nnunets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor as peer

    import nnssl_adapt.data.verifying.examine as our_module
    import nnssl_adapt.data.verifying.measures as measures_module

    make_dataset(tmp_path / "raw", cases=4, channels=2, shape=(14, 20, 17), dtype=dtype, seed=5)
    (tmp_path / "preprocessed").mkdir()
    monkeypatch.setattr(peer, "nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setattr(peer, "nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setattr(peer, "maybe_convert_to_dataset_name", lambda name: name)
    extractor = peer.DatasetFingerprintExtractor("Dataset991_Tiny", num_processes=1)
    extractor.show_progress_bar = False
    # A hundredth of the usual number of draws, still several of our pieces, to save the peer's time.
    assert extractor.num_foreground_voxels_for_intensitystats == TOTAL_DRAWS
    monkeypatch.setattr(our_module, "TOTAL_DRAWS", 10e5)
    monkeypatch.setattr(measures_module, "_DRAWS_AT_ONCE", 60_000)
    extractor.num_foreground_voxels_for_intensitystats = 10e5
    extractor.run()
    theirs = DatasetFingerprint.load(tmp_path / "preprocessed" / "Dataset991_Tiny" / "dataset_fingerprint.json")
    ours = fingerprint_dataset(RawDataset.open(tmp_path / "raw" / "Dataset991_Tiny"))
    ours.save(tmp_path / "ours.json")
    assert DatasetFingerprint.load(tmp_path / "ours.json") == ours
    assert ours.spacings == theirs.spacings
    assert ours.shapes_after_crop == theirs.shapes_after_crop
    assert ours.median_relative_size_after_cropping == theirs.median_relative_size_after_cropping
    assert set(ours.intensity) == set(theirs.intensity) == {"0", "1"}
    for channel, name in itertools.product(("0", "1"), theirs.intensity["0"]):
        tolerance = 1e-6 if name in ("mean", "std") else 0
        np.testing.assert_allclose(
            ours.intensity[channel][name], theirs.intensity[channel][name], rtol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("count", [5, 12, 43])
def test_splits_are_nnunets(count: int) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    names = [f"case_{n:02d}" for n in range(count)]
    assert crossval_splits(names) == generate_crossval_split(names, seed=12345, n_splits=5)


@pytest.mark.parametrize("regions, ignore", [(False, False), (True, False), (False, True), (True, True)])
def test_labels_mean_what_they_mean_to_nnunet(tmp_path: Path, regions: bool, ignore: bool) -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    root = make_dataset(tmp_path, cases=1, labels=4, regions=regions, ignore=ignore, shape=(6, 8, 7))
    raw = RawDataset.open(root).json.raw
    ours = LabelScheme.from_dataset_json(raw)
    theirs = LabelManager(raw["labels"], raw.get("regions_class_order"))
    assert list(ours.all_labels) == theirs.all_labels
    assert ours.has_regions == theirs.has_regions
    assert ours.ignore_label == theirs.ignore_label
    assert ours.num_heads == theirs.num_segmentation_heads
    assert list(ours.foreground) == (theirs.foreground_regions if regions else theirs.foreground_labels)
    logits = np.random.default_rng(0).normal(size=(ours.num_heads, 5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(ours.heads_to_labels(logits), theirs.convert_logits_to_segmentation(logits))
