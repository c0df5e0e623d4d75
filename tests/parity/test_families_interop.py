"""Stand-ins of published networks, fine-tuned for two tiny epochs from the command line, and predicted with by us and by nnU-Net.

They are made of their authors' own classes (MONAI's) with random weights, in the layout of the published files.
"""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.monai_files import seg_res_net, swin_file, swin_unetr
from support.nnunet_prediction import predict_by_nnunet
from support.synthetic import make_dataset

import nnssl_adapt as na
from nnssl_adapt.cli.main import main
from nnssl_adapt.inference.model_folder import ModelFolder

BY_NNUNET_TOO = ("vocomni", "ctfm")
"""One of each network of ours: the others have the same trainer class."""

SWIN = ("vocomni", "nvidia")

TINY = """epochs: 2
iterations_per_epoch: 1
validation_iterations: 1
optimizer: adamw
learning_rate: 0.001
warmup_epochs: 1
augmentation: none
mirror_axes: []
precision: fp32
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patched.setenv(f"nnUNet_{name}", str(root / name))
        make_dataset(root / "raw", "Dataset931_Few", cases=3, shape=(22, 30, 26), spacing=(2.0, 1.0, 1.3))
        images = root / "images"
        images.mkdir()
        source = root / "raw" / "Dataset931_Few" / "imagesTr" / "case_01_0000.nii.gz"
        (images / source.name).write_bytes(source.read_bytes())
        yield root


def content_of(family):
    if family in SWIN:
        return swin_file(family, swin_unetr(1, 21, 2 if family == "vocomni" else 1))
    return seg_res_net(family)[1]


def changed(**fields):
    return [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.parametrize(
    ("family", "more", "frozen"),
    [
        ("vocomni", changed(layer_decay=0.8, ema_decay=0.9, channels_last=True, activation_checkpointing=True), ()),
        ("nvidia", ["--lora", "2"], ("encoder.stem", "encoder.stages.2.swin.blocks.0.mlp.")),
        ("ctfm", changed(deep_supervision=True, accumulate=2, loss="dice", class_weights="none"), ()),
        ("suprem", ["--freeze", "encoder"], ("encoder.",)),
        ("vista3d", changed(decoder_warmup_epochs=1, warmup_epochs=0, encoder_learning_rate=1e-4, optimizer="sgd"), ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fine_tuned_and_predicted_with(world, family, more, frozen):
    weights = world / f"{family}.pt"
    torch.save(content_of(family), weights)
    flags = [
        "-am",
        "no_resample",
        "--ignore-orientation",
        "--patch",
        *(("64", "32", "32") if family in SWIN else ("16", "16", "16")),
        "--batch",
        "2",
        "-f",
        "0",
        "-device",
        "cpu",
    ]
    flags += ["-np", "1", "--workers", "0"]
    recipe = world / "tiny.yaml"
    recipe.write_text(TINY)
    given = ["finetune", "-d", "931", "-pc", str(weights), "-n", family, *flags, "--recipe", str(recipe), *more]
    assert main(given) == 0
    (model,) = (world / "results" / "Dataset931_Few").glob(f"*ptPlans__{family}__*")
    folder = ModelFolder.open(model)
    assert (model / "trainer_class.py").is_file()
    assert folder.plan.content["transpose_forward"] == ([2, 1, 0] if family in SWIN else [0, 1, 2])
    ours = world / f"{family}_ours"
    na.Predictor(model, device="cpu", accumulation_dtype=torch.float16).predict(world / "images", ours)
    assert (ours / "case_01.nii.gz").is_file()
    started = na.open_checkpoint(weights).tensors
    found = folder.load_weights(0).network_weights
    known = {name for name, tensor in found.items() if name in started and started[name].shape == tensor.shape}
    same = {name for name in known if torch.equal(found[name], started[name])}
    assert not frozen or {name for name in known if name.startswith(frozen)} <= same
    assert known - same, "nothing of what was pre-trained has learned"
    if family in BY_NNUNET_TOO:
        check_nnunets_prediction(model, world / "images", ours, world / f"{family}_theirs")


def check_nnunets_prediction(model, images, ours, theirs):
    """nnU-Net builds the network by ``trainer_class.py`` alone; it sums tiles in float16, as ours were here."""
    predict_by_nnunet(model, images, theirs, trainers=model)
    found, expected = (sitk.GetArrayFromImage(sitk.ReadImage(str(f / "case_01.nii.gz"))) for f in (ours, theirs))
    assert np.mean(found == expected) >= 0.999
