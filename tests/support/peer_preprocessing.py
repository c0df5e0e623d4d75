"""Preprocessing settings, and nnU-Net's plans that ask for the same."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.preprocess import PreprocessSettings, ResamplingRule
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.planning.plan import FinetunePlan

Z_SCORE = "ZScoreNormalization"
STATISTICS = {
    "0": {
        "mean": 310.0,
        "std": 77.0,
        "median": 300.0,
        "min": 1.0,
        "max": 600.0,
        "percentile_00_5": 120.5,
        "percentile_99_5": 470.25,
    }
}
STATISTICS["1"] = {**STATISTICS["0"], "mean": 150.0, "std": 31.5}


def settings(**changes: Any) -> PreprocessSettings:
    forward = changes.pop("transpose_forward", (0, 1, 2))
    values: dict[str, Any] = {
        "spacing": (1.5, 1.2, 1.0),
        "transpose_forward": forward,
        "transpose_backward": tuple(forward.index(axis) for axis in range(3)),
        "normalization_schemes": (Z_SCORE,),
        "use_mask_for_norm": (False,),
        "intensity_properties": STATISTICS,
        "patch_size": (16, 24, 20),
    }
    return PreprocessSettings(**{**values, **changes})


def plans_of(settings: PreprocessSettings) -> dict[str, Any]:
    """The plans file that tells nnU-Net to do the same."""
    keep = settings.spacing is None
    function = "no_resampling_hack" if keep else "resample_data_or_seg_to_shape"

    def kwargs(rule: ResamplingRule, is_seg: bool) -> dict[str, Any]:
        return {} if keep else {"is_seg": is_seg, **vars(rule)}

    return {
        "dataset_name": "Dataset991_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(settings.transpose_forward),
        "transpose_backward": list(settings.transpose_backward),
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": settings.intensity_properties,
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "architecture": {},
                "patch_size": list(settings.patch_size),
                "spacing": [1.0, 1.0, 1.0] if keep else list(settings.spacing or ()),
                "normalization_schemes": list(settings.normalization_schemes),
                "use_mask_for_norm": list(settings.use_mask_for_norm),
                "resampling_fn_data": function,
                "resampling_fn_seg": function,
                "resampling_fn_data_kwargs": kwargs(settings.resampling_data, False),
                "resampling_fn_seg_kwargs": kwargs(settings.resampling_seg, True),
            }
        },
    }


def assert_same_locations(ours: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    assert list(ours) == list(theirs)
    for key, expected in theirs.items():
        if len(expected) == 0:
            assert len(ours[key]) == 0, key
        else:
            assert ours[key].dtype == expected.dtype == np.int64
            np.testing.assert_array_equal(ours[key], expected, err_msg=str(key))


def assert_same_store(plan: FinetunePlan) -> None:
    """The plan's store holds, case by case, what nnU-Net makes by the same plan: voxels, labels and class locations."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw, store, plans = RawDataset.open(plan.dataset_name), CaseStore(plan.store_folder), PlansManager(plan.content)
    assert store.identifiers == [case.identifier for case in raw.cases]
    for case in raw.cases:
        data, seg, properties = DefaultPreprocessor(verbose=False).run_case(
            [str(path) for path in case.images],
            str(case.label),
            plans,
            plans.get_configuration(plan.configuration),
            copy.deepcopy(raw.json.raw),
        )
        ours = store.open(case.identifier)
        assert ours.data.shape == data.shape and ours.data.dtype == np.float32
        np.testing.assert_allclose(ours.data[:], data, rtol=0, atol=2e-3)
        np.testing.assert_array_equal(ours.seg[:], seg)
        assert_same_locations(ours.properties["class_locations"], properties["class_locations"])
