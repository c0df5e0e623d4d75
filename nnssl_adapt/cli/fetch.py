"""Fetch a checkpoint where there is internet, prove that it can be read, and say how to use it where there is none."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_source, add_verbose, source_options

if TYPE_CHECKING:
    from nnssl_adapt.weights.sources.hub_files import HubAddress
    from nnssl_adapt.weights.sources.resolved import ResolvedSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="checkpoint: Hugging Face id (owner/name[@revision]), https address[#sha256=…], zip, folder or file",
    )
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        help="copy what is needed below this folder, to be carried to another machine (default: leave it in the cache)",
    )
    parser.add_argument("--overwrite", action="store_true", help="with --to: replace other weights of the same name")
    add_source(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.weights.checkpoint.checkpoint import read_checkpoint
    from nnssl_adapt.weights.sources.published import address_of_name
    from nnssl_adapt.weights.sources.resolve import resolve_source
    from nnssl_adapt.weights.sources.resolved import SourceOptions

    arguments.source = address_of_name(arguments.source)
    options = SourceOptions(**source_options(arguments))
    resolved = resolve_source(arguments.source, options)
    print(read_checkpoint(resolved, options))
    if arguments.to is None:
        _show_use_of_cache(resolved, arguments)
    else:
        _copy_and_show(resolved, Path(arguments.to).expanduser().absolute(), arguments)
    return EXIT_OK


def _show_use_of_cache(resolved: ResolvedSource, arguments: argparse.Namespace) -> None:
    print(f"\nit lies in {resolved.weights.parent}")
    source = _pinned(resolved, arguments.source)
    requested = _hub_file(arguments)
    file = requested.filename if requested else arguments.source_file
    flags = {"--file": file, "--fold-of-source": arguments.source_fold, **_reading_flags(arguments)}
    if arguments.cache_dir:
        flags["--cache-dir"] = str(Path(arguments.cache_dir).expanduser().absolute())
    online = resolved.origin.kind in ("huggingface", "url")
    print("there, with the same cache and without internet:" if online else "nothing had to be downloaded:")
    print(f"  {'HF_HUB_OFFLINE=1 ' if online else ''}{_next_command(source, flags)}")


def _copy_and_show(resolved: ResolvedSource, store: Path, arguments: argparse.Namespace) -> None:
    from nnssl_adapt.errors import DigestMismatch
    from nnssl_adapt.weights.sources.offline_store import files_to_copy, name_in_store, put_into_store
    from nnssl_adapt.weights.sources.resolve import resolve_source
    from nnssl_adapt.weights.sources.resolved import SourceOptions

    origin = resolved.origin
    address = _hub_file(arguments) if origin.repo_id is not None else None
    typed = Path(arguments.source).expanduser()
    lies = resolved.archive or (typed if typed.exists() else resolved.model_folder or resolved.weights)
    name = name_in_store(address, arguments.source, lies.absolute())
    weights = [resolved.weights, *resolved.other_shards, *resolved.other_folds]
    files = files_to_copy(weights, resolved.sidecar, resolved.model_folder, origin.fold is not None)
    about = {
        "source": _pinned(resolved, arguments.source),
        "repo_id": origin.repo_id,
        "revision": origin.revision,
        "asked": address.revision if address else None,
        "file": address.filename if address else None,
    }
    copied = put_into_store(store, name, files, about, arguments.overwrite)
    fold = origin.fold if resolved.other_folds else None
    if resolve_source(store / name, SourceOptions(fold=fold)).origin.sha256 != origin.sha256:
        raise DigestMismatch(
            f"{store / name} is not what was copied there: run the same command again with --overwrite"
        )
    print(f"\n{'copied to' if copied else 'there already, unchanged:'} {store / name}")
    print("on the other machine, with the path that this folder has there:")
    print(f"  export nnssl_pretrained_models={shlex.quote(str(store))}")
    print(f"  {_next_command(name, {'--fold-of-source': fold, **_reading_flags(arguments)})}")


def _pinned(resolved: ResolvedSource, typed: str) -> str:
    """The source with the commit or digest that was found, so that it can mean nothing else later."""
    from urllib.parse import urldefrag

    from nnssl_adapt.files import sha256_of

    origin = resolved.origin
    if origin.kind == "huggingface":
        return f"{origin.repo_id}@{origin.revision}"
    if origin.kind == "url":
        digest = sha256_of(resolved.archive) if resolved.archive else origin.sha256
        return f"{urldefrag(typed).url}#sha256={digest}"
    return typed


def _hub_file(arguments: argparse.Namespace) -> HubAddress | None:
    """The repository that was named, with the revision and file wanted of it; None for other sources."""
    from nnssl_adapt.weights.sources.hub_files import HubAddress

    named = HubAddress.parse(arguments.source)
    if named is None:
        return None
    return HubAddress(named.repo_id, arguments.revision or named.revision, arguments.source_file or named.filename)


def _reading_flags(arguments: argparse.Namespace) -> dict[str, str | None]:
    return {
        "--stem": arguments.source_stem,
        "--axes": None if arguments.source_axes == "auto" else arguments.source_axes,
        "--patch-merging": None if arguments.patch_merging == "auto" else arguments.patch_merging,
    }


def _next_command(source: str, flags: dict[str, str | None]) -> str:
    given = [word for flag, value in flags.items() if value for word in (flag, shlex.quote(value))]
    return " ".join(["nnUNetv2_preprocess_like_nnssl -d ID -n NAME -pc", shlex.quote(source), *given])
