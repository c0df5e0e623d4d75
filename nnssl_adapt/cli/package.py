"""Make a release package of a trained model: zips, model card, checksums; the package then proves itself."""

from __future__ import annotations

import argparse
import shlex

from nnssl_adapt.cli.common import EXIT_OK, add_verbose
from nnssl_adapt.cli.nnunet_words import add_package_words
from nnssl_adapt.text import size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="trained model folder (the one with plans.json)")
    parser.add_argument("-o", dest="output", required=True, help="folder for the package: new or empty")
    parser.add_argument(
        "--layout",
        choices=("sct", "nnunet", "both"),
        default="both",
        help="whose installer the zip is for: the Spinal Cord Toolbox, nnU-Net, or one each (default)",
    )
    parser.add_argument("--date", help="of the release, like 20240915 (default today); its tag is rYYYYMMDD")
    parser.add_argument("--name", help="of the model (see 'nnssl-adapt name'; default made of the dataset's)")
    add_content_flags(parser)
    parser.add_argument(
        "--image", dest="images", nargs="+", help="files of one case to prove the package on, a channel each"
    )
    parser.add_argument("--no-proof", action="store_true", help="don't predict with the finished package")
    parser.add_argument("-device", "--device", default="cpu", help="for the proof: cpu (default), cuda, …")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier package in the output folder")
    add_package_words(parser)
    add_verbose(parser)


def add_content_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about what is published; shared with ``push``."""
    parser.add_argument(
        "--orientation", metavar="RPI", help="of the images, where axes come from (default: as far as known)"
    )
    parser.add_argument("--licence", "--license", dest="licence", help="of the model, for its card, like CC-BY-4.0")
    parser.add_argument("-f", dest="folds", nargs="+", help="folds to put in (default: every finished one)")


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.sharing.package import make_package

    package = make_package(
        arguments.model,
        arguments.output,
        layout=arguments.layout,
        date=arguments.date,
        orientation=arguments.orientation,
        name=arguments.name,
        folds=arguments.folds,
        licence=arguments.licence,
        prove=not arguments.no_proof,
        images=arguments.images,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    print(f"\npackage in {package.folder}")
    for layout, path in package.zips.items():
        print(f"  {path.name} ({size_text(path.stat().st_size)}, {layout})")
    print("  README.md, SHA256SUMS")
    print(f"release tag and title: {package.tag}. With GitHub's command line, for instance:")
    files = " ".join(shlex.quote(str(path)) for path in package.zips.values())
    card = shlex.quote(str(package.folder / "README.md"))
    print(f"  gh release create {package.tag} --title {package.tag} --notes-file {card} {files}")
    return EXIT_OK
