"""Processes that add up tensors, to see whether they reach each other."""

import pytest

from nnssl_adapt.errors import OtherRankFailed
from nnssl_adapt.training.launch.meeting import processes_talk


def test_processes_that_break_down_are_told():
    with pytest.raises(OtherRankFailed, match="no answer from"):
        processes_talk(1, "no_such_device")
