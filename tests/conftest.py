"""What all tests share: nnU-Net's folders in a temporary place, and the small real checkpoints."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.slurm import why_not

# Tiny arrays gain nothing from threads, and two test processes would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What started the tests may ignore these (nohup, a shell's background), and their processes would do so after them.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, name, signal.SIGINT)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)

CHECKPOINTS = Path(__file__).parent / "data" / "nnssl_checkpoints"


@pytest.fixture(scope="session")
def cache_homes(tmp_path_factory):
    """Numbered paths; ``mktemp`` for each test would list thousands of folders each time."""
    base = tmp_path_factory.mktemp("cache_homes")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(cache_homes, monkeypatch):
    """Downloads and unpacked zips of a test are its own, wherever they are kept by default."""
    folder = next(cache_homes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "nnssl_adapt"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests on the real Slurm go to the same process: it starts only one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneSlurm(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return OneSlurm(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One process more than cores where the tests on the real Slurm run: theirs waits most of the time."""
    folder = Path(__file__).parent / "slurm"
    chosen = any(folder.is_relative_to(Path(argument.partition("::")[0]).resolve()) for argument in config.args)
    return len(os.sched_getaffinity(0)) + 1 if chosen and why_not() is None else None


LONGEST = 300  # seconds; the slowest test takes thirty on two idle cores
LONGEST_ON_SLURM = 900  # its tests wait for a dozen programs, one after the other


@contextmanager
def in_time(item):
    """Who waits forever fails, and the others go on."""
    longest = LONGEST_ON_SLURM if "slurm" in item.keywords else LONGEST

    def too_long(*_):
        pytest.fail(f"took more than {longest} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(longest)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with in_time(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with in_time(item):
        return (yield)


# A picture of one black pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def quick_picture(request, monkeypatch):
    """Drawing the progress after each epoch takes ten times as long as such an epoch: only what is marked "pictures" does."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(
            "nnssl_adapt.training.progress.picture.draw_progress",
            lambda history, path, names=(): path.write_bytes(PIXEL),
        )


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnUNet_raw, _preprocessed and _results below a temporary folder, which is returned."""
    for part in ("raw", "preprocessed", "results"):
        folder = tmp_path / f"nnUNet_{part}"
        folder.mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(folder))
    monkeypatch.delenv("nnssl_pretrained_models", raising=False)
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A running hub that huggingface_hub is pointed at, also for uploads; ``hub.add(repo_id, files)`` publishes."""
    from support.hub_server import HubServer

    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "nnssl_pretrained_models"):
        monkeypatch.delenv(variable, raising=False)
    # Imported before it sees the address of this server, which others would find in its constants.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session", autouse=True)
def few_draws():
    """Fingerprints by a thousandth of nnU-Net's 10⁸ draws, which take seconds however small the images are.

    Processes that a test starts draw them all.
    """
    with pytest.MonkeyPatch.context() as patched:
        if importlib.util.find_spec("SimpleITK"):  # tests of a GPU do without, on a machine with little installed
            patched.setattr("nnssl_adapt.data.verifying.examine.TOTAL_DRAWS", 10e4)
        yield


@pytest.fixture
def tiny_dataset(nnunet_folders):
    """Make a tiny raw dataset with its fingerprint: ``tiny_dataset(channels=2, …)``, see ``synthetic.make_dataset``."""
    from support.synthetic import make_dataset

    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.verifying.examine import fingerprint_dataset

    def make(**arguments) -> Path:
        folder = make_dataset(nnunet_folders / "nnUNet_raw", **arguments)
        fingerprint = fingerprint_dataset(RawDataset.open(folder))
        fingerprint.save(nnunet_folders / "nnUNet_preprocessed" / folder.name / "dataset_fingerprint.json")
        return folder

    return make


@pytest.fixture
def small_resenc() -> Path:
    """Folder of a small ResEnc that nnssl's masked autoencoder pre-trained at 1 mm on patches of 32³."""
    return CHECKPOINTS / "small_resenc"


REHEARSAL = "NNSSL_ADAPT_REHEARSE_CUDA"
"""Environment variable: 1 runs the tests marked ``cuda`` on the CPU. It tells nothing of a card, but finds mistakes in them."""


@pytest.fixture(scope="session")
def cuda_device():
    """The card that a test marked ``cuda`` runs on; in a rehearsal the CPU."""
    import torch

    return torch.device("cpu" if os.environ.get(REHEARSAL) == "1" else "cuda")


def pytest_collection_modifyitems(items):
    import torch

    # Those on the real Slurm wait most of the time: they begin first, beside all others.
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))

    if torch.cuda.is_available() or os.environ.get(REHEARSAL) == "1":
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
