"""Plans with anything in any place, and tensors with any names and shapes: a plan comes out, or one of our errors."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from support.malformed import ANYTHING, changed, damages, places
from support.nnssl_files import architecture, plan, state_dict, write_checkpoint
from support.nnssl_networks import nnunet_plans

from nnssl_adapt.errors import DatasetJsonError, ModelFolderError, NnsslAdaptError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.checkpoint.nnunet_plan import plan_from_nnunet
from nnssl_adapt.weights.checkpoint.plan_check import reconcile
from nnssl_adapt.weights.checkpoint.plan_of_tensors import plan_from_tensors
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.sources.digests import Record
from nnssl_adapt.weights.transfer.report import TransferReport
from nnssl_adapt.weights.transfer.settings import TransferSettings
from nnssl_adapt.weights.transfer.transfer import scratch_report

WRONG = [*ANYTHING, "torch.nn.Linear", [3, 3, 3], {1: 2}, ("1", 2, 3)]


def one_line(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 700, text


def leaves(content, path=()):
    """Every place that holds a plain value."""
    return [place for place in places(content) if not isinstance(at(content, place), (dict, list, tuple))]


def at(content, path):
    for key in path:
        content = content[key]
    return content


def nnunet_files():
    plans = nnunet_plans("ResidualEncoderUNet", 1)
    plans["foreground_intensity_properties_per_channel"] = {"0": dict.fromkeys(STATISTICS, 1.5)}
    plans["transpose_forward"] = [0, 1, 2]
    dataset = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "all": [1, 2], "b": 2}}
    return {"plans": plans, "dataset": {**dataset, "image_orientation": "RPI", "regions_class_order": [1, 2]}}


STATISTICS = ("mean", "std", "percentile_00_5", "percentile_99_5")


def plan_of(files):
    for name, error in (("plans", ModelFolderError), ("dataset", DatasetJsonError)):
        if not isinstance(files, dict) or not isinstance(files.get(name), dict):
            raise error("what is read from a file is a mapping")  # read_json sees to that
    return plan_from_nnunet(files["plans"], files["dataset"], "3d_fullres", "model")


READERS = {
    "ResEnc": (lambda content: AdaptationPlan.parse(content, "file.pth"), plan("ResidualEncoderUNet")),
    "Primus": (lambda content: AdaptationPlan.parse(content, "file.pth"), plan("Primus", (4, 12, 16))),
    "nnU-Net": (plan_of, nnunet_files()),
    "settings": (TransferSettings.from_dict, TransferSettings(channels=(0, "T1", None), waive=("a.*",)).to_dict()),
}
NOT_READ = re.compile(
    r"arch_kwargs_requiring_import|dataset_name|plans_name|original_median|image_reader|transpose_backward|data_identifier"
    r"|preprocessor_name|batch_|median_image|resampling|_kw_requires|label_manager|experiment_planner|foreground_intensity"
    r"|channel_names|deep_supervision|citations|numTraining|file_ending"
)
"""Entries that these readers leave alone, or whose wrong content is as good as none."""


@pytest.mark.parametrize("kind", READERS)
def test_any_value_at_any_place_gives_a_plan_or_one_clear_line(kind):
    read, good = READERS[kind]
    read(good)
    cases = refused = 0
    for _path, damaged in damages(good, WRONG):
        cases += 1
        try:
            read(damaged)
        except NnsslAdaptError as error:
            one_line(error)
            refused += 1
    assert refused > cases // 3


@pytest.mark.parametrize("kind", READERS)
def test_a_mapping_where_a_plain_value_belongs_is_refused_at_every_place_that_is_read(kind):
    """The reader looks at each entry: one that it stopped checking would be taken as it is."""
    read, good = READERS[kind]
    for path in leaves(good):
        if NOT_READ.search(".".join(map(str, path))):
            continue
        with pytest.raises(NnsslAdaptError):
            read(changed(good, path, {"a": [None]}))
            pytest.fail(f"taken at {path}")


@pytest.mark.parametrize("kind", ["ResEnc", "Primus"])
def test_what_is_not_damaged_is_read_as_it_was(kind):
    """Damage to how images were preprocessed never changes the network, nor the other way round."""
    read, good = READERS[kind]
    expected = read(good)
    for path, damaged in damages(good, WRONG):
        try:
            found = read(damaged)
        except NnsslAdaptError:
            continue
        if path[:1] != ("architecture_plans",):
            assert found.architecture == expected.architecture, path
        if path[:1] != ("pretrain_plan",):
            assert found.spacing == expected.spacing and found.normalization_schemes == expected.normalization_schemes


def test_a_damaged_sidecar_or_model_folder_never_ends_in_a_traceback(tmp_path):
    randomness = random.Random(2026)
    write_checkpoint(tmp_path / "ssl", state_dict(), sidecar=plan())
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    write_checkpoint(model / "fold_0", state_dict(), embedded=None)
    good = nnunet_files()
    sidecars = randomness.sample([d for _, d in damages(plan(), WRONG)], 60)
    folders = randomness.sample([d for _, d in damages(good, WRONG) if isinstance(d, dict)], 60)
    opened = 0
    for damaged in [*sidecars, *folders]:
        source = tmp_path / "ssl"
        if damaged in folders:
            source = model
            for name in ("plans", "dataset"):
                (model / f"{name}.json").write_text(json.dumps(damaged.get(name)))
        else:
            (source / "adaptation_plan.json").write_text(json.dumps(damaged))
        try:
            opened += bool(open_checkpoint(source).tensors)
        except NnsslAdaptError as error:
            one_line(error)
    assert 20 < opened < 100


def test_records_and_reports_with_anything_in_them_are_refused_or_read(tmp_path):
    path = tmp_path / "fetched.json"
    record = {"files": {"a.pth": "0" * 64}, "about": {"repo_id": "a/b", "revision": None, "bytes": 3, "source": "a/b"}}
    for _, damaged in damages(record, WRONG):
        path.write_text(json.dumps(damaged, default=str, skipkeys=True))
        found = Record.load(path)
        assert found is None or isinstance(found.about.get("repo_id"), (str, type(None)))
    network = build_network(architecture("PlainConvUNet"), 1, 2, (8, 16, 16))
    report = scratch_report(network).to_dict()
    report |= {"target": report["target"][:2], "source": [{"name": "a", "fate": "used", "reason": "", "shape": [2]}]}
    for _, damaged in damages(report, WRONG):
        try:
            assert str(TransferReport.from_dict(damaged))
        except NnsslAdaptError as error:
            one_line(error)


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet", "Primus"])
@pytest.mark.parametrize("with_plan", [True, False])
def test_any_other_shapes_and_names_give_a_plan_or_one_of_our_errors(class_name, with_plan):
    patch = (4, 12, 16) if class_name == "Primus" else (8, 12, 16)
    good, content = state_dict(class_name, patch), AdaptationPlan.parse(plan(class_name, patch), "file.pth")
    randomness = random.Random(f"{class_name} {with_plan}")
    for _ in range(30):
        tensors = dict(good)
        for name in randomness.sample(list(good), randomness.choice([1, 2, 20])):
            tensor = tensors.pop(name)
            shape = randomness.choice([(), (0,), (3,), tensor.shape[1:], (1, *tensor.shape), tensor.shape[::-1], None])
            renamed = randomness.choice(
                [name, name, name + ".x", name.replace("0", "9" * 5000), name.replace(".", "..")]
            )
            if shape is not None:
                tensors[renamed] = torch.zeros(shape)
        try:
            if with_plan:
                reconcile(content, tensors, "file.pth")
            else:
                plan_from_tensors(tensors, "file.pth")
        except NnsslAdaptError as error:
            assert "\n" not in str(error)
