"""A study meets its dataset: what the dataset can't give is told at once, before anything is written."""

import pytest
from support.synthetic import make_dataset

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.studies.study import Study


def test_what_the_dataset_lacks_is_told_together(nnunet_folders):
    make_dataset(nnunet_folders / "nnUNet_raw", "Dataset990_Study", cases=5)
    weights = {"nobody": 2.0}
    content = {
        "dataset": 990,
        "folds": [0, 7],
        "fractions": [0.3, 0.4, 1.0],
        "classes": ["unheard_of"],
        "arms": {"a": {"weights": "x/y"}, "b": {"weights": "scratch", "set": {"class_weights": weights}}},
    }
    with pytest.raises(ConfigurationError) as caught:
        Study.load(content)
    text = " | ".join(caught.value.mistakes)
    assert all(word in text for word in ("fold 7", "unheard_of", "nobody", "0.3 and 0.4"))
    assert not list((nnunet_folders / "nnUNet_results").rglob("splits_*.json"))
