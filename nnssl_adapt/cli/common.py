"""What every command shares: logging to the screen, and errors as one clear line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from nnssl_adapt.cli.parser import NOTES

if TYPE_CHECKING:
    from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped as asked, and saved; the same command goes on
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C

Run = Callable[[argparse.Namespace], int]


def run_command(parser: argparse.ArgumentParser, run: Run, arguments: Sequence[str] | None) -> int:
    """Parse, run, and turn any error into one line on stderr and an exit code (a traceback only with ``--verbose``)."""
    parsed = parser.parse_args(arguments)
    parsed.command_line = list(sys.argv[1:] if arguments is None else arguments)
    # Before torch is loaded: its CPU threads then sleep while they wait for each other. By default they spin, which is a
    # fifth faster on an idle machine and ten times slower on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    verbose = bool(getattr(parsed, "verbose", False))
    with _logging_to_screen(verbose), warnings.catch_warnings():
        if not verbose:  # libraries talking to each other's developers
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            # For worker processes, which import libraries before any code of ours runs in them.
            os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
        for note in getattr(parsed, NOTES, ()):
            logging.getLogger("nnssl_adapt.cli").info("%s", note)
        return _run(run, parsed, verbose, for_good=arguments is None)


def _run(run: Run, parsed: argparse.Namespace, verbose: bool, for_good: bool) -> int:
    from nnssl_adapt.errors import TrainingStopped
    from nnssl_adapt.training.run.signals import stopping_in_order

    try:
        with stopping_in_order(for_good) if getattr(parsed, "stops_in_order", False) else nullcontext():
            return run(parsed)
    except TrainingStopped as stopped:
        with suppress(OSError):  # a terminal that closed is a reason to stop, and can't be told so
            print(stopped, file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        how = getattr(parsed, "how_to_go_on", "run the same command again")
        _complain(f"interrupted. What was finished is kept: {how} to go on", verbose)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - stays open so that the interpreter's own flush finds it
        return EXIT_FAILED
    except Exception as error:
        _complain(_explain(error), verbose)
        return EXIT_FAILED


def _explain(error: Exception) -> str:
    from nnssl_adapt.errors import NnsslAdaptError, OutputError
    from nnssl_adapt.files import explain_write_errors

    if isinstance(error, NnsslAdaptError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        try:
            with explain_write_errors(error.filename):
                raise error
        except OutputError as explained:
            return str(explained)
        except OSError:
            return str(error)
    return f"unexpected {type(error).__name__}: {error} (this is a bug; --verbose shows where it happened)"


def _complain(message: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)


@contextmanager
def _logging_to_screen(verbose: bool) -> Iterator[None]:
    """What the package logs is shown; afterwards logging is as it was, for programs that call a command."""
    logger = logging.getLogger("nnssl_adapt")
    before = (logger.level, list(logger.handlers), logger.propagate)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines())
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1], before[2]


class _Lines(logging.Formatter):
    """Messages as they are; warnings and worse say so."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


def stop_in_order(parser: argparse.ArgumentParser) -> None:
    """This command exits with 75 when a signal asks it to stop: what schedulers take for "start me again"."""
    parser.set_defaults(stops_in_order=True)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show details, and a traceback when something fails")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Flags about the checkpoint; the command itself adds ``source``."""
    group = parser.add_argument_group("about the checkpoint")
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face repository")
    group.add_argument(
        "--file",
        dest="source_file",
        metavar="NAME",
        help="the weight file in a folder, zip or repository that holds several (or which of several trained models)",
    )
    group.add_argument(
        "--fold-of-source",
        dest="source_fold",
        metavar="FOLD",
        help="of a trained nnU-Net model: 0, 1, …, all, or mean for the average of its folds",
    )
    group.add_argument(
        "--stem",
        dest="source_stem",
        metavar="ID",
        help="of a network with a stem for every dataset: which one, or mean",
    )
    group.add_argument(
        "--axes",
        dest="source_axes",
        choices=("auto", "zyx", "xyz"),
        default="auto",
        help="order of the image axes in training: zyx as nnssl and nnU-Net, xyz as MONAI (default: told by the file)",
    )
    group.add_argument(
        "--patch-merging",
        choices=("auto", "old", "new"),
        default="auto",
        help="of a Swin UNETR whose origin the file doesn't tell: old if it was trained with MONAI up to 1.4, new since 1.5",
    )
    group.add_argument(
        "--cache-dir", help="where downloads and unpacked zips are kept (default: the usual cache folders)"
    )
    group.add_argument("--local-files-only", action="store_true", help="never touch the network")


def source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of :func:`add_source` say, as arguments of ``open_checkpoint``; only those that were given."""
    given = {
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "local_files_only": arguments.local_files_only or None,
        "filename": arguments.source_file,
        "fold": arguments.source_fold,
        "stem": arguments.source_stem,
        "axes": None if arguments.source_axes == "auto" else arguments.source_axes,
        "patch_merging": None if arguments.patch_merging == "auto" else arguments.patch_merging,
    }
    return {name: value for name, value in given.items() if value is not None}


def open_source(arguments: argparse.Namespace) -> Checkpoint:
    """Open the checkpoint that ``arguments.source`` and the flags of :func:`add_source` name, and show what it is."""
    from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint

    with _quiet("nnssl_adapt.weights.checkpoint.checkpoint"):  # its notes are printed with it
        checkpoint = open_checkpoint(arguments.source, **source_options(arguments))
    print(checkpoint)
    return checkpoint


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Only errors are logged inside."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def default_processes() -> int:
    """Processes to use when none were asked for: ``nnUNet_def_n_proc``, or the cores that this job may use, at most 8."""
    from nnssl_adapt.cli.nnunet_words import whole_number
    from nnssl_adapt.machine.resources import Resources

    return whole_number("nnUNet_def_n_proc") or min(8, Resources.here().cores)


def checked_workers(requested: int | None) -> int:
    """The processes asked for with ``-np``, or as many as make sense. Raises ConfigurationError for less than one."""
    from nnssl_adapt.errors import ConfigurationError

    if requested is not None and requested < 1:
        raise ConfigurationError(f"-np {requested}: at least one process is needed")
    return requested or default_processes()


def require_device(name: str) -> str:
    """Return the device, or raise DeviceUnavailable saying which ones there are. Checked before any long work."""
    from nnssl_adapt.machine.device import check_device

    return str(check_device(name))
