"""On a real Slurm: no ordinary situation loses a job."""

import pytest

pytestmark = pytest.mark.slurm


def test_slurm_runs_a_job(slurm, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun --ntasks=2 --nodes=2 hostname > $OUT/said.txt\nexit $?\n")
    job = slurm.submit(script, "--nodes=2", f"--output={tmp_path}/log.txt", OUT=str(tmp_path))
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "log.txt").read_text()
    assert len((tmp_path / "said.txt").read_text().split()) == 2
