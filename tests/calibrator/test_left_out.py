"""Layers left in full precision, whole blocks too: calibrated around, stored as they are, counted as what they take."""

import pytest
import tiny
import torch

from vqlib.calibrator import diagnostics
from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.distill import distill
from vqlib.config import VQConfig, recipe, recipe_distillation
from vqlib.models import structure
from vqlib.models.geometry import MIB, Geometry
from vqlib.packed.checkpoint import load_transformer, save, size_report
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import soft_layers

CODES = VQConfig(k=16, d=4, candidates=2, full_precision=("*.to_k", "transformer_blocks.1.*"))
SHORT = {"iterations": 4, "batch_size": 2, "steps": 3}


def test_the_whole_chain_leaves_them_as_they_are(tmp_path):
    pipe = tiny.pipeline()
    dense = structure.quantizable(pipe.transformer)
    left = {name for name in dense if name.endswith("to_k") or name.startswith("transformer_blocks.1.")}
    calibration = calibrate(pipe, quantize(pipe.transformer, CODES), recipe("paper", **SHORT), out=tmp_path / "run")
    records = list(calibration)
    assert set(records[0].layers) == dense.keys() - left and len(records[0].block_losses) == 2
    packed = distill(pipe, calibration.finish(), recipe_distillation("best", **SHORT)).finish()
    save(packed, tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed")
    for name, layer in dense.items():
        assert isinstance(loaded.get_submodule(name), VQLinear) is (name not in left), name
        if name in left:
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight.half().float()), name


def test_gradients_are_those_of_the_layers_that_are_quantized():
    pipe = tiny.pipeline()
    student = quantize(pipe.transformer, CODES)
    found = diagnostics.subvector_gradients(pipe, student, recipe("paper", **SHORT), batches=1)
    assert set(found) == set(soft_layers(student)) and all(grad.abs().sum() > 0 for grad in found.values())


def test_stored_bits_count_them_at_sixteen():
    pipe = tiny.pipeline()
    packed = calibrate(pipe, quantize(pipe.transformer, CODES), recipe("paper", **SHORT)).finish()
    table, dense = size_report(packed).set_index("layer"), structure.quantizable(pipe.transformer)
    weights = {name: layer.weight.numel() for name, layer in dense.items()}
    bits = sum(table.loc[name, "bits_per_weight"] * count for name, count in weights.items()) / sum(weights.values())
    assert table.loc["transformer_blocks.0.attn1.to_k", "bits_per_weight"] == 16.0
    assert size_report(packed).attrs["bits_per_weight"] == pytest.approx(bits) and bits > 8
    sizes = Geometry.of(pipe.transformer.config).sizes(CODES)
    assert sizes.codes * MIB == table["codes_bytes"].sum()
    assert sizes.full * MIB == 4 * sum(
        dense[name].weight.numel() + dense[name].bias.numel() for name in dense if CODES.takes(name)
    )
