import os
import signal
import threading

import pytest

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
