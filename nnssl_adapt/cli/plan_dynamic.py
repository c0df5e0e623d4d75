"""Plan and preprocess a dataset with its own nnU-Net network, to which pre-trained weights are fitted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nnssl_adapt.cli import preprocess
from nnssl_adapt.cli.common import run_command
from nnssl_adapt.cli.parser import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nnUNetv2_plan_like_dynamic``: ``nnssl-adapt preprocess --keep-topology``."""
    parser = Parser(prog="nnUNetv2_plan_like_dynamic", description=__doc__)
    preprocess.add_arguments(parser, dynamic=True)
    return run_command(parser, preprocess.run, arguments)


if __name__ == "__main__":
    sys.exit(main())
