"""The whole road on an embedded example, without network or GPU: a bundled small checkpoint, a dataset made from a brain
template, a few short epochs, a validation, and pictures of what came out."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, default_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", dest="folder", default="nnssl_adapt_demo", help="folder to work in (default: ./nnssl_adapt_demo)"
    )
    parser.add_argument(
        "--recipe", default="tiny_cpu", help="recipe: a bundled name or a YAML file (default: tiny_cpu)"
    )
    parser.add_argument("-device", "--device", default="cpu", choices=("cuda", "cpu", "mps"))
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    import nnssl_adapt as na
    from nnssl_adapt import demo

    started = time.monotonic()
    folder = Path(arguments.folder).resolve()
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(folder / f"nnUNet_{variable}")
    print(
        f"Demo in {folder}: 8 images made by smooth random deformations of one brain template (MNI152), to be segmented"
    )
    print(
        "into grey and white matter. It shows that everything runs. The checkpoint has seen that template: no benchmark.\n"
    )
    demo.make_demo_dataset(folder / "nnUNet_raw")

    checkpoint = na.open_checkpoint(demo.demo_checkpoint())
    print(checkpoint)
    workers = min(2, default_processes())
    plan = na.make_plan(
        demo.DATASET_NAME, checkpoint, mode="like_pretrained", name="demo_mae", workers=workers, progress=True
    )
    print(plan)
    na.preprocess_dataset(plan, workers=workers)
    trainer = na.PretrainedTrainer(
        plan, fold=0, recipe=na.Recipe.load(arguments.recipe), device=arguments.device, checkpoint=checkpoint
    )
    model = trainer.run(resume=trainer.can_resume)
    overlay, dice = demo.show_result(model, fold=0)
    print(f"\nmean Dice on {len(dice)} validation images: {sum(dice.values()) / len(dice):.3f}")
    for case, value in dice.items():
        print(f"  {case}  {value:.3f}")
    fold = model.path / "fold_0"
    print(f"model           {model.path}")
    print(f"transfer report {fold / 'transfer_report.json'}")
    print(f"curves          {fold / 'progress.png'}")
    print(f"overlay         {overlay}")
    print(f"report          {na.write_report(model)}")
    print(f"segmentations   {fold / 'validation'}")
    print(f"took {time.monotonic() - started:.0f} s")
    return EXIT_OK
