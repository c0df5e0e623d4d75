"""What a run is made of: nnU-Net's environment variables."""

from nnssl_adapt.training.setup import ignored_variables


def test_variables_without_effect_are_told():
    assert ignored_variables({"nnUNet_n_proc_DA": "3", "nnUNet_compile": "F", "nnUNet_extTrainer": ""}) == []
    told = ignored_variables({"nnUNet_n_proc_DA": "three", "nnUNet_compile": "perhaps", "nnUNet_extTrainer": "/x"})
    assert [line.split("=")[0].split(" ")[0] for line in told] == [
        "nnUNet_extTrainer",
        "nnUNet_n_proc_DA",
        "nnUNet_compile",
    ]
