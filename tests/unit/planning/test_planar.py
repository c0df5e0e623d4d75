"""Plans of ``2d``: from a 2D network's weights, from scratch, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pictures import write_picture_dataset
from support.planar import PATCH, PLANAR_CNN, write_planar_model
from support.synthetic import make_dataset

import nnssl_adapt as na
from nnssl_adapt.errors import ArchitectureError, ConfigurationError, PlanError
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.planar import refuse_other_sources
from nnssl_adapt.weights.network.architectures import Architecture, build_network, check_patch, nearest_patch


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    return write_picture_dataset(tmp_path / "raw" / "Dataset005_Cells")


def test_from_the_weights_of_a_2d_network(pictures: Path, tmp_path: Path) -> None:
    checkpoint = na.open_checkpoint(write_planar_model(tmp_path / "models"))
    assert checkpoint.architecture == PLANAR_CNN and checkpoint.plan.patch_size == (1, *PATCH)
    plan = na.make_plan(5, checkpoint, name="others", configurations=["2d"], workers=1)
    assert (plan.configuration, plan.is_planar, plan.architecture) == ("2d", True, PLANAR_CNN)
    entries = plan.content["configurations"]["2d"]
    assert (entries["patch_size"], entries["spacing"], entries["batch_size"]) == ([24, 32], [1.0, 1.0], 5)
    assert plan.content["image_reader_writer"] == "NaturalImage2DIO" and plan.patch_size == (1, 24, 32)
    store = na.preprocess_dataset(plan, workers=1, progress=False)
    assert store.open("cell_00").data.shape == (3, 1, 44, 60)
    again = FinetunePlan.find("Dataset005_Cells", plan.plans_name, "2d")
    assert again.content["configurations"] == plan.content["configurations"]
    assert again.replaced(patch_size=(1, 16, 24)).patch_size == (1, 16, 24)


@pytest.mark.parametrize("mode, spacing, planned", [("fixed", (7, 2, 3), [2.0, 3.0]), ("median", None, [1.0, 1.0])])
def test_the_spacing_of_slices(
    pictures: Path, tmp_path: Path, mode: str, spacing: object, planned: list[float]
) -> None:
    model = write_planar_model(tmp_path / "models")
    plan = na.make_plan(5, model, mode=mode, spacing=spacing, configurations=["2d"], workers=1)
    assert plan.content["configurations"]["2d"]["spacing"] == planned
    kept = na.make_plan(5, model, mode="no_resample", configurations=["2d"], workers=1)
    assert kept.spacing is None


def test_slices_lie_across_the_coarsest_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    make_dataset(tmp_path / "raw", shape=(40, 34, 7), spacing=(1.0, 1.2, 3.6))
    plan = na.make_plan(991, None, name="scratch", configurations=["2d"], workers=1)
    assert plan.transpose_forward == (2, 0, 1)
    assert plan.spacing == pytest.approx((1.0, 1.2))
    assert plan.settings.target_spacing((4.5, 1.0, 1.2)) == (4.5, *plan.spacing)
    assert plan.provenance.source is None and not plan.pretrain_info
    assert plan.architecture.is_planar and plan.batch_dice


def test_3d_weights_are_refused_with_the_reason(pictures: Path, small_resenc: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"3D network.*three axes.*3d_fullres"):
        na.make_plan(5, small_resenc, configurations=["2d"], workers=1)
    with pytest.raises(ConfigurationError, match="3D transformer"):
        refuse_other_sources(Architecture.named("PrimusS"), ["2d"])
    with pytest.raises(ConfigurationError, match="3D transformer"):
        na.make_plan(5, None, configurations=["2d"], preset="PrimusV2S", workers=1)


def test_2d_weights_are_refused_for_3d(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"2D network.*-c 2d"):
        na.make_plan(5, write_planar_model(tmp_path / "models"), workers=1)
    with pytest.raises(ConfigurationError, match="pre-trained weights"):
        na.make_plan(5, None, workers=1)
    with pytest.raises(ConfigurationError, match="by itself"):
        na.make_plan(5, None, configurations=["2d", "3d_fullres"], workers=1)


def test_a_2d_patch_of_a_3d_network_is_no_plan(pictures: Path) -> None:
    plan = na.make_plan(5, None, name="x", configurations=["2d"], workers=1)
    entries = plan.content["configurations"]["2d"]
    content = {**plan.content, "configurations": {"2d": {**entries, "patch_size": [4, 32, 32], "spacing": [1, 1, 1]}}}
    with pytest.raises(PlanError, match="patch of 3 axes and a network of 2"):
        FinetunePlan(content, "2d")


def test_a_2d_network_takes_slices() -> None:
    assert PLANAR_CNN.total_stride == (1, 4, 4) and nearest_patch(PLANAR_CNN, (9, 21, 3)) == (1, 20, 4)
    with pytest.raises(ArchitectureError, match="one slice"):
        check_patch(PLANAR_CNN, (2, 24, 32))
    with pytest.raises(ArchitectureError, match="different numbers of axes"):
        Architecture("PlainConvUNet", {**PLANAR_CNN.kwargs, "norm_op": "InstanceNorm3d"})
    network = build_network(PLANAR_CNN, 2, 3, (1, 24, 32), deep_supervision=True)
    outputs = network(torch.randn(2, 2, 1, 24, 32))
    assert [tuple(each.shape) for each in outputs] == [(2, 3, 1, 24, 32), (2, 3, 1, 12, 16)]
