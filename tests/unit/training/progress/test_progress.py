"""The history of a run, its picture, what the device did, and the live line."""

import csv
import io
import itertools
import json
import logging
import math

import pytest
import torch
from matplotlib.figure import Figure

from nnssl_adapt.training.progress import clock as epoch_clock
from nnssl_adapt.training.progress import display as epoch_display
from nnssl_adapt.training.progress import picture as progress_picture
from nnssl_adapt.training.progress.clock import EpochClock
from nnssl_adapt.training.progress.display import EpochDisplay, log_epoch, log_file
from nnssl_adapt.training.progress.history import DeviceFigures, History
from nnssl_adapt.training.progress.picture import ProgressPicture, draw_progress

pytestmark = pytest.mark.pictures


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


def test_our_figures_lie_apart_from_nnunets():
    history = history_of(2)
    history.add(0, 0, [0, 0], 0, 0, 0, DeviceFigures(0.75, 12.0, 3.5))
    kept, ours = history.to_dict(), history.our_figures()
    assert "device_busy" not in kept and len({len(values) for values in kept.values()}) == 1
    copy = History.from_dict(kept, ours)
    assert copy.device_busy == pytest.approx([math.nan, math.nan, 0.75], nan_ok=True)
    assert copy.data_waits[2] == 12 and copy.peak_memory[2] == 3.5


@pytest.mark.parametrize("ours", [None, {}, {"device_busy": [0.5]}, {"device_busy": [0.5] * 9}])
def test_checkpoints_without_our_figures(ours):
    history = History.from_dict(history_of(3).to_dict(), ours)
    assert len(history.device_busy) == len(history.data_waits) == len(history.peak_memory) == 3
    assert math.isnan(history.peak_memory[0])
    history.add(0, 0, [0, 0], 0, 0, 0, DeviceFigures(0.75))
    assert history.device_busy[3] == 0.75


def test_metrics_are_json_lines_without_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 7}\n')  # of a killed run
    history_of(2).write_metrics(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[1]["pseudo_dice_per_class"] == [0.2, None] and "NaN" not in path.read_text()


def test_metrics_are_a_table_as_well(tmp_path):
    history = history_of(2)
    history.add(0.25, 0.5, [0.5, 0.75], 0.01, 0, 60, DeviceFigures(0.875, 2.0))
    (tmp_path / "metrics.csv").write_text("of a killed run")
    history.write_metrics(tmp_path / "metrics.jsonl", ["liver", "tumour, left"])
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [row["pseudo_dice/liver"] for row in rows] == ["0.0", "0.2", "0.5"]
    assert [row["pseudo_dice/tumour, left"] for row in rows] == ["", "", "0.75"]
    assert [row["device_busy"] for row in rows] == ["", "", "0.875"] and rows[2]["data_wait_seconds"] == "2.0"


def test_tables_without_names_or_epochs(tmp_path):
    history_of(1).write_metrics(tmp_path / "a.jsonl")
    assert "pseudo_dice/1,pseudo_dice/2" in (tmp_path / "a.csv").read_text()
    History().write_metrics(tmp_path / "b.jsonl")
    assert (tmp_path / "b.csv").read_text().strip() == ""


# -- the picture -------------------------------------------------------------------------------------------------------


def drawn(history, path, names, monkeypatch):
    """The figure that was saved."""
    figures = []
    original = Figure.savefig

    def keep(self, *arguments, **options):
        figures.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_progress(history, path, names)
    assert path.stat().st_size > 10_000
    return figures[0]


def test_short_epochs_are_not_slowed_down_by_their_picture(tmp_path, monkeypatch):
    now, shown = [0.0], []

    def draw(history, path, names):
        shown.append(len(history))
        now[0] += 1

    monkeypatch.setattr(progress_picture, "draw_progress", draw)
    monkeypatch.setattr(progress_picture.time, "monotonic", lambda: now[0])
    picture = ProgressPicture(tmp_path / "progress.png", ["a", "b"])
    for epoch in range(1, 31):
        now[0] += 3 if epoch < 20 else 100  # seconds
        picture.show(history_of(epoch), last=epoch == 17)
    assert shown == [1, 8, 15, 17, *range(20, 31)]


def labels_in(panel):
    return panel.get_legend_handles_labels()[1]


def test_the_picture(tmp_path, monkeypatch):
    figure = drawn(history_of(4), tmp_path / "progress.png", ["a", "b"], monkeypatch)
    loss, dice, rate, seconds = figure.axes  # nobody measured the device
    assert labels_in(loss) == ["training", "validation"] and labels_in(seconds) == ["an epoch"]
    assert labels_in(dice) == ["mean", "mean, smoothed", "a", "b"]
    assert list(dice.lines[2].get_ydata()) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert list(seconds.lines[0].get_ydata()) == [60] * 4 and rate.get_ylabel() == "learning rate"
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4]  # as the log counts them
    assert rate.get_ylim()[1] > max(rate.lines[0].get_ydata())


def test_the_device_has_a_panel_where_it_was_measured(tmp_path, monkeypatch):
    history = history_of(2)
    history.add(0, 0, [0.5, 0.5], 0, 0, 60, DeviceFigures(0.75, 12.0, 3.5))
    figure = drawn(history, tmp_path / "progress.png", ["a", "b"], monkeypatch)
    seconds, device = figure.axes[3:]
    assert labels_in(seconds) == ["an epoch", "of them waiting for data"]
    assert labels_in(device) == ["device busy", "memory: 3.5 GiB at most"]
    assert device.lines[0].get_ydata()[2] == 75


@pytest.mark.parametrize(("classes", "named"), [(1, 0), (20, 20), (21, 0)])
def test_classes_in_the_picture(tmp_path, monkeypatch, classes, named):
    history = History()
    for epoch in range(2):
        history.add(1, 1, [0.1] * classes, 0.01, 0, 60 + epoch)
    names = [f"a class with a long name, {number}" for number in range(classes)]
    figure = drawn(history, tmp_path / "progress.png", names, monkeypatch)
    shown = labels_in(figure.axes[1])[2:]
    assert sum(label.startswith("a class with") for label in shown) == named
    assert (shown == ["each of 21 classes"]) == (classes == 21)


def test_nothing_in_the_picture_overlaps(tmp_path, monkeypatch):
    history = History()
    for epoch in range(3):
        history.add(1, 1, [0.1] * 20, 0.01, 0, 60 + epoch, DeviceFigures(0.9, 3, 12.5))
    names = [f"a class with a long name {number}" for number in range(20)]
    figure = drawn(history, tmp_path / "progress.png", names, monkeypatch)
    renderer = figure.canvas.get_renderer()
    boxes = [panel.get_window_extent(renderer) for panel in figure.axes]
    legends = [panel.get_legend().get_window_extent(renderer) for panel in figure.axes if panel.get_legend()]
    for one, other in itertools.combinations(legends, 2):
        assert not one.overlaps(other)
    assert not any(box.overlaps(legend) for box in boxes for legend in legends)
    whole = figure.bbox
    assert all(legend.x1 <= whole.x1 and legend.y0 >= whole.y0 for legend in legends)


# -- what the device did -----------------------------------------------------------------------------------------------


class Clock:
    """Time that only passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 50.0
        monkeypatch.setattr(epoch_clock.time, "perf_counter", lambda: self.now)

    def passes(self, seconds):
        self.now += seconds


def test_waiting_for_data_is_not_work(monkeypatch):
    time = Clock(monkeypatch)

    def batches():
        for number in range(6):
            time.passes(3)
            yield number

    clock = EpochClock(torch.device("cpu"))
    watched = clock.watched(batches())
    time.passes(100)  # before the epoch
    figures = []
    for _ in range(2):
        clock.start()
        for _ in range(2):  # steps
            for _ in itertools.islice(watched, 1):
                time.passes(5)
            clock.rest()
            time.passes(2)  # a checkpoint is written
        next(watched)
        time.passes(1)
        figures.append(clock.stop())
        time.passes(40)
    for one in figures:
        assert one.waited == 9 and math.isnan(one.peak_memory)
        assert one.busy == pytest.approx((5 + 5 + 1) / (3 * 3 + 5 + 5 + 2 + 2 + 1))


def test_the_batches_stay_the_same():
    clock = EpochClock(torch.device("cpu"))
    watched = clock.watched(range(4))
    assert [*itertools.islice(watched, 2), *watched] == [0, 1, 2, 3]


def test_an_epoch_without_batches():
    clock = EpochClock(torch.device("cpu"))
    clock.start()
    assert clock.stop().busy == 0


@pytest.mark.cuda
def test_the_clock_on_cuda(cuda_device):
    device = cuda_device
    clock = EpochClock(device)
    clock.start()
    for batch in clock.watched(torch.ones(512, 512) for _ in range(3)):
        _ = batch.to(device) @ batch.to(device)
        clock.rest()
    figures = clock.stop()
    assert figures.waited > 0
    if device.type == "cuda":
        assert 0 < figures.busy <= 1 and figures.peak_memory >= 2 * 2**20 / 2**30


# -- on the screen -----------------------------------------------------------------------------------------------------


def test_the_logged_line_has_what_is_left(caplog):
    package = logging.getLogger("nnssl_adapt")
    package.setLevel(logging.INFO)
    log_epoch(history_of(4), 10, ["a", "b"])
    assert "epoch 4/10" in caplog.text and "60.0 s/epoch" in caplog.text and "ETA 0:06:00" in caplog.text


def test_the_logged_line_has_what_the_device_did(caplog):
    history = history_of(1)
    history.add(0, 0, [0.5, 0.5], 0.01, 0, 60, DeviceFigures(0.934, 12.0, 3.46))
    logging.getLogger("nnssl_adapt").setLevel(logging.INFO)
    log_epoch(history, 10, ["a", "b"])
    assert "60.0 s/epoch  busy 93%  3.5 GiB  ETA" in caplog.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_line_is_for_terminals(monkeypatch, terminal):
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(epoch_display.sys, "stderr", screen)
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


@pytest.mark.parametrize("shown", [True, False])
def test_long_epochs_without_a_terminal_say_where_they_are(monkeypatch, caplog, shown):
    logging.getLogger("nnssl_adapt").setLevel(logging.INFO)
    monkeypatch.setattr(epoch_display.sys, "stderr", io.StringIO())
    now = 0.0
    monkeypatch.setattr(epoch_display.time, "monotonic", lambda: now)
    with EpochDisplay(history_of(2), 2, 10, 9, 1, 0.003, shown=shown) as display:
        for step in range(8):
            now += 110.0
            display.step(0.5 + step)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == (["epoch 3/10  step 4/9  loss 2.5000", "epoch 3/10  step 7/9  loss 5.5000"] if shown else [])


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
