from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.synthetic import make_dataset, write_image

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import (
    PreprocessSettings,
    ResamplingRule,
    class_locations,
    preprocess_arrays,
    preprocess_case,
)
from nnssl_adapt.errors import CaseError, PlanError

LABELS = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
SHAPE = (8, 12, 10)
SPACING = (2.0, 1.0, 1.3)
STATISTICS = {"mean": 1.0, "std": 2.0, "percentile_00_5": 0.0, "percentile_99_5": 9.0}


def settings(**changes: Any) -> PreprocessSettings:
    values: dict[str, Any] = {
        "spacing": None,
        "transpose_forward": (0, 1, 2),
        "transpose_backward": (0, 1, 2),
        "normalization_schemes": ("NoNormalization",),
        "use_mask_for_norm": (False,),
        "patch_size": (8, 8, 8),
    }
    return PreprocessSettings(**{**values, **changes})


def arrays() -> tuple[np.ndarray, np.ndarray, ImageGeometry]:
    """An image with a box in zeros, two holes inside it and a notch at its border; one label reaches into the zeros."""
    image = np.zeros((1, 10, 20, 30), np.float32)
    image[0, 2:8, 3:15, 5:29] = np.random.default_rng(0).uniform(1, 9, (6, 12, 24))
    image[0, 4, 6, 10] = image[0, 5, 10, 20] = 0
    image[0, 2, 3, 5:8] = 0
    labels = np.zeros((1, 10, 20, 30), np.int16)
    labels[0, 4:6, 5:9, 8:14] = 1
    labels[0, 2, 3, 5] = 2
    geometry = ImageGeometry((3.0, 1.5, 0.5), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), (10, 20, 30))
    return image, labels, geometry


def test_crop_marks_what_is_outside() -> None:
    image, labels, geometry = arrays()
    case = preprocess_arrays(image, labels, geometry, settings(), LABELS)
    assert case.seg is not None
    assert case.data.shape == (1, 6, 12, 24) and case.data.dtype == np.float32
    np.testing.assert_array_equal(case.data, image[:, 2:8, 3:15, 5:29])
    assert case.properties["bbox_used_for_cropping"] == [[2, 8], [3, 15], [5, 29]]
    assert case.properties["shape_before_cropping"] == (10, 20, 30)
    assert case.properties["shape_after_cropping_and_before_resampling"] == (6, 12, 24)
    assert case.properties["spacing"] == [3.0, 1.5, 0.5]
    # The notch at the border is outside, but keeps its label; the holes are inside.
    assert case.seg[0, 0, 0, :4].tolist() == [2, -1, -1, 0]
    assert case.seg[0, 2, 3, 5] == 1 and case.data[0, 2, 3, 5] == 0
    assert case.seg[0, 3, 7, 15] == 0 and case.data[0, 3, 7, 15] == 0
    assert set(np.unique(case.seg)) == {-1, 0, 1, 2} and (case.seg == -1).sum() == 2


def test_transposition_turns_arrays_and_boxes_but_not_the_recorded_spacing() -> None:
    image, labels, geometry = arrays()
    chosen = settings(transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0))
    case = preprocess_arrays(image, labels, geometry, chosen, LABELS)
    plain = preprocess_arrays(image, labels, geometry, settings(), LABELS)
    assert case.seg is not None and plain.seg is not None
    np.testing.assert_array_equal(case.data, plain.data.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(case.seg, plain.seg.transpose(0, 3, 1, 2))
    assert case.properties["bbox_used_for_cropping"] == [[5, 29], [2, 8], [3, 15]]
    assert case.properties["shape_before_cropping"] == (30, 10, 20)
    assert case.properties["spacing"] == [3.0, 1.5, 0.5]


def test_resampling_uses_the_transposed_spacing() -> None:
    image, labels, geometry = arrays()
    chosen = settings(transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0), spacing=(1.0, 2.0, 1.0))
    case = preprocess_arrays(image, labels, geometry, chosen, LABELS)
    assert case.seg is not None
    # (24, 6, 12) voxels at (0.5, 3, 1.5) mm
    assert case.data.shape[1:] == case.seg.shape[1:] == (12, 9, 18)


@pytest.mark.parametrize("border", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float64])
def test_inputs_are_not_changed(dtype: type, border: int) -> None:
    image, labels, geometry = arrays()
    image = (image + border).astype(dtype)  # without a border of zeros nothing is cropped, and slices might be views
    image[0, 0, 0, 0] = 0
    image_before, labels_before = image.copy(), labels.copy()
    chosen = settings(
        spacing=(2.0, 2.0, 1.0), normalization_schemes=("ZScoreNormalization",), use_mask_for_norm=(True,)
    )
    preprocess_arrays(image, labels, geometry, chosen, LABELS)
    preprocess_arrays(image, labels, geometry, settings(), LABELS).data[:] = 7
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(labels, labels_before)


def test_wrong_channels_and_shapes() -> None:
    image, labels, geometry = arrays()
    with pytest.raises(CaseError, match=r"has 2 channel\(s\), the plan is for 1"):
        preprocess_arrays(np.concatenate([image, image]), labels, geometry, settings(), LABELS)
    with pytest.raises(CaseError, match="labels have shape"):
        preprocess_arrays(image, labels[:, :-1], geometry, settings(), LABELS)


def test_bad_settings_are_reported_together() -> None:
    with pytest.raises(PlanError) as caught:
        settings(
            spacing=(1.0, -1.0, 1.0),
            transpose_forward=(2, 0, 1),
            normalization_schemes=("Other", "CTNormalization"),
            intensity_properties={"1": {"mean": 3.0}},
        )
    message = str(caught.value)
    for part in (
        "transpose_backward must undo",
        "three positive millimetres",
        "use_mask_for_norm has 1",
        "unknown normalisation 'Other'",
        "channel 1: CTNormalization needs",
        "percentile_00_5, percentile_99_5, std",
    ):
        assert part in message


def test_digest_tells_what_changes_voxels_from_what_does_not() -> None:
    base = settings(spacing=(1.0, 1.0, 1.0))
    same = [
        settings(spacing=(1, 1, 1)),
        settings(spacing=(1.0, 1.0, 1.0), patch_size=(4, 4, 4)),
        settings(spacing=(1.0, 1.0, 1.0), intensity_properties={"0": STATISTICS}),
    ]
    other = [
        settings(),
        settings(spacing=(1.0, 1.0, 1.0 + 1e-9)),
        settings(spacing=(1.0, 1.0, 1.0), transpose_forward=(1, 0, 2), transpose_backward=(1, 0, 2)),
        settings(spacing=(1.0, 1.0, 1.0), use_mask_for_norm=(True,)),
        settings(spacing=(1.0, 1.0, 1.0), resampling_data=ResamplingRule(1)),
        settings(spacing=(1.0, 1.0, 1.0), resampling_seg=ResamplingRule(0)),
        *(
            settings(
                spacing=(1.0, 1.0, 1.0),
                normalization_schemes=("CTNormalization",),
                intensity_properties={"0": {**STATISTICS, "mean": mean}},
            )
            for mean in (1.0, 2.0)
        ),
    ]
    assert {s.digest() for s in same} == {base.digest()}
    assert len({s.digest() for s in [base, *other]}) == len(other) + 1


def test_class_locations_lie_in_their_class_and_never_twice() -> None:
    seg = (
        np.random.default_rng(0).choice([-1, 0, 1, 2], size=(1, 20, 40, 60), p=[0.1, 0.5, 0.35, 0.05]).astype(np.int16)
    )
    found = class_locations(seg, [1, 2, 3, (1, 2), (-1, 0, 1, 2)])
    assert len(found[1]) == 10_000 and len(found[2]) == (seg == 2).sum() and len(found[3]) == 0
    for key in (1, 2, (1, 2), (-1, 0, 1, 2)):
        places = found[key]
        assert places.dtype == np.int64 and places.shape[1] == 4 and not places[:, 0].any()
        assert np.isin(seg[tuple(places.T)], key).all()
        assert len(np.unique(places, axis=0)) == len(places)
    # Both labels of a region are drawn from, in proportion.
    assert 0.1 < (seg[tuple(found[1, 2].T)] == 2).mean() < 0.15


def test_a_cases_files_are_checked(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=3, shape=SHAPE, spacing=SPACING)
    dataset = RawDataset.open(root)
    write_image(root / "labelsTr" / "case_00.nii.gz", np.zeros((8, 12, 11), np.uint8), SPACING)
    write_image(root / "labelsTr" / "case_01.nii.gz", np.full((9, 13, 11), 7, np.uint8), SPACING)
    with pytest.raises(CaseError, match=r"case_00\.nii\.gz: shape.*grid"):
        preprocess_case(dataset.cases[0], settings(), dataset.labels)
    with pytest.raises(CaseError, match=r"case_01\.nii\.gz has label value\(s\) 7"):
        preprocess_case(dataset.cases[1], settings(), dataset.labels)
    with pytest.raises(CaseError, match=r"case_02_0000\.nii\.gz: the image has 1 channel"):
        two = settings(normalization_schemes=("NoNormalization",) * 2, use_mask_for_norm=(False,) * 2)
        preprocess_case(dataset.cases[2], two, dataset.labels)
