"""Compare models case by case: differences with confidence intervals and tests, as a table and a picture."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_OK, add_verbose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        help="two or more: summary.json files, folders with one, or model folders (all validated folds); the others are "
        "compared with the first. NAME=PATH gives one a name",
    )
    parser.add_argument("--metric", default="Dice", help="Dice (default), IoU, NSD, HD95, … as in summary.json")
    parser.add_argument("-o", dest="output", default="comparison", help="folder to write to (default: comparison)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.evaluation.compare import COMPARABLE, compare, load_results
    from nnssl_adapt.evaluation.compare_output import comparison_table, save_comparisons

    if len(arguments.results) < 2:
        raise ConfigurationError("give at least two results to compare")
    named = _named(arguments.results)
    metric = next((name for name in COMPARABLE if name.lower() == arguments.metric.lower()), arguments.metric)
    results = [load_results(path, metric, name) for name, path in named]
    comparisons = [compare(results[0], other, metric, arguments.seed) for other in results[1:]]
    for comparison in comparisons:
        print(comparison_table(comparison) + "\n")
    folder = save_comparisons(comparisons, arguments.output)
    print(f"picture: {folder / 'comparison.png'}\nnumbers: {folder / 'comparison.json'}, {folder / 'comparison.csv'}")
    return EXIT_OK


def _named(given: list[str]) -> list[tuple[str, str]]:
    """Name and path of each; names that are paths lose what all have in common."""
    from pathlib import Path

    pairs = [tuple(text.split("=", 1)) if "=" in text and not Path(text).exists() else ("", text) for text in given]
    parts = [Path(path).resolve().parts for _, path in pairs]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    parts = [p[shared:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [
        (name or "/".join(p).removesuffix("/summary.json"), path) for (name, path), p in zip(pairs, parts, strict=True)
    ]
