import pytest
from support.model_folders import write_model_folder


@pytest.fixture
def make_model(tmp_path):
    """Call it to write a small trained model folder; see model_folders.write_model_folder. Returns its path."""

    def make(**arguments):
        return write_model_folder(tmp_path, **arguments)

    return make
