import io
import os
import signal
import threading

import pytest

from nnssl_adapt.machine import progress_bar
from nnssl_adapt.machine.progress_bar import ProgressBar


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_killed_in_the_middle_of_drawing_does_not_stop_its_parent():
    ProgressBar(total=1, disable=True).close()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ProgressBar.get_lock().acquire()
            os.write(writing, b"!")
            signal.pause()
        finally:
            os._exit(0)
    assert os.read(reading, 1) == b"!"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    drawing = threading.Thread(target=lambda: ProgressBar(total=1, disable=True).close(), daemon=True)
    drawing.start()
    drawing.join(20)
    assert not drawing.is_alive()


def drawn(stream, seconds, monkeypatch):
    """What a bar of four cases, with so many seconds for each, writes into a stream."""
    now = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    with ProgressBar(total=4, desc="Doing", unit="case", file=stream, mininterval=0) as bar:
        for number in range(4):
            now[0] += seconds
            bar.set_postfix_str(f"case_{number}", refresh=False)
            bar.update()
    return stream.getvalue()


def test_where_nobody_watches_there_is_a_plain_line_now_and_then(monkeypatch):
    lines = drawn(io.StringIO(), 40, monkeypatch).splitlines()
    assert [line.split(", 0")[0] for line in lines] == [
        "Doing: 2/4 cases (50%), case_1",
        "Doing: 4/4 cases (100%), case_3",
    ]
    assert lines[0].endswith("to go") and not lines[1].endswith("to go")
    (line,) = drawn(io.StringIO(), 1, monkeypatch).splitlines()
    assert line.startswith("Doing: 4/4 cases (100%), case_3, 0")


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = drawn(Terminal(), 1, monkeypatch)
    assert text.count("\r") >= 4 and "4/4" in text


def test_of_one_that_is_closed_early_the_last_is_told(monkeypatch):
    stream = io.StringIO()
    with ProgressBar(total=4, desc="Doing", unit="case", file=stream) as bar:
        bar.update()
    assert stream.getvalue().startswith("Doing: 1/4 cases")
