"""nnU-Net's folders, and datasets by number or name."""

from pathlib import Path

import pytest

from nnssl_adapt import paths
from nnssl_adapt.errors import ConfigurationError, DatasetNotFound


def make(root, folder, *names):
    for name in names:
        (root / f"nnUNet_{folder}" / name).mkdir()


@pytest.mark.parametrize("given", [41, "41", "041", " 41 ", "Dataset041_DeepGrey"])
@pytest.mark.parametrize("folder", ["raw", "preprocessed", "results"])
def test_a_dataset_is_found_by_number_or_name_in_any_folder(nnunet_folders, folder, given):
    make(nnunet_folders, folder, "Dataset041_DeepGrey", "Dataset141_Other", "Dataset41_NoId")
    assert paths.find_dataset_name(given) == "Dataset041_DeepGrey"


def test_an_unknown_dataset_is_answered_with_those_that_exist(nnunet_folders):
    make(nnunet_folders, "raw", "Dataset041_DeepGrey")
    (nnunet_folders / "nnUNet_raw" / "Dataset042_File").touch()
    with pytest.raises(DatasetNotFound, match="Dataset041_DeepGrey") as caught:
        paths.find_dataset_name(42)
    assert "Dataset042_File" not in str(caught.value) and "nnUNet_raw=" in str(caught.value)


def test_one_number_with_two_names(nnunet_folders):
    make(nnunet_folders, "raw", "Dataset041_A")
    make(nnunet_folders, "results", "Dataset041_B")
    with pytest.raises(DatasetNotFound, match="Dataset041_A, Dataset041_B"):
        paths.find_dataset_name(41)
    assert paths.find_dataset_name("Dataset041_B") == "Dataset041_B"


@pytest.mark.parametrize(("asked", "taken", "expected"), [(5, (), 5), (5, (5, 6), 7), (999, (999,), 998), (0, (1,), 2)])
def test_the_next_free_number(nnunet_folders, asked, taken, expected):
    make(nnunet_folders, "preprocessed", *(f"Dataset{number:03}_X" for number in taken))
    assert paths.free_dataset_id(asked) == expected


def test_no_number_is_free(nnunet_folders):
    make(nnunet_folders, "raw", *(f"Dataset{number:03}_X" for number in range(1, 1000)))
    with pytest.raises(ConfigurationError, match="999"):
        paths.free_dataset_id(3)


@pytest.mark.parametrize("name", ["raw", "preprocessed", "results"])
def test_an_unset_variable_is_named_with_what_to_type(nnunet_folders, monkeypatch, name):
    monkeypatch.setenv(f"nnUNet_{name}", "")
    with pytest.raises(ConfigurationError, match=f"export nnUNet_{name}="):
        getattr(paths, f"{name}_folder")()


def test_only_the_raw_folder_must_exist(nnunet_folders, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(nnunet_folders / "none"))
    assert paths.preprocessed_folder() == paths.results_folder() == nnunet_folders / "none"
    with pytest.raises(ConfigurationError, match="not a folder"):
        paths.raw_folder()


def test_optional_folders(nnunet_folders, monkeypatch):
    assert paths.pretrained_models_folder() is None
    monkeypatch.setenv("nnssl_pretrained_models", "~/weights")
    assert paths.pretrained_models_folder() == Path("~/weights").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(nnunet_folders / "cache"))
    assert paths.downloads_folder() == nnunet_folders / "cache" / "nnssl_adapt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.downloads_folder() == Path.home() / ".cache" / "nnssl_adapt"
