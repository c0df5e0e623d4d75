"""Every command in docs/datasets.md and docs/sharing.md runs, in their order, on tiny data."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.synthetic import write_image

from nnssl_adapt.cli import main as program
from nnssl_adapt.cli import preprocess

DOCS = Path(__file__).parents[3] / "docs"
SHAPE, SPACING = (4, 6, 5), (2.0, 1.0, 1.3)
ALONE = {"convert": ["-np", "1"], "verify": ["-np", "1"], "predict": ["-device", "cpu"], "package": []}
"""Flags that a small machine needs."""


def commands(document):
    """The commands in code blocks, and those that fill a cell of a table."""
    text = (DOCS / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = "\n".join(block for language, block in fenced if language in ("", "bash"))
    found = re.findall(r"^((?:nnssl-adapt|nnUNetv2_\w+) .*)$", blocks, re.MULTILINE)
    found += re.findall(r"^\|[^|]*\| `(nnssl-adapt [^`]*)` \|$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def run(words):
    if words[0] == "nnUNetv2_preprocess_like_nnssl":
        return preprocess.main([*words[1:], "-np", "1"])
    return program.main([*words[1:], *ALONE.get(words[1], [])])


def write_pair(image, label, seed):
    voxels = np.random.default_rng(seed).integers(1, 900, SHAPE).astype(np.int16)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_image(image, voxels, SPACING)
    write_image(label, (voxels % 3).astype(np.uint8), SPACING)


@pytest.fixture
def workplace(nnunet_folders, monkeypatch):
    monkeypatch.chdir(nnunet_folders)
    return nnunet_folders


def test_datasets(workplace):
    for number in range(3):
        write_pair(
            Path(f"Task05_Prostate/imagesTr/p{number}.nii.gz"),
            Path(f"Task05_Prostate/labelsTr/p{number}.nii.gz"),
            number,
        )
        old = Path("Task004_Hippocampus")
        write_pair(old / f"imagesTr/h{number}_0000.nii.gz", old / f"labelsTr/h{number}.nii.gz", number)
        inner, name = f"sub-{number}/anat", f"sub-{number}_T2w"
        write_pair(
            Path(f"FOLDER/{inner}/{name}.nii.gz"), Path(f"FOLDER/derivatives/labels/{inner}/{name}_seg.nii.gz"), number
        )
        write_pair(Path(f"scans/c{number}.nii.gz"), Path(f"masks/c{number}_mask.nii.gz"), number)
    labels = {"0": "background", "1": "core", "2": "rim"}
    for task in ("Task05_Prostate", "Task004_Hippocampus"):
        Path(task, "dataset.json").write_text(json.dumps({"modality": {"0": "T2"}, "labels": labels, "numTraining": 3}))
    done = commands("datasets.md")
    assert {words[2] for words in done if words[1] == "convert"} == {"msd", "nnunetv1", "bids", "pairs", "reorient"}
    for words in sorted(done, key=lambda words: words[1] == "verify"):
        assert run(words) == 0, words
    made = sorted(path.name for path in (workplace / "nnUNet_raw").iterdir())
    assert made == [
        "Dataset004_Hippocampus",
        "Dataset005_Prostate",
        "Dataset101_Cord",
        "Dataset102_Mine",
        "Dataset602_Mine_RPI",
    ]


def test_sharing(workplace, hub, trained, tiny_dataset, monkeypatch, capsys):
    monkeypatch.setattr("nnssl_adapt.sharing.proof.importlib.util.find_spec", lambda name: None)  # without nnU-Net
    monkeypatch.setenv("HF_HOME", str(workplace / "hf"))
    model = trained(transpose=(0, 1, 2), spacing=(2.0, 1.0, 1.3))
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps({**plans, "dataset_name": "Dataset041_DeepGrey"}))
    described = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**described, "image_orientation": "RAI"}))  # as the next dataset's
    model.rename("MODEL_FOLDER")
    raw = tiny_dataset(name="Dataset042_Next", cases=2)
    Path("IMAGES").mkdir()
    shutil.copy(raw / "imagesTr" / "case_00_0000.nii.gz", "IMAGES")
    done = [words for words in commands("sharing.md") if not any("https://github.com" in word for word in words)]
    assert {words[1] for words in done if words[0] == "nnssl-adapt"} == {
        "name", "package", "install", "models", "predict", "push"
    }  # fmt: skip
    # What takes the model from the hub comes after the push, which the document explains last.
    for words in sorted(done, key=lambda words: "OWNER/NAME" in words and words[1] != "push"):
        if words[1] == "install":  # each of them installs the same model
            shutil.rmtree(workplace / "nnUNet_results", ignore_errors=True)
        assert run(words) == 0, words
    assert "model_seg_sc-gm_t2star_unet3d\n" in capsys.readouterr().out
    assert [path.name for path in Path("OUTPUT").glob("*.nii.gz")] == ["case_00.nii.gz"]
    plans = list((workplace / "nnUNet_preprocessed" / "Dataset042_Next").glob("ptPlans__cord*.json"))
    assert len(plans) == 1
