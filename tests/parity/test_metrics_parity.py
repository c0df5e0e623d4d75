"""summary.json against nnU-Net's on the same folders."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

pytest.importorskip("nnunetv2")

from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.evaluation.metrics import evaluate_folder

SCHEMES = {
    "labels": {"labels": {"background": 0, "a": 1, "b": 2, "absent": 3}},
    "ignore": {"labels": {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}},
    "regions": {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3},
        "regions_class_order": [1, 2, 3],
    },
    "regions and ignore": {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3], "ignore": 4},
        "regions_class_order": [1, 2, 3],
    },
}


@pytest.fixture
def folders(tmp_path):
    """Three cases of different shapes; case 2 has no label 2 and case 1's prediction is empty."""
    random = np.random.default_rng(3)
    for part in ("prediction", "reference"):
        (tmp_path / part).mkdir()
    for number, shape in enumerate([(10, 20, 30), (12, 20, 28), (9, 22, 30)]):
        reference = random.integers(0, 5, shape)
        reference[reference == 3] = 0
        prediction = np.where(random.random(shape) < 0.7, reference, random.integers(0, 3, shape))
        if number == 1:
            prediction[:] = 0
        if number == 2:
            reference[reference == 2] = 0
            prediction[prediction == 2] = 1
        for part, voxels in (("prediction", prediction), ("reference", reference)):
            write_image(tmp_path / part / f"case_{number}.nii.gz", voxels.astype(np.uint8), (3, 1, 0.5))
    return tmp_path


@pytest.mark.parametrize("name", SCHEMES)
def test_summary_is_the_same_file(folders, name):
    content = SCHEMES[name]
    peers = LabelManager(content["labels"], content.get("regions_class_order"))
    theirs = folders / "theirs.json"
    compute_metrics_on_folder(
        str(folders / "reference"),
        str(folders / "prediction"),
        str(theirs),
        SimpleITKIO(),
        ".nii.gz",
        peers.foreground_regions if peers.has_regions else peers.foreground_labels,
        peers.ignore_label,
        num_processes=1,
    )
    ours = folders / "ours.json"
    scheme = LabelScheme.from_dataset_json(content)
    evaluate_folder(folders / "prediction", folders / "reference", scheme, ".nii.gz", output=ours)
    # As text: NaN is not equal to itself, and the order of keys and the number types belong to the form.
    assert json.dumps(json.loads(ours.read_text())) == json.dumps(json.loads(theirs.read_text()))
    assert "NaN" in ours.read_text() or name != "labels"
    assert load_summary_json(str(ours))["mean"].keys() == load_summary_json(str(theirs))["mean"].keys()


@pytest.mark.parametrize("name", SCHEMES)
def test_nnunet_reads_what_has_more_in_it(folders, name):
    """With further metrics nnU-Net's own numbers stay, and its reader takes the file."""
    scheme = LabelScheme.from_dataset_json(SCHEMES[name])
    # 4 is no label in predictions, nor in references where nothing is ignored: nnU-Net passes over it, `evaluate` refuses it.
    parts = ("prediction",) if scheme.ignore_label is not None else ("prediction", "reference")
    for path in (path for part in parts for path in (folders / part).iterdir()):
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        write_image(path, np.where(labels > 3, 0, labels).astype(np.uint8), (3, 1, 0.5))
    arguments = folders / "prediction", folders / "reference", scheme, ".nii.gz"
    plain = evaluate_folder(*arguments, output=folders / "plain.json")
    evaluate_folder(*arguments, output=folders / "more.json", judging=Judging(tolerance=2.0))
    theirs, more = (load_summary_json(str(folders / f"{kind}.json")) for kind in ("plain", "more"))
    assert more["mean"].keys() == theirs["mean"].keys() == plain.mean.keys()
    for entry, metrics in theirs["mean"].items():
        assert "HD95" not in metrics
        assert more["mean"][entry]["HD95"] > 0 or entry in (3, (3,))  # no reference has a 3
        kept = {key: more["mean"][entry][key] for key in metrics}
        assert json.dumps(kept) == json.dumps(metrics)
