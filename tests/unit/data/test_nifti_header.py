"""Headers that contradict themselves are told in our words, by verify and once by predict; ITK's own warnings are not shown."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest

from nnssl_adapt.data.images import NIBABEL, read_image
from nnssl_adapt.data.nifti_header import placement_doubt
from nnssl_adapt.data.verifying.examine import verify_dataset

AFFINE = np.diag([1.0, 1.2, 2.0, 1.0])


def write(path, sform, qform=AFFINE, codes=(1, 1), voxels=None):
    image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.int16) if voxels is None else voxels, None)
    image.header.set_sform(sform, codes[0])
    image.header.set_qform(qform, codes[1])
    nibabel.save(image, path)
    return path


def sheared():
    matrix = AFFINE.copy()
    matrix[0, 1] = 0.3
    return matrix


@pytest.mark.parametrize(
    ("sform", "codes", "word"),
    [
        (AFFINE, (1, 1), None),
        (AFFINE + 1e-5, (1, 1), None),
        (AFFINE, (0, 1), None),
        (np.diag([2.0, 2.4, 4.0, 1.0]), (0, 1), None),
        (np.diag([-1.0, -1.2, 2.0, 1.0]), (2, 1), None),
        (np.diag([2.0, 2.4, 4.0, 1.0]), (1, 1), "2 × 2.4 × 4"),
        (sheared(), (1, 1), "sheared"),
        (AFFINE, (0, 0), "are 0"),
        (np.zeros((4, 4)), (1, 0), "no matrix"),
    ],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_what_is_doubtful(tmp_path, sform, codes, word, ending):
    doubt = placement_doubt(write(tmp_path / f"a{ending}", sform, codes=codes))
    assert doubt is None if word is None else word in doubt


def test_other_files_are_none_of_its_business(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8bnothing")
    (tmp_path / "b.nii").write_bytes(b"short")
    (tmp_path / "c.nrrd").write_bytes(b"NRRD0004")
    for name in ("a.nii.gz", "b.nii", "c.nrrd", "gone.nii"):
        assert placement_doubt(tmp_path / name) is None


def test_the_words_are_ours_and_not_those_of_itk(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.diag([2.0, 2.4, 4.0, 1.0]))
    program = f"from nnssl_adapt.data.images import read_image; print(read_image([{str(path)!r}])[1].spacing)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "sform" not in done.stderr and "2.0, 1.2" in done.stdout
    assert read_image([path], NIBABEL)[1].affines.original[1][1] == pytest.approx(2.4)


def test_verify_warns_of_it(tmp_path):
    from support.synthetic import make_dataset

    root = make_dataset(tmp_path, cases=2, shape=(6, 7, 5))
    for path in (root / "imagesTr" / "case_01_0000.nii.gz", root / "labelsTr" / "case_01.nii.gz"):
        image = nibabel.load(path)
        voxels, affine = np.asarray(image.dataobj).copy(), image.affine.copy()
        scaled = affine.copy()
        scaled[:3, :3] *= 2
        write(path, scaled, affine, voxels=voxels)
    verdict = verify_dataset(root)
    found = [finding for finding in verdict.findings if finding.check == "header"]
    assert verdict.is_good and [finding.level for finding in found] == ["warning"] * 2
    assert {finding.case for finding in found} == {"case_01"} and "pixdim" in found[0].message
