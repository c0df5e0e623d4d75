"""Conversions that are killed, that meet damaged files, and 4D images with several channels."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.killing import killed_while
from support.synthetic import write_image

from nnssl_adapt.data.convert.cases import Target, training_case
from nnssl_adapt.data.convert.conversion import memory_to_convert
from nnssl_adapt.data.convert.loose import convert_pairs
from nnssl_adapt.errors import DatasetError, OutputError

SHAPE, SPACING = (5, 8, 7), (2.0, 1.0, 1.3)


@pytest.fixture
def sources(tmp_path: Path, nnunet_folders: Path) -> Path:
    """Images ``scan_N.nii.gz`` of two channels in one 4D file each, labels ``scan_N_seg.nii.gz``."""
    folder = tmp_path / "sources"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(6):
        channels = []
        for _ in range(2):
            channel = sitk.GetImageFromArray(draw.integers(1, 900, SHAPE).astype(np.int16))
            channel.SetSpacing(SPACING[::-1])
            channels.append(channel)
        sitk.WriteImage(sitk.JoinSeries(channels), str(folder / f"scan_{number}.nii.gz"))
        write_image(folder / f"scan_{number}_seg.nii.gz", draw.integers(0, 3, SHAPE).astype(np.uint8), SPACING)
    return folder


def convert(sources: Path, number: int = 7) -> Path:
    pattern = str(sources / "*_seg.nii.gz")
    images = str(sources / "scan_?.nii.gz")
    labels = pattern.replace("*", "scan_?")
    return convert_pairs([images], labels, Target.named(number, "Pairs"), workers=1).folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*.nii.gz")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_ten_random_moments_it_ends_as_if_undisturbed(sources: Path) -> None:
    started = time.monotonic()
    expected = content(convert(sources, 8))
    duration = time.monotonic() - started
    assert len(expected) == 6 * 3
    moments = random.Random(3)
    folder = Target.named(7, "Pairs").folder
    killed = 0
    while killed < 10:
        if killed_while(lambda: convert(sources), moments.uniform(0, duration)):
            killed += 1
        else:  # it was quicker than the first one
            duration *= 0.8
        whole = sorted(p for p in folder.glob("*/*.nii.gz") if not p.name.startswith("."))
        if len(whole) == len(expected):  # begin again with half of it
            for path in moments.sample(whole, 9):
                path.unlink()
    assert convert(sources) == folder
    assert content(folder) == expected
    assert (folder / "dataset.json").is_file()
    assert not list(folder.glob("*/.unfinished*"))


def test_what_a_killed_conversion_left_half_written_is_removed(sources: Path) -> None:
    folder = convert(sources)
    (folder / "imagesTr" / ".unfinished-abc-scan_9_0000.nii.gz").write_bytes(b"half")
    (folder / "labelsTr" / ".unfinished-def").mkdir()
    (folder / "labelsTr" / ".unfinished-def" / "scan_9.nii.gz").write_bytes(b"half")
    assert not list(convert(sources).glob("*/.unfinished*"))


def test_a_damaged_image_is_found_when_it_is_copied(sources: Path) -> None:
    damaged = sources / "scan_2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-60])
    with pytest.raises(DatasetError, match=r"(?s)scan_2.*truncated"):
        convert(sources)
    folder = Target.named(7, "Pairs").folder
    assert not (folder / "dataset.json").exists() and not list(folder.glob("*/2*"))
    assert len(content(folder)) == 5 * 3


def test_a_full_disk_is_not_taken_for_a_finished_copy(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = sitk.WriteImage

    def half(image: sitk.Image, name: str, *more: object) -> None:
        """What ITK leaves of a compressed NIfTI on a full disk, without a word."""
        write(image, name, *more)
        Path(name).write_bytes(Path(name).read_bytes()[:-60])

    monkeypatch.setattr("SimpleITK.WriteImage", half)
    with pytest.raises(OutputError, match=r"0_0000.nii.gz could not be written whole"):
        convert(sources)
    assert content(Target.named(7, "Pairs").folder) == {}


def test_memory_is_foreseen_from_the_header(sources: Path) -> None:
    case = training_case("a", [sources / "scan_0.nii.gz"], sources / "scan_0_seg.nii.gz", ".nii.gz")
    assert memory_to_convert(case) == np.prod(SHAPE) * (8 * 2 + 10)
