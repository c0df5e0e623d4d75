"""``torchrun --nproc-per-node 4 -m nnssl_adapt.train …``: fine-tune one fold with several processes.

The arguments are those of ``nnUNetv2_train_pretrained``. Only the first process talks. Without ``torchrun``, it is that
command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from nnssl_adapt.cli import train
from nnssl_adapt.cli.common import run_command
from nnssl_adapt.cli.parser import Parser


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.training.launch.launch import end_with_launcher, note_error

    end_with_launcher()
    try:
        return train.run_request(arguments) if hasattr(arguments, "request") else train.run(arguments)
    except Exception as error:
        note_error(error)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="nnssl_adapt.train", description=__doc__)
    given = sys.argv[1:] if arguments is None else arguments
    if "--request" in given:  # by finetune -num_gpus, which has made up its mind
        train.add_request_arguments(parser)
    else:
        train.add_arguments(parser)
    # Before torch is loaded, from each process: DDP looks for weights without a gradient, and where there are none it says,
    # at length, that it need not have.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
