"""Ratios are those of calls in the same round, floors are the model's own products, bytes are counted once."""

import time

import pytest
from torch import nn

from tests.fuzz_checkpoint import forward, pack, tiny_dit
from vqlib.packed import timing
from vqlib.packed.modes import set_mode
from vqlib.packed.timing import compare, products, tensor_bytes


def test_the_first_call_is_the_yardstick_and_turns_are_taken():
    order = []

    def call(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    table = compare({"a": call("a", 0.004), "b": call("b", 0.02)}, rounds=3).set_index("method")
    assert order == ["a", "b"] * 4
    assert table.loc["a", "ratio"] == table.loc["a", "best"] == 1.0 < table.loc["b", "best"]
    assert table.loc["b", "ratio"] > 1.5
    assert table.loc["b", "low"] <= table.loc["b", "ratio"] <= table.loc["b", "high"] and table.loc["b", "ms"] >= 20
    assert compare({"a": call("a", 0)}, rounds=1)["ratio"].item() == 1.0
    with pytest.raises(ValueError, match="0 calls in 3 rounds"):
        compare({}, rounds=3)


def test_a_time_ends_when_every_gpu_in_use_is_done(monkeypatch):
    waited = []
    gpus = {"is_initialized": lambda: True, "device_count": lambda: 3, "memory_allocated": lambda i: (0, 512, 9)[i]}
    for name, answer in (gpus | {"synchronize": waited.append}).items():
        monkeypatch.setattr(timing.torch.cuda, name, answer)
    compare({"a": lambda: waited.append("a")}, rounds=1)
    assert waited == ["a", 1, 2, "a", 1, 2]  # the call that does not count is waited for, too


def test_products_are_those_of_the_forward(monkeypatch):
    model, shapes = pack(tiny_dit()), []
    repeat = products(model, lambda: forward(model))
    monkeypatch.setattr(timing, "linear", lambda x, weight, bias: shapes.append(tuple(weight.shape)))
    repeat()
    packed = shapes.count((16, 16)), shapes.count((64, 16)), shapes.count((16, 64)), shapes.count((96, 16))
    assert packed == (8 + 3, 2, 2, 2)  # the timestep embedder runs in each block and in the final layer
    assert len(shapes) == 14 + 2 * 3 + 2


def test_bytes_count_shared_memory_once_and_dense_weights_while_they_are_kept():
    model = pack(tiny_dit(), shared=True)
    before = tensor_bytes(model)
    assert tensor_bytes(nn.ModuleList([model, model])) == before
    choice = set_mode(model, "speed")
    assert tensor_bytes(model) == before + choice.extra_bytes
    set_mode(model, "memory")
    assert tensor_bytes(model) == before
    assert tensor_bytes(nn.Linear(3, 2)) == 4 * (6 + 2) and tensor_bytes(nn.Identity()) == 0
