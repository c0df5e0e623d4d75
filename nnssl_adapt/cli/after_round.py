"""``python -m nnssl_adapt.cli.after_round SUBMISSION STEP CODE``: what follows a round of a submitted step.

The last line of the scripts that ``nnssl-adapt submit`` writes. Exits with 0 when the step is done, 75 when it was queued again,
1 when it failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl_adapt.cli.common import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("submission", type=Path, help="folder with jobs.json")
    parser.add_argument("step", help="name of the step")
    parser.add_argument("code", type=int, help="exit code of the step's command")


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.cluster.requeue import after_round
    from nnssl_adapt.cluster.rounds import Verdict

    verdict, reason = after_round(
        arguments.submission, arguments.step, arguments.code, os.environ.get("SLURM_JOB_ID", "")
    )
    print(f"{arguments.step}: {reason}", flush=True)
    return {Verdict.DONE: EXIT_OK, Verdict.AGAIN: EXIT_STOPPED, Verdict.FAILED: EXIT_FAILED}[verdict]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nnssl_adapt.cli.after_round", description=__doc__)
    add_arguments(parser)
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
