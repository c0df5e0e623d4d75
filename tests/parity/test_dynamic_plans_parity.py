"""--keep-topology from plans that released nnU-Net made, and nnU-Net reading what comes of it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.synthetic import make_dataset

pytest.importorskip("nnunetv2")

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnssl_adapt as na
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights

PLANNING = """
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from support.quick_planning import count_without_weights, draw_few
from support.peer_threads import pool_threads
if __name__ == "__main__":
    count_without_weights()
    draw_few()
    pool_threads()
    extract_fingerprints([991], num_processes=1, clean=False)
    plan_experiments([991])
    plan_experiments([991], experiment_planner_class_name="nnUNetPlannerResEncM")
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A dataset of flat voxels (so that nnU-Net exchanges axes) with nnU-Net's own two plans."""
    root = tmp_path_factory.mktemp("dynamic")
    with pytest.MonkeyPatch.context() as patch:
        for part in ("raw", "preprocessed", "results"):
            (root / part).mkdir()
            patch.setenv(f"nnUNet_{part}", str(root / part))
        raw = make_dataset(root / "raw", shape=(34, 30, 12), spacing=(1.0, 1.2, 2.6))
        (root / "planning.py").write_text(PLANNING)
        calm = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        calm["PYTHONPATH"] = os.pathsep.join(sys.path)
        result = subprocess.run([sys.executable, str(root / "planning.py")], capture_output=True, text=True, env=calm)
        assert result.returncode == 0, result.stderr[-3000:]
        yield SimpleNamespace(raw=raw, folder=root / "preprocessed" / raw.name)


@pytest.mark.parametrize(
    ("weights", "base"),
    [("small_plainconv", "nnUNetPlans"), ("small_resenc", "nnUNetResEncUNetMPlans")],
)
def test_nnunet_reads_the_plan_and_builds_the_network(planned, small_resenc, weights, base):
    checkpoint = na.open_checkpoint(small_resenc.parent / weights)
    plan = na.make_plan(991, checkpoint, name=weights, keep_topology=True, base_plans=base, workers=1)
    path = plan.save()
    assert path == planned.folder / f"ptPlans_dynamic__{weights}.json"

    theirs, manager = PlansManager(str(planned.folder / f"{base}.json")), PlansManager(str(path))
    assert manager.plans_name == f"ptPlans_dynamic__{weights}"
    assert manager.available_configurations == ["3d_fullres"]
    assert manager.transpose_forward == theirs.transpose_forward != [0, 1, 2]
    assert manager.image_reader_writer_class is theirs.image_reader_writer_class
    assert manager.foreground_intensity_properties_per_channel == theirs.foreground_intensity_properties_per_channel
    one, other = manager.get_configuration("3d_fullres"), theirs.get_configuration("3d_fullres")
    assert one.data_identifier == plan.data_identifier != other.data_identifier
    for name in ("spacing", "patch_size", "batch_size", "normalization_schemes", "batch_dice", "previous_stage_name"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.resampling_fn_data.keywords == other.resampling_fn_data.keywords

    built = get_network_from_plans(
        one.network_arch_class_name,
        one.network_arch_init_kwargs,
        one.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=False,
    )
    network = build_network(plan.architecture, 1, 3, plan.patch_size)
    report = transfer_weights(checkpoint, network, **plan.transfer_settings.to_dict())
    assert report.coverage > 0
    built.load_state_dict(network.state_dict(), strict=True)
    image = torch.randn(1, 1, *plan.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(built.eval()(image), network.eval()(image))
    assert json.loads(path.read_text())["nnssl_adapt"]["base_plans"] == base


def test_our_store_for_it_is_not_nnunets(planned, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc.parent / "small_plainconv")
    plan = na.make_plan(991, checkpoint, name="stored", keep_topology=True, workers=1)
    store = na.preprocess_dataset(plan, workers=1, progress=False)
    assert len(store.identifiers) == 5
    assert not (planned.folder / "nnUNetPlans_3d_fullres").exists()
    data = store.open("case_00").data[:]
    assert data.shape[1] < data.shape[2]  # the axis of thick voxels, the image's last, has come first


@pytest.mark.parametrize(
    ("weights", "preset", "theirs"),
    [("small_plainconv", "default", "nnUNetPlans"), ("small_resenc", "ResEncM", "nnUNetResEncUNetMPlans")],
)
def test_a_plan_made_without_nnunets_is_as_theirs(planned, small_resenc, weights, preset, theirs):
    """Entry for entry, but for the folder of the cases."""
    checkpoint = na.open_checkpoint(small_resenc.parent / weights)
    ours = na.make_plan(991, checkpoint, name="own", keep_topology=True, preset=preset, workers=1)
    path = ours.save()
    content = json.loads((planned.folder / f"{theirs}.json").read_text())
    own = json.loads(path.read_text())
    one, other = own["configurations"].pop("3d_fullres"), content["configurations"].pop("3d_fullres")
    for entries in (one, other):
        entries.pop("data_identifier")
        entries["architecture"].pop("_kw_requires_import")  # in any order
    assert (
        na.FinetunePlan.load(path).architecture == na.FinetunePlan.load(planned.folder / f"{theirs}.json").architecture
    )
    assert one.pop("architecture")["arch_kwargs"]["strides"] == other.pop("architecture")["arch_kwargs"]["strides"]
    assert one == other
    differ = {
        "plans_name",
        "configurations",
        "experiment_planner_used",
        "pretrain_info",
        "nnssl_adapt",
        "image_orientation",
    }
    assert {key: own[key] for key in own if key not in differ} == {
        key: content[key] for key in content if key not in differ
    }
    assert own["nnssl_adapt"]["base_plans"] is None
    path.unlink()
