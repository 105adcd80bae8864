"""Round-to-nearest by torchao: levels, groups, the same grid as GPTQ's, and clear errors."""

import sys

import pytest
import tiny
import torch

from vqlib.models import structure
from vqlib.studies.baselines.gptq import fit_grid
from vqlib.studies.baselines.round_to_nearest import RoundToNearest


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, None), (4, 32)])
def test_weights_take_few_levels_a_group_and_bits_are_as_stored(bits, group_size):
    pipe = tiny.pipeline()
    found = RoundToNearest(bits, group_size).build(pipe)
    stored = 0
    for name, layer in structure.quantizable(pipe.transformer).items():
        weight = found.model.get_submodule(name).weight
        groups = weight.reshape(-1, group_size or layer.in_features)
        assert max(len(group.unique()) for group in groups) <= 2**bits and not torch.equal(weight, layer.weight)
        stored += bits * weight.numel() + (16 + bits) * len(groups)
    weights = sum(layer.weight.numel() for layer in structure.quantizable(pipe.transformer).values())
    assert found.bits_per_weight == pytest.approx(stored / weights)
    assert torch.equal(found.model.proj_out_2.weight, pipe.transformer.proj_out_2.weight)


def test_gptqs_grid_is_torchaos():
    pipe = tiny.pipeline()
    name = "transformer_blocks.0.ff.net.0.proj"
    weight = pipe.transformer.get_submodule(name).weight
    for bits in (2, 3, 4):
        theirs = RoundToNearest(bits, 16).build(pipe).model.get_submodule(name).weight
        ours = fit_grid(weight, bits, 16).round(weight, torch.arange(weight.shape[1]))
        assert (
            (theirs - ours).abs() > 1e-6
        ).float().mean() < 5e-3  # scales are rounded to float16 later there: ties flip


def test_errors_name_the_layer_the_bits_and_the_package(monkeypatch):
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match=r"in_features 32 is not divisible by group_size=24 \(transformer_blocks.0"):
        RoundToNearest(4, 24).build(pipe)
    with pytest.raises(ValueError, match="bits=1 is outside 2 … 8"):
        RoundToNearest(1)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vqlib\[baselines\]'"):
        RoundToNearest(4).build(pipe)
