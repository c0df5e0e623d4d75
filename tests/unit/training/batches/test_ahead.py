"""Batches are finished one ahead, in their order, by a thread that ends with them."""

import threading

import pytest
import torch
from support.training_runs import trainer_of

from nnssl_adapt.training.batches.ahead import prepared_ahead
from nnssl_adapt.training.run.checkpointing import load_checkpoint

CPU = torch.device("cpu")


class Source:
    """Six batches, of which the fourth is for validation."""

    def __init__(self, fails_at=None):
        self.given, self.closed, self.fails_at = [], False, fails_at

    def batches(self):
        try:
            for number in range(6):
                if number == self.fails_at:
                    raise OSError("a damaged case")
                self.given.append(number)
                yield {"image": torch.tensor([number])} if number == 3 else {"image": number, "work": []}
        finally:
            self.closed = True


def prepare(batch, device):
    assert threading.current_thread() is not threading.main_thread()
    return torch.tensor([batch["image"]]), torch.tensor([10 * batch["image"]])


def test_all_in_their_order_and_no_more_than_one_ahead():
    source, seen = Source(), []
    for batch in prepared_ahead(source.batches(), prepare, CPU):
        seen.append(int(batch["image"]))
        assert len(source.given) <= len(seen) + 1
        assert ("target" in batch) == (seen[-1] != 3)
    assert seen == list(range(6)) and source.closed


def test_the_next_one_is_made_while_nobody_asks():
    source, made = Source(), threading.Event()

    def second(batch, device):
        if batch["image"] == 1:
            made.set()
        return prepare(batch, device)

    batches = prepared_ahead(source.batches(), second, CPU)
    next(batches)
    assert made.wait(60)
    batches.close()


def test_closing_ends_the_thread_and_the_batches():
    source = Source()
    batches = prepared_ahead(source.batches(), prepare, CPU)
    next(batches)
    batches.close()
    assert source.closed and not [each for each in threading.enumerate() if each.name.startswith("batches")]


def test_errors_come_through_and_close_too():
    source, seen = Source(fails_at=2), []
    with pytest.raises(OSError, match="damaged"):
        seen += prepared_ahead(source.batches(), prepare, CPU)
    assert source.closed


def test_a_training_with_them_is_that_of_the_cpu(plan, recipe):
    weights = []
    for where in ("gpu", "default"):
        model = trainer_of(plan, recipe.override(augmentation=where, trainer_name=f"Augmented_{where}")).run()
        weights.append(load_checkpoint(model.path / "fold_0/checkpoint_final.pth")["network_weights"])
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5), name
