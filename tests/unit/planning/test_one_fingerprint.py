"""Several processes that need a dataset's fingerprint at the same time: one makes it."""

import os
import time

import pytest
from support.killing import forked
from support.synthetic import make_dataset

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.machine import lock
from nnssl_adapt.planning import dataset_files


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_of_many_makes_it_and_the_others_wait(nnunet_folders, monkeypatch):
    raw = RawDataset.open(make_dataset(nnunet_folders / "nnUNet_raw", cases=2))
    monkeypatch.setattr(lock, "_LOOK_EVERY", 0.05)
    examine = dataset_files.examine_dataset
    made = nnunet_folders / "made"
    made.mkdir()

    def slowly_examined(*arguments, **options):
        (made / f"examined_{os.getpid()}").touch()
        time.sleep(0.5)
        return examine(*arguments, **options)

    monkeypatch.setattr(dataset_files, "examine_dataset", slowly_examined)
    children = [forked(lambda: dataset_files.load_or_make_fingerprint(raw, workers=1)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert sorted(path.name.split("_")[0] for path in made.iterdir()) == ["examined"]
    assert len(dataset_files.load_or_make_fingerprint(raw).spacings) == 2
