"""Plans for weights of a segmentation network: its axes, its normalisation, its orientation, and whether they fit at all."""

import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import nnssl_adapt as na
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.errors import ConfigurationError, DatasetError, PlanError, TransferError
from nnssl_adapt.planning.preflight import check_transfer, find_other_orientations
from nnssl_adapt.weights.transfer.settings import TransferSettings


def turn(folder, cases, direction):
    for path in folder.glob("*Tr/*"):
        if any(path.name.startswith(case) for case in cases):
            image = sitk.ReadImage(str(path))
            image.SetDirection(direction)
            sitk.WriteImage(image, str(path))


LPI = [-1, 0, 0, 0, -1, 0, 0, 0, 1]
RPI = [1, 0, 0, 0, -1, 0, 0, 0, 1]


def test_the_network_sees_the_axes_it_was_trained_on(tiny_dataset, supervised):
    """Spacing and order of axes are the source's; its first axis is the image's third."""
    tiny_dataset(spacing=(2.0, 1.0, 1.3))
    checkpoint = supervised(spacing=(0.9, 1.1, 1.7), transpose_forward=(2, 0, 1), patch_size=(48, 16, 8))
    checkpoint = replace(checkpoint, plan=checkpoint.plan.model_copy(update={"recommended_patch_size": None}))
    plan = na.make_plan(991, checkpoint, name="a", workers=1)
    assert plan.transpose_forward == (2, 0, 1)
    assert plan.transpose_backward == (1, 2, 0)
    assert plan.spacing == (0.9, 1.1, 1.7)
    # Images of about 20 × 28 × 24 voxels (Z, Y, X) of 2 × 1 × 1.3 mm become, axes X, Z, Y, about 35 × 36 × 17 before cropping.
    shape = np.array(plan.settings_of_configuration["median_image_size_in_voxels"])
    assert np.all(shape <= [36, 39, 18]) and np.all(shape >= [26, 27, 12])
    case = RawDataset.open(991).cases[0]
    stored = na.preprocess_case(case, plan.settings, RawDataset.open(991).labels)
    size = np.array(sitk.ReadImage(str(case.images[0])).GetSize()[::-1]) * [2.0, 1.0, 1.3]  # mm, Z Y X
    assert np.all(np.array(stored.data.shape[1:]) * plan.spacing <= size[[2, 0, 1]] + 2)
    assert abs(stored.data.shape[1] * 0.9 - size[2]) < 9  # only cropping is between them
    # The same with every image's own spacing, and nnU-Net's rule where the user asks for it.
    assert na.make_plan(991, checkpoint, mode="no_resample", workers=1).transpose_forward == (2, 0, 1)
    assert na.make_plan(991, checkpoint, mode="median", workers=1).transpose_forward == (0, 1, 2)
    fixed = na.make_plan(991, checkpoint, mode="fixed", spacing=(1.5, 3.0, 2.0), workers=1)  # of the image's Z, Y, X
    assert (fixed.transpose_forward, fixed.spacing) == ((2, 0, 1), (2.0, 1.5, 3.0))


def test_weights_for_one_orientation_get_their_axes_whatever_the_spacing(tiny_dataset, supervised):
    folder = tiny_dataset(spacing=(1.0, 1.0, 3.0))  # nnU-Net would put the last axis first
    turn(folder, ["case"], RPI)
    checkpoint = supervised(orientation="RPI")
    for mode in ("median", "no_resample", "like_pretrained"):
        assert na.make_plan(991, checkpoint, mode=mode, workers=1).transpose_forward == (0, 1, 2)
    assert na.make_plan(991, supervised(), mode="median", workers=1).transpose_forward == (2, 0, 1)


def test_weights_without_spacing_get_the_median_in_their_own_order_of_axes(tiny_dataset, supervised, caplog):
    tiny_dataset(spacing=(2.0, 1.0, 1.3))
    plan = na.make_plan(991, supervised(spacing=None, transpose_forward=(1, 2, 0)), workers=1)
    assert plan.transpose_forward == (1, 2, 0)
    assert plan.spacing == pytest.approx((1.0, 1.3, 2.0))
    assert any("does not say at which spacing this network was trained" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("by_nnssl", "told"), [(True, "in their own spacing"), (False, "does not say at which spacing")]
)
def test_images_kept_their_own_spacing_only_where_a_plan_says_so(tiny_dataset, supervised, caplog, by_nnssl, told):
    """A file of tensors alone says nothing of its images (FOMO's, BrainSegFounder's)."""
    tiny_dataset()
    checkpoint = supervised(supervised=False, spacing=None)
    if not by_nnssl:
        checkpoint = replace(checkpoint, plan=checkpoint.plan.model_copy(update={"raw": {}}))
    na.make_plan(991, checkpoint, workers=1)
    assert [told in message for message in caplog.messages if "the dataset's median" in message] == [True]


def test_ct_weights_use_the_datasets_own_intensities(tiny_dataset, supervised):
    tiny_dataset()
    plan = na.make_plan(991, supervised(normalization_schemes=("CTNormalization",)), name="ct", workers=1)
    assert plan.plans_name.endswith("Norm__CT")
    fingerprint = json.loads((plan.dataset_folder / "dataset_fingerprint.json").read_text())
    own = fingerprint["foreground_intensity_properties_per_channel"]["0"]
    assert plan.settings.intensity_properties["0"]["percentile_99_5"] == own["percentile_99_5"]


def test_each_channel_is_normalised_as_the_one_whose_kernel_it_takes(tiny_dataset, supervised):
    folder = tiny_dataset(channels=3)
    content = json.loads((folder / "dataset.json").read_text())
    content["channel_names"] = {"0": "PET", "1": "CT", "2": "T1"}
    (folder / "dataset.json").write_text(json.dumps(content))
    checkpoint = supervised(
        normalization_schemes=("CTNormalization", "NoNormalization"), use_mask_for_norm=(False, True)
    )
    kernel = checkpoint.tensors["encoder.stages.0.0.convs.0.conv.weight"]
    tensors = {
        name: torch.cat([tensor, tensor], 1) if tensor.shape == kernel.shape and ".0.0.convs.0." in name else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    checkpoint = replace(checkpoint, tensors=tensors, plan=checkpoint.plan.model_copy(update={"num_input_channels": 2}))
    with pytest.raises(PlanError, match="differently .*--channels, such as PET=0,CT=1,T1=1"):
        na.make_plan(991, checkpoint, workers=1)
    plan = na.make_plan(991, checkpoint, transfer=TransferSettings(channels=(1, 0, None)), workers=1)
    assert plan.settings.normalization_schemes == ("NoNormalization", "CTNormalization", "ZScoreNormalization")
    assert plan.settings.use_mask_for_norm == (True, False, False)


# -- orientation -----------------------------------------------------------------------------------------------------


def test_images_that_lie_otherwise_stop_it(tiny_dataset, supervised, caplog):
    folder = tiny_dataset()
    turn(folder, ["case"], RPI)
    turn(folder, ["case_01", "case_03"], LPI)
    assert find_other_orientations(RawDataset.open(991), "RPI") == {
        "imagesTr/case_01_0000.nii.gz": "LPI",
        "labelsTr/case_01.nii.gz": "LPI",
        "imagesTr/case_03_0000.nii.gz": "LPI",
        "labelsTr/case_03.nii.gz": "LPI",
    }
    with pytest.raises(DatasetError) as error:
        na.make_plan(991, supervised(orientation="RPI"), workers=1)
    assert "trained on RPI images" in str(error.value)
    assert "4 files of Dataset991_Tiny are not:\n  LPI: 4 (imagesTr/case_01_0000.nii.gz, labelsTr/" in str(error.value)
    assert "--reorient RPI" in str(error.value) and "--ignore-orientation" in str(error.value)
    assert (
        na.make_plan(991, supervised(orientation="RPI"), ignore_orientation=True, workers=1).dataset_name == folder.name
    )
    turn(folder, ["case_01", "case_03"], RPI)
    with caplog.at_level("INFO", logger="nnssl_adapt"):
        plan = na.make_plan(991, supervised(orientation="RPI"), workers=1)
    assert any("all images are RPI" in message for message in caplog.messages)
    assert plan.provenance.orientation == "RPI"


def test_weights_that_want_no_orientation_take_any(tiny_dataset, supervised):
    folder = tiny_dataset()
    turn(folder, ["case_01"], LPI)
    assert na.make_plan(991, supervised(), workers=1).provenance.orientation is None


def test_reoriented_copies_are_what_is_planned_for(tiny_dataset, supervised):
    folder = tiny_dataset(cases=5)
    turn(folder, ["case_01"], LPI)
    checkpoint = supervised(orientation="RPI")
    plan = na.make_plan(991, checkpoint, name="a", reorient="RPI", workers=1)
    assert plan.dataset_name == "Dataset999_Tiny_RPI"
    store = na.preprocess_dataset(plan, workers=1, progress=False)
    assert plan.dataset_json.raw["image_orientation"] == "RPI"
    assert len(store.identifiers) == 5
    again = na.make_plan(991, checkpoint, name="a", reorient="RPI", workers=1)
    assert again.content == plan.content
    # Asked for again on the copies, there is nothing to copy.
    assert na.make_plan("Dataset999_Tiny_RPI", checkpoint, name="a", reorient="RPI", workers=1).content == plan.content
    with pytest.raises(DatasetError, match="trained on RPI"):
        na.make_plan(991, checkpoint, reorient="LAS", workers=1)
    with pytest.raises(ConfigurationError, match="three letters"):
        na.make_plan(991, checkpoint, reorient="LAX", workers=1)


# -- whether the weights fit -----------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_found_before_anything_is_measured(tiny_dataset, supervised):
    folder = tiny_dataset()
    fingerprint = folder.parents[1] / "nnUNet_preprocessed" / folder.name / "dataset_fingerprint.json"
    fingerprint.unlink()
    checkpoint = supervised()
    broken = replace(
        checkpoint, tensors={name: t for name, t in checkpoint.tensors.items() if ".stages.2." not in name}
    )
    with pytest.raises(TransferError, match="encoder.stages"):
        na.make_plan(991, broken, workers=1)
    assert not fingerprint.exists()


@pytest.mark.parametrize("name", ["small_resenc", "small_plainconv", "small_primus_simmim"])
def test_the_check_says_what_training_will_get(tiny_dataset, small_resenc, name, caplog):
    tiny_dataset(channels=2)
    checkpoint = na.open_checkpoint(small_resenc.parent / name)
    before = torch.random.get_rng_state()
    with caplog.at_level("INFO", logger="nnssl_adapt"):
        report = check_transfer(
            RawDataset.open(991), checkpoint, checkpoint.architecture, checkpoint.plan.patch_size, TransferSettings()
        )
    assert report.coverage == 1.0
    assert any(message.startswith("weights fit: 100.0% of the encoder") for message in caplog.messages)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_settings_of_the_transfer_are_kept_in_the_plan(tiny_dataset, small_resenc):
    tiny_dataset(channels=2)
    settings = TransferSettings(scope="encoder", channels=(0, None), waive=("encoder.stages.1.*",))
    plan = na.make_plan(991, na.open_checkpoint(small_resenc), transfer=settings, workers=1)
    plan.save()
    assert na.FinetunePlan.find(plan.dataset_name, plan.plans_name).transfer_settings == settings


def test_a_waiver_that_fits_nothing_is_found_now_and_not_after_preprocessing(tiny_dataset, small_resenc):
    tiny_dataset()
    with pytest.raises(TransferError, match="encoder.stagez"):
        na.make_plan(991, na.open_checkpoint(small_resenc), transfer=TransferSettings(waive=("encoder.stagez.*",)))


@pytest.mark.parametrize("mode", ["median", "like_pretrained", "no_resample"])
def test_images_are_turned_for_a_network_of_xyz_arrays_that_is_not_symmetric(tiny_dataset, tmp_path, mode):
    """A Swin UNETR of unknown origin has no orientation, and its axes are (x, y, z) at any spacing."""
    from support.monai_files import swin_file, swin_unetr

    tiny_dataset(spacing=(2.0, 1.0, 1.3), channels=1)
    torch.save(swin_file("unknown", swin_unetr(1, 5)), tmp_path / "unknown.pt")
    checkpoint = na.open_checkpoint(tmp_path / "unknown.pt", patch_merging="old")
    plan = na.make_plan(991, checkpoint, mode=mode, workers=1)
    assert plan.content["transpose_forward"] == [2, 1, 0]
    assert mode == "no_resample" or plan.spacing == pytest.approx((1.3, 1.0, 2.0))
