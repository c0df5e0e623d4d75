"""``nnssl-adapt submit``: what is wrong is said before anything is submitted or written."""

import pytest

from nnssl_adapt.cli import main
from nnssl_adapt.cli.submit import parse_folds
from nnssl_adapt.errors import ConfigurationError


@pytest.fixture
def words(tiny_dataset, small_resenc, monkeypatch, tmp_path):
    """A submission of a dataset with its fingerprint, where an sbatch seems to be."""
    tiny_dataset(shape=(20, 28, 24))
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/bash\necho 'sbatch: error: not asked for' >&2\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return ["submit", "-d", "991", "-pc", str(small_resenc), "-n", "mae", "-device", "cpu", "--patch", "16", "24", "16"]


def written(tmp_path):
    return [path for path in (tmp_path / "nnUNet_results").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folds", "0-9"], "fold 5, 6, 7, 8, 9 does not exist"),
        (["--folds", "x"], "--folds x: expected such as 0-4"),
        (["--shards", "0"], "--shards 0: expected 1 or more"),
        (["--time", "1h"], "--time 1h: expected minutes"),
        (["--stage", "scratch"], "--stage scratch: expected a folder"),
        (["--setup", "/no/such/file"], "--setup /no/such/file: no such file"),
        (["--gpus", "4"], "a batch of 2 can't be shared by 4 processes"),
        (["--gpus", "a100"], "--gpus a100: expected a number"),
        (["--nodes", "2", "--cluster", "local"], "--nodes 2 with --cluster local"),
        (["--reorient", "RPI"], "nnssl-adapt reorient"),
        (["--fit-gpu", "much"], "--fit-gpu much"),
        (["--class-weights", "liver=2"], "the dataset has no liver"),
        (["--freeze", "stages:99"], "freeze stages:99: this network's encoder has"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, tmp_path, flags, message, capsys):
    assert main.main([*words, *flags]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not written(tmp_path)


def test_a_setup_that_fails(words, tmp_path, capsys):
    (tmp_path / "setup.sh").write_text("echo 'module: no such module' >&2\nfalse\n")
    assert main.main([*words, "--setup", str(tmp_path / "setup.sh")]) == 1
    assert "setup.sh fails: module: no such module" in capsys.readouterr().err and not written(tmp_path)


def test_no_slurm_here(words, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin-of-nothing")
    assert main.main(words) == 1
    assert "there is no Slurm here" in capsys.readouterr().err


def test_a_results_folder_that_cant_be_written(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file"))
    assert main.main(words) == 1
    assert "a file stands where a folder is needed" in capsys.readouterr().err


def test_sbatchs_own_words(words, tmp_path, capsys):
    assert main.main(words) == 1
    assert "sbatch refused 02_preprocess.sh: not asked for" in capsys.readouterr().err


def test_a_dry_run_shows_the_scripts_and_writes_nothing(words, tmp_path, capsys):
    assert main.main([*words, "--folds", "0,2", "--shards", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "--shard 1/2" in shown and "-f 2" in shown and "#SBATCH --array=0-1" in shown
    assert not written(tmp_path)


def test_a_plan_of_that_name_with_other_settings(words, tmp_path, capsys):
    plans = ["--plans_name", "ptPlans_mine"]
    assert main.main(["preprocess", "-np", "1", *words[1:7], *plans]) == 0
    before = len(written(tmp_path))
    assert main.main([*words, *plans, "-am", "median"]) == 1
    assert "ptPlans_mine.json exists and was made for other preprocessing settings" in capsys.readouterr().err
    assert len(written(tmp_path)) == before


def test_nothing_was_submitted(words, capsys):
    for flag in ("--status", "--cancel"):
        assert main.main(["submit", "-d", "991", flag]) == 1
        assert "has no submission" in capsys.readouterr().err
    assert main.main(["submit", "-d", "991"]) == 1
    assert "-pc is missing" in capsys.readouterr().err


def test_folds():
    assert parse_folds("0,2-4") == [0, 2, 3, 4]
    with pytest.raises(ConfigurationError, match="--folds 0-: expected"):
        parse_folds("0-")


def test_slices_are_submitted_without_weights_and_volumes_are_not(nnunet_folders, tmp_path, capsys):
    """Of pictures, whose headers stand in for the fingerprint that isn't there yet."""
    pytest.importorskip("PIL")
    from support.pictures import write_picture_dataset

    write_picture_dataset(nnunet_folders / "nnUNet_raw" / "Dataset702_Cells")
    words = ["submit", "-d", "702", "-n", "scratch", "--dry-run", "--cluster", "local", "-device", "cpu"]
    assert main.main(words) == 1
    assert "-pc" in capsys.readouterr().err
    assert main.main([*words, "-c", "2d", "--folds", "0"]) == 0
    shown = capsys.readouterr().out
    (train,) = [line for line in shown.splitlines() if "train -d" in line]
    assert "-c 2d" in train and "-pc" not in shown and "_from_scratch__ptPlans_dynamic__scratch__2d" in shown
    assert not written(tmp_path)
