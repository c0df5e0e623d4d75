"""The history of a run, its picture, and the live line."""

import io
import json
import logging
import math

import pytest

from nnssl_adapt.training import progress
from nnssl_adapt.training.progress import EpochDisplay, History, log_epoch, log_file


def history_of(epochs):
    history = History()
    for epoch in range(epochs):
        history.add(1 / (epoch + 1), 0.5, [0.2 * epoch, math.nan], 0.01, 100.0 * epoch, 100.0 * epoch + 60)
    return history


def test_means_leave_absent_classes_out_and_smoothing_survives_epochs_without_any():
    history = History()
    for dice in ([math.nan, math.nan], [0.5, math.nan], [math.nan, math.nan], [0.7, 0.9]):
        history.add(1, 1, dice, 0.1, 0, 1)
    assert history.mean_fg_dice == pytest.approx([math.nan, 0.5, math.nan, 0.8], nan_ok=True)
    assert history.ema_fg_dice == pytest.approx([math.nan, 0.5, 0.5, 0.53], nan_ok=True)


def test_it_goes_through_a_checkpoint_and_back():
    history = history_of(3)
    copy = History.from_dict(history.to_dict())
    copy.add(0, 0, [0, 0], 0, 0, 0)
    assert len(history) == 3 and len(copy) == 4 and history.durations == [60, 60, 60]


def test_metrics_are_json_lines_without_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 7}\n')  # of a killed run
    history_of(2).write_metrics(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[1]["pseudo_dice_per_class"] == [0.2, None] and "NaN" not in path.read_text()


def test_the_picture(tmp_path):
    history_of(4).plot(tmp_path / "progress.png", ["a", "b"])
    assert (tmp_path / "progress.png").stat().st_size > 10_000


def test_the_logged_line_has_what_is_left(caplog):
    package = logging.getLogger("nnssl_adapt")
    package.setLevel(logging.INFO)
    log_epoch(history_of(4), 10, ["a", "b"])
    assert "epoch 4/10" in caplog.text and "60.0 s/epoch" in caplog.text and "ETA 0:06:00" in caplog.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_line_is_for_terminals(monkeypatch, terminal):
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", screen)
    with EpochDisplay(history_of(2), 2, 10, 4, 1, 0.003, shown=True) as display:
        display.step(0.25)
        display.step(0.125)
        if terminal:
            display._bar.refresh()
    shown = screen.getvalue()
    if not terminal:
        assert shown == ""
        return
    for part in ("epoch 3/10", "3/4", "loss=0.1250", "lr=3.00e-03", "pseudo-Dice=0.2000", "s/epoch=60.0", "0:08:00"):
        assert part in shown


def test_the_log_file_gets_what_the_package_logs(tmp_path):
    package = logging.getLogger("nnssl_adapt")
    before = package.level
    package.setLevel(logging.WARNING)
    try:
        with log_file(tmp_path) as path:
            logging.getLogger("nnssl_adapt.training").info("a step")
        assert "a step" in path.read_text() and path.name.startswith("training_log_")
        assert package.level == logging.WARNING
    finally:
        package.setLevel(before)
