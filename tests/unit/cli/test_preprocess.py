"""``nnUNetv2_preprocess_like_nnssl``: looking before leaping, and doing it in parts."""

import pytest

from nnssl_adapt.cli import preprocess
from nnssl_adapt.cli.common import checked_workers
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.planning import dataset_files


@pytest.fixture
def command(tiny_dataset, small_resenc, capsys):
    """Run the command on a tiny dataset: ``command("--dry-run")`` → (exit code, stdout, stderr)."""
    tiny_dataset(spacing=(2.0, 1.0, 1.3), channels=1)

    def run(*words):
        code = preprocess.main(["-d", "991", "-n", "mae", "-pc", str(small_resenc), "-np", "1", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_dry_run_compares_and_writes_nothing(command, nnunet_folders):
    before = files(nnunet_folders)
    code, out, _ = command("--dry-run", "-am", "auto", "-os", 2, 1, 1)
    assert code == 0 and files(nnunet_folders) == before
    for line in ("* like_pretrained", "median", "fixed", "no_resample", "* auto picks", "Nothing was written"):
        assert line in out
    assert "ptPlans__mae____Spacing__1.00_1.00_1.00___Norm__Z" in out


def test_a_dry_run_of_reoriented_copies_is_refused(command):
    code, _, err = command("--dry-run", "--reorient", "RPI")
    assert code == 1 and "nnssl-adapt reorient" in err


def test_parts_make_the_whole_and_the_last_saves_the_plan(command, nnunet_folders):
    folder = nnunet_folders / "nnUNet_preprocessed" / "Dataset991_Tiny"
    code, out, _ = command("--shard", "2/2")
    assert code == 0 and "part 2/2 is done" in out and "next:" not in out
    assert not list(folder.glob("ptPlans*"))
    code, out, _ = command("--shard", "1/2")
    assert code == 0 and "nnUNetv2_train_pretrained -d 991" in out
    (plan,) = folder.glob("ptPlans*.json")
    (store,) = folder.glob("nnssl_adapt__*")
    assert plan.stem in out and len(CaseStore(store)) == len(files(folder / "gt_segmentations"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--shard", "3/2"), "shard 3/2: expected 1/2 to 2/2"),
        (("--normalization", "ct,ct"), "2 entries for 1 channel"),
        (("--normalization", "hounsfield"), "'hounsfield' is none of from_pretraining, from_data, zscore"),
        (("-am", "fixed"), "spacing mode fixed needs a spacing: add -os Z Y X"),
        (("-am", "fixed", "--dry-run"), "spacing mode fixed needs a spacing: add -os Z Y X"),
        (("-am", "median", "-os", 1, 1, 1), "spacing mode median takes no spacing"),
        (("-am", "auto", "-os", 1, 1, 1), "spacing mode auto takes no spacing"),
        (("-am", "fixed", "-os", 1, 0, 1), "expected three positive numbers of millimetres"),
        (("-pl", "nnUNetPlanz"), "nnUNetPlanz"),
    ],
)
def test_wrong_words(command, words, problem, monkeypatch):
    """They are found before any image is read, which may take an hour."""
    monkeypatch.setattr(dataset_files, "examine_dataset", lambda *_, **__: pytest.fail("images were read"))
    code, _, err = command(*words)
    assert code == 1 and problem in err and err.count("\n") == 1


def test_as_many_processes_as_the_job_may_use(monkeypatch):
    """On a machine of many cores that lends the job three."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("nnssl_adapt.machine.resources.cgroup_cores", lambda: None)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert checked_workers(None) == 8
    monkeypatch.setattr("nnssl_adapt.machine.resources.cgroup_cores", lambda: 3.5)
    assert checked_workers(None) == 3 and checked_workers(20) == 20
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert checked_workers(None) == 2
