"""Install a trained model (a package, a folder, an address, a hub repository) where prediction finds it."""

from __future__ import annotations

import argparse
import shlex

from nnssl_adapt.cli.common import EXIT_OK, add_verbose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="zip, folder of a package or model, https address[#sha256=…] of a zip, or Hugging Face id (owner/name[@revision])",
    )
    parser.add_argument("--dataset", metavar="DatasetNNN_Name", help="name to install it under (default: its own)")
    parser.add_argument("-c", dest="configuration", help="of the model that is meant, where there are several")
    parser.add_argument("--overwrite", action="store_true", help="replace the same model, installed before")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face repository")
    parser.add_argument("--cache-dir", help="where downloads are kept (default: the usual cache folders)")
    parser.add_argument("--local-files-only", action="store_true", help="never touch the network")
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.sharing.install import install_model

    model = install_model(
        arguments.source,
        dataset=arguments.dataset,
        overwrite=arguments.overwrite,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        local_files_only=arguments.local_files_only,
        configuration=arguments.configuration,
    )
    print(f"installed {model}")
    print(f"  channels  {', '.join(model.channel_names)}")
    print(f"  labels    {', '.join(model.labels.class_names)}")
    print("predict with it:")
    print(f"  nnssl-adapt predict -i IMAGES -o OUTPUT -m {shlex.quote(str(model.path))}")
    return EXIT_OK
