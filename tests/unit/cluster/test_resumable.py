"""What is given to submitit: it has its turn when the training has saved."""

import signal
import sys
import types

import pytest

from nnssl_adapt.cluster.resumable import Resumable
from nnssl_adapt.errors import ConfigurationError, TrainingStopped
from nnssl_adapt.training.run.stopping import stop_on_signals


class QueuedAgain(BaseException):
    """What submitit's handler ends a process with."""


def train_and_be_asked_to_stop(number):
    with stop_on_signals() as stop:
        stop.begin()
        signal.raise_signal(number)
        assert stop.asked()
        raise TrainingStopped(f"stopped by {stop.reason}")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("announced_by", ["USR2", "USR1"])
def test_submitit_has_its_turn_after_the_training_has_saved(number, announced_by, monkeypatch):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", announced_by)
    turns = []

    def of_submitit(*_):
        turns.append("submitit")
        raise QueuedAgain

    before = signal.signal(getattr(signal, f"SIG{announced_by}"), of_submitit)
    try:
        with pytest.raises(QueuedAgain):
            Resumable(lambda: train_and_be_asked_to_stop(number))()
    finally:
        signal.signal(getattr(signal, f"SIG{announced_by}"), before)
    assert turns == ["submitit"]


def test_without_submitit_a_stop_is_a_stop():
    with pytest.raises(TrainingStopped, match="SIGTERM"):
        Resumable(lambda: train_and_be_asked_to_stop(signal.SIGTERM))()
    assert Resumable(lambda: "model")() == "model"


def test_the_checkpoint_is_the_same_again(monkeypatch):
    helpers = types.ModuleType("submitit.helpers")
    helpers.DelayedSubmission = lambda function: ("again", function)
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    run = Resumable(lambda: None)
    assert run.checkpoint() == ("again", run)
    monkeypatch.setitem(sys.modules, "submitit.helpers", None)
    with pytest.raises(ConfigurationError, match="pip install submitit"):
        run.checkpoint()
