"""Networks with nnU-Net's own names that need more than their tensors: nnInteractive, VoComni, Triad, TotalSegmentator."""

import copy
import json
import zipfile

import pytest
import torch
from support.nnssl_networks import CNN, PLAIN, RES, nnunet_plans, randomised, raw_cnn, raw_primus

from nnssl_adapt.cli.main import main
from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.families.vocomni_nnunet import LABELS
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

PATCH = (8, 16, 16)
SIX = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *([[2, 2, 2]] * 5)],
    "n_conv_per_stage": [2] * 6,
    "n_conv_per_stage_decoder": [2] * 5,
}


def save_folder(folder, network, trainer="nnUNetTrainer", configuration="3d_fullres", **plans):
    """A model folder as nnU-Net leaves it."""
    (folder / "fold_0").mkdir(parents=True)
    content = {**nnunet_plans(RES, 1), **plans}
    dataset = {"channel_names": {"0": "image"}, "labels": {"background": 0, "object": 1}}
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    init_args = {"configuration": configuration, "fold": 0, "plans": content, "dataset_json": dataset}
    weights = {"network_weights": network.state_dict(), "trainer_name": trainer, "init_args": init_args}
    torch.save(weights, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


# -- nnInteractive -------------------------------------------------------------------------------------------------------


@pytest.fixture
def interactive(tmp_path):
    network = randomised(raw_cnn(RES, 8, 2), 1)
    plans = nnunet_plans(RES, 1)
    plans["configurations"] = {"3d_fullres_ps192_bs24": plans["configurations"]["3d_fullres"]}
    folder = tmp_path / "nnInteractive_v1.0"
    plans["dataset_name"] = "Dataset225_nnInteractiveV2"
    save_folder(folder, network, "nnUNetTrainer", "3d_fullres_ps192_bs24", **plans)
    return network, folder


@pytest.mark.parametrize("channels", [1, 2])
def test_of_nninteractive_the_images_channel_is_taken(interactive, channels):
    network, folder = interactive
    checkpoint = open_checkpoint(folder)
    assert checkpoint.plan.num_input_channels == 1 and any("nnInteractive" in note for note in checkpoint.notes)
    assert "nnInteractive" in [entry["name"] for entry in checkpoint.citations]
    ours = build_network(checkpoint.architecture, channels, 3, PATCH).eval()
    report = transfer_weights(checkpoint, ours, channels="repeat")
    assert report.coverage == report.decoder_coverage == 1
    image = torch.randn(1, 1, *PATCH)
    prompts = torch.zeros(1, 7, *PATCH)  # nobody drew anything
    with torch.no_grad():
        same(ours.encoder(image.expand(-1, channels, -1, -1, -1)), network.encoder(torch.cat((image, prompts), 1)))
    assert prove_transfer(checkpoint, ours, channels="repeat").passed


# -- VoComni's plain U-Net and Triad ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six():
    return randomised(raw_cnn(PLAIN, 1, 21, **SIX), 2)


@pytest.mark.parametrize("key", ["state_dict", "network_weights", "net", "student", None])
def test_vocomnis_unet_is_known_by_name_and_size(six, tmp_path, key):
    tensors = {f"module.{name}": tensor for name, tensor in six.state_dict().items()}
    path = tmp_path / "VoComni_nnunet.pt"
    torch.save(tensors if key is None else {key: tensors}, path)
    checkpoint = open_checkpoint(path)
    plan = checkpoint.plan
    assert (
        plan.head_names == LABELS and plan.supervised and plan.spacing == (1.5, 1.5, 1.5) and plan.orientation == "LPI"
    )
    assert plan.normalization_schemes == ("CTNormalization",) and checkpoint.published.id == "vocomni-nnunet"
    statistics = plan.intensity[0]
    assert (statistics["mean"], statistics["std"]) == (-175, 425)
    told = " | ".join(checkpoint.notes)
    assert "-175 … 250" in told and "second-hand" in told and "(x, y, z)" in told
    if key is None:
        # In double precision: the norm of the last stage's two voxels would magnify what float32 rounds.
        image = torch.randn(1, 1, 32, 32, 64, dtype=torch.float64)
        ours = build_network(checkpoint.architecture, 1, 21, (32, 32, 64)).eval()
        report = transfer_weights(checkpoint, ours, head_names=LABELS)
        assert report.coverage == report.decoder_coverage == 1
        ours, six = ours.double(), copy.deepcopy(six).double()
        with torch.no_grad():
            theirs = six.encoder(image.permute(0, 1, 4, 3, 2))
            same(ours.encoder(image), [features.permute(0, 1, 4, 3, 2) for features in theirs])


def test_a_file_of_that_size_with_another_name_is_not_taken_for_it(six, tmp_path, capsys):
    torch.save({"network_weights": six.state_dict()}, tmp_path / "mine.pth")
    checkpoint = open_checkpoint(tmp_path / "mine.pth")
    assert checkpoint.plan.spacing is None and checkpoint.plan.normalization_schemes == ("ZScoreNormalization",)
    assert "vocomni-nnunet" in [model.id for model in checkpoint.similar_published()]
    assert main(["inspect", str(tmp_path / "mine.pth")]) == 0
    assert "by its layout it may be vocomni-nnunet" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder."])
def test_triads_encoder_is_read_without_a_decoder(six, tmp_path, prefix):
    tensors = {f"{prefix}{name}": tensor for name, tensor in six.encoder.state_dict().items()}
    torch.save({"state_dict": tensors}, tmp_path / "Triad_plain_mae.pth")
    checkpoint = open_checkpoint(tmp_path / "Triad_plain_mae.pth", axes="zyx")
    assert not checkpoint.plan.supervised and [entry["name"] for entry in checkpoint.citations] == ["Triad"]
    ours = build_network(checkpoint.architecture, 1, 2, (32, 32, 64)).eval()
    assert transfer_weights(checkpoint, ours).coverage == 1
    image = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        same(ours.encoder(image), six.encoder(image))


# -- TotalSegmentator ----------------------------------------------------------------------------------------------------


def old_form(plans):
    """The plans as nnU-Net before 2.3 wrote them."""
    configuration = plans["configurations"]["3d_fullres"]
    configuration.pop("architecture")
    configuration |= {
        "UNet_class_name": PLAIN,
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "conv_kernel_sizes": CNN["kernel_sizes"],
        "pool_op_kernel_sizes": CNN["strides"],
    }
    return plans


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_fullres_high"])
def test_a_zip_of_totalsegmentator_with_plans_of_the_old_form(tmp_path, configuration):
    network = randomised(raw_cnn(PLAIN, 1, 2, features_per_stage=[4, 8, 8], n_conv_per_stage_decoder=[2, 2]), 3)
    plans = old_form(nnunet_plans(PLAIN, 1))
    plans["configurations"] = {configuration: plans["configurations"]["3d_fullres"]}
    name = "Dataset291_TotalSegmentator_part1_organs_1559subj"
    folder = tmp_path / name / f"nnUNetTrainerNoMirroring__nnUNetPlans__{configuration}"
    save_folder(folder, network, "nnUNetTrainerNoMirroring", configuration, **plans)
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(tmp_path).as_posix())
    checkpoint = open_checkpoint(tmp_path / f"{name}.zip", cache_dir=tmp_path / "cache")
    assert checkpoint.plan.supervised and checkpoint.plan.head_names == ("background", "object")
    ours = build_network(checkpoint.architecture, 1, 2, PATCH).eval()
    report = transfer_weights(checkpoint, ours, head_names=("background", "object"))
    assert report.coverage == report.decoder_coverage == 1
    image = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        assert torch.allclose(ours(image), network(image), rtol=1e-5, atol=1e-5)


# -- SSL3D ---------------------------------------------------------------------------------------------------------------


def test_files_of_the_ssl3d_challenge_without_a_plan(tmp_path):
    folder = tmp_path / "ResEnc-L" / "Datamen"
    folder.mkdir(parents=True)
    network = randomised(raw_cnn(RES, 1, 1), 4)
    torch.save({"network_weights": network.state_dict()}, folder / "Datamen_ResEncL.pth")
    checkpoint = open_checkpoint(tmp_path, filename="ResEnc-L/Datamen")
    ours = build_network(checkpoint.architecture, 1, 2, PATCH).eval()
    assert not checkpoint.plan.supervised and transfer_weights(checkpoint, ours).coverage == 1


def test_the_patch_of_a_primus_without_a_plan_is_a_cube_or_refused(tmp_path):
    width = {"embed_dim": 396, "encoder_eva_numheads": 6, "patch_embed_size": (8, 8, 8), "encoder_eva_depth": 1}
    for patch, fits in (((24, 24, 24), True), ((16, 24, 32), False)):
        network = raw_primus(1, 1, patch, **width)
        torch.save({"network_weights": network.state_dict()}, tmp_path / "Datamen_PrimusM.pth")
        if fits:
            checkpoint = open_checkpoint(tmp_path / "Datamen_PrimusM.pth")
            assert checkpoint.plan.patch_size == patch and any("cube" in note for note in checkpoint.notes)
            ours = build_network(checkpoint.architecture, 1, 2, patch)
            assert transfer_weights(checkpoint, ours).coverage == 1
        else:
            with pytest.raises(AdaptationPlanError, match="patch"):
                open_checkpoint(tmp_path / "Datamen_PrimusM.pth")
