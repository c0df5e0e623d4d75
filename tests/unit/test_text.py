import pickle

import pytest

from nnssl_adapt.errors import DatasetJsonError, PlanError
from nnssl_adapt.text import and_more, dimensions, lines_and_more, read_json, size_text


def test_lists_say_how_many_are_left_out():
    assert and_more(["a", "b"]) == "a, b"
    assert and_more(range(7), limit=3) == "0, 1, 2 and 4 more"
    assert lines_and_more(["x", "y", "z"], limit=2) == "  x\n  y\n  … and 1 more"


def test_numbers():
    assert dimensions((160, 96, 33)) == "160 × 96 × 33"
    assert dimensions((1.0, 0.9375, 0.93754321), digits=3) == "1 × 0.938 × 0.938"
    assert size_text(3 * 2**29) == "1.5 GiB" and size_text(2**20) == "1.0 MiB"


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": [1]}')
    assert read_json(path, DatasetJsonError) == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1, "a": 1}', "'a' stands twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        ("[1]", "an object"),
        ("{", "not a plans file"),
        ("[" * 100_000, "nested"),
        (None, "there is no plans file"),
    ],
)
def test_json_that_is_wrong_is_told_with_its_path(tmp_path, text, word):
    path = tmp_path / "plans.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=word) as caught:
        read_json(path, PlanError, "plans file")
    assert caught.value.path == path and str(path) in str(caught.value)


def test_errors_keep_their_fields_between_processes(tmp_path):
    error = PlanError("wrong", path=tmp_path, mistakes=["a", "b"], next_command="nnssl-adapt doctor")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "wrong"
    assert (again.path, again.mistakes, again.next_command) == (tmp_path, ("a", "b"), "nnssl-adapt doctor")
