"""A tiny preprocessed dataset, and a short recipe."""

import logging
import shutil

import pytest
from support.synthetic import make_dataset
from support.tiny_plans import CNN, DATASET, plan_content

from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.preprocess_dataset import preprocess_dataset
from nnssl_adapt.training.recipe.recipe import Recipe


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Call it with what ``synthetic.make_dataset`` takes: a folder with nnU-Net's folders, made once for each dataset."""
    folders = {}

    def prepare(channels, **dataset):
        key = (channels, *sorted(dataset.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("prepared")
            with pytest.MonkeyPatch.context() as environment:
                for part in ("raw", "preprocessed", "results"):
                    environment.setenv(f"nnUNet_{part}", str(folders[key] / f"nnUNet_{part}"))
                make_dataset(folders[key] / "nnUNet_raw", DATASET, channels=channels, **dataset)
                preprocess_dataset(FinetunePlan(plan_content(CNN, channels)), workers=1, progress=False)
        return folders[key]

    return prepare


@pytest.fixture
def make_plan(nnunet_folders, prepared):
    """Call it with an architecture and what ``synthetic.make_dataset`` takes: a plan, its dataset preprocessed."""

    def make(architecture=CNN, channels=1, **dataset):
        shutil.copytree(prepared(channels, **dataset), nnunet_folders, dirs_exist_ok=True)
        plan = FinetunePlan(plan_content(architecture, channels))
        return FinetunePlan.load(plan.save())

    return make


@pytest.fixture
def plan(make_plan):
    return make_plan()


@pytest.fixture(scope="session")
def recipe():
    """Two short epochs from scratch."""
    return Recipe(
        name="tiny",
        trainer_name="Tiny",
        epochs=2,
        iterations_per_epoch=3,
        validation_iterations=2,
        learning_rate=0.01,
        momentum=0.9,
        warmup_epochs=1,
        from_scratch=True,
    )


@pytest.fixture(autouse=True)
def package_log(caplog):
    """What the package logs at INFO, whatever another test left configured."""
    package = logging.getLogger("nnssl_adapt")
    before = package.level, package.propagate
    package.setLevel(logging.INFO)
    package.propagate = True
    yield caplog
    package.level, package.propagate = before
