"""Sending a training's figures elsewhere as well: TensorBoard, Weights & Biases, MLflow, Trackio. All are optional extras.

A tracker gets each epoch's figures when the epoch is over. One that fails (no network, a full disk) is warned about and
left out from then on: the training doesn't depend on it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.files import make_folder, write_text
from nnssl_adapt.training.progress.history import History

logger = logging.getLogger(__name__)


_MLFLOW_VALUE = 500  # characters of a setting; older servers refuse longer ones


class Tracker(Protocol):
    """Somewhere that figures are sent."""

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Send an epoch's figures."""

    def close(self) -> None:
        """Send what is left, and end."""


class TensorBoard:
    """Event files in ``tensorboard`` below the run's folder, for ``tensorboard --logdir``.

    What an earlier run logged of ``first_epoch`` and later ones is taken back: it is trained again.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], first_epoch: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        path = make_folder(folder / "tensorboard")
        self._writer = writer(log_dir=str(path), purge_step=first_epoch or None)
        if first_epoch == 0:
            lines = [f"    {key}: {value}" for key, value in settings.items()]
            self._writer.add_text("settings", "\n".join([f"    {name}", *lines]), 0)

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, gone on with when the training is. Its own variables (``WANDB_PROJECT``, ``WANDB_MODE``, …) count.

    The run's id is kept in ``wandb_id.txt`` of the run's folder. The project is ``nnssl-adapt`` unless the variable says
    otherwise.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], first_epoch: int) -> None:
        wandb = importlib.import_module("wandb")
        path = folder / "wandb_id.txt"
        if first_epoch == 0 or not path.is_file():
            write_text(path, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "nnssl-adapt",
            name=name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")  # not W&B's own counter, which never goes back

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "epoch": epoch})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, continued when the training is. Its own variables (``MLFLOW_TRACKING_URI``, …) count.

    Without ``MLFLOW_TRACKING_URI`` it is ``mlflow.db`` in the run's folder, for ``mlflow ui --backend-store-uri``. The run's
    id is kept in ``mlflow_id.txt`` there. The experiment is ``nnssl-adapt`` unless ``MLFLOW_EXPERIMENT_NAME`` says otherwise.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], first_epoch: int) -> None:
        mlflow = importlib.import_module("mlflow")
        make_folder(folder)
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=where)
        path = folder / "mlflow_id.txt"
        if first_epoch > 0 and path.is_file():
            self._run = path.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "nnssl-adapt"
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        write_text(path, self._run)
        for key, value in settings.items():
            self._client.log_param(self._run, key, str(value)[:_MLFLOW_VALUE])

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._client.log_metric(self._run, re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII), value, step=epoch)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """A run of Trackio, continued when the training is. Its own variables (``TRACKIO_DIR``, ``TRACKIO_SPACE_ID``, …) count.

    Runs are told apart by their names: a new training's name ends in a code, which is kept in ``trackio_name.txt`` of the
    run's folder. The project is ``nnssl-adapt`` unless ``TRACKIO_PROJECT`` says otherwise.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], first_epoch: int) -> None:
        trackio = importlib.import_module("trackio")
        path = folder / "trackio_name.txt"
        if first_epoch == 0 or not path.is_file():
            write_text(path, f"{name} {uuid.uuid4().hex[:6]}".strip())
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or "nnssl-adapt",
            name=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(settings),
            embed=False,  # no dashboard in a notebook's output
        )

    def log(self, epoch: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=epoch)

    def close(self) -> None:
        self._run.finish()


_KNOWN: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}

TRACKERS = tuple(_KNOWN)
"""The names of all trackers, which are those of their packages and of the extras that install them."""


def tracker_mistakes(names: Iterable[str]) -> Iterator[str]:
    """What is wrong with the names: unknown ones, and those whose package is not installed."""
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            yield f"--track {name}: expected some of {', '.join(TRACKERS)}"
        elif importlib.util.find_spec(name) is None:
            yield f"--track {name}: {name} is not installed: pip install 'nnssl-adapt[{name}]'"


def check_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once. Raises ConfigurationError with all that is wrong with them."""
    wanted = tuple(dict.fromkeys(names))
    if mistakes := list(tracker_mistakes(wanted)):
        raise ConfigurationError("; ".join(mistakes))
    return wanted


class Trackers:
    """The trackers of a run, as a context manager. ``Trackers()`` sends nothing anywhere.

    Args:
        names: some of :data:`TRACKERS`.
        folder: of the run; files of trackers lie in it.
        name: of the run, for people.
        settings: to be kept with it, plain values.
        first_epoch: epochs that are done already, when an earlier run is gone on with.
        class_names: of the foreground classes, in the history's order.

    Raises ConfigurationError, when made, for an unknown name or a package that is not installed.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        folder: str | Path = ".",
        name: str = "",
        settings: Mapping[str, Any] | None = None,
        first_epoch: int = 0,
        class_names: Sequence[str] = (),
    ) -> None:
        self._names = check_trackers(names)
        self._arguments = (Path(folder), name, settings or {}, first_epoch)
        self._class_names = class_names
        self._open: dict[str, Tracker] = {}

    def log(self, history: History) -> None:
        """Send the last epoch's figures; those that are not known (NaN) are left out."""
        epoch = len(history) - 1
        figures = history.flat_figures(epoch, self._class_names)
        known = {key: value for key, value in figures.items() if key != "epoch" and value is not None}
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(epoch, known))  # type: ignore[misc]

    def __enter__(self) -> Trackers:
        for name in self._names:
            self._try(name, lambda name=name: self._open.update({name: _KNOWN[name](*self._arguments)}))  # type: ignore[misc]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open = {}

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        """Whatever goes wrong in somebody else's service must not end a training of days."""
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            logger.warning("%s failed (%s: %s): nothing more is sent to it", name, type(error).__name__, reason)
