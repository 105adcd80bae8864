import pytest
import tiny
import torch
from torch import nn

from vqlib.calibrator.hessians import input_hessians
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.packed.harden import harden, reconstruction_error
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear, soft_layers

CONFIG = VQConfig(k=16, d=4, candidates=3)


def test_every_linear_of_the_blocks_is_replaced_and_nothing_else():
    transformer = tiny.transformer()
    student = quantize(transformer, CONFIG)
    soft = {name for name, m in student.named_modules() if isinstance(m, CandidateLinear)}
    assert soft == set(structure.quantizable(transformer))
    assert len(soft) == 2 * 7 and not any("norm1.emb" in name for name in soft)
    assert all(isinstance(m, torch.nn.Linear) for m in structure.quantizable(transformer).values()), (
        "the original was changed"
    )


def test_hardening_at_the_start_takes_the_nearest_codeword():
    transformer = tiny.transformer()
    packed = harden(quantize(transformer, CONFIG.replace(candidates=1), seed=3))
    name, layer = next(iter(structure.quantizable(transformer).items()))
    hard = packed.get_submodule(name)
    distances = torch.cdist(layer.weight.reshape(-1, 4), hard.codebook)
    assert torch.equal(hard.assignments(), distances.argmin(1))
    assert 0 < reconstruction_error(layer.weight, hard) < 0.5


def test_same_seed_same_codes_other_seed_other_codebook():
    transformer = tiny.transformer()
    a, b, c = (quantize(transformer, CONFIG, seed=seed) for seed in (1, 1, 2))
    name = next(iter(structure.quantizable(transformer)))
    assert torch.equal(a.get_submodule(name).codebook, b.get_submodule(name).codebook)
    assert not torch.equal(a.get_submodule(name).codebook, c.get_submodule(name).codebook)


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
@pytest.mark.parametrize("assignment", ["nearest", "error-feedback"])
def test_a_layer_of_zeros_is_packed_exactly(scope, assignment):
    pipe = tiny.pipeline()
    dead = pipe.transformer.transformer_blocks[1].norm1.linear
    dead.weight.zero_()
    config = VQConfig(k=16, d=4, candidates=2, codebook_scope=scope, assignment=assignment, kmeans_iterations=2)
    hessians = input_hessians(pipe, CalibrationConfig(batch_size=2, steps=4), 1)
    packed = harden(quantize(pipe.transformer, config, hessians=hessians))
    assert torch.equal(packed.transformer_blocks[1].norm1.linear.weight(), dead.weight)


def test_a_constant_layer_is_packed_exactly():
    transformer = tiny.transformer()
    transformer.transformer_blocks[0].attn1.to_q.weight.fill_(0.3)
    packed = harden(quantize(transformer, VQConfig(k=16, d=4, candidates=2)))
    assert (
        packed.transformer_blocks[0].attn1.to_q.weight() == transformer.transformer_blocks[0].attn1.to_q.weight
    ).all()


def test_what_is_quantized_already_is_refused():
    config = VQConfig(k=16, d=4, candidates=2, kmeans_iterations=2)
    student = quantize(tiny.transformer(), config)
    partly = tiny.transformer()
    structure.swap(partly, "transformer_blocks.1.attn1.to_q", harden(student).transformer_blocks[1].attn1.to_q)
    for model, count in ((student, 14), (harden(student), 14), (partly, 1)):
        with pytest.raises(ValueError, match=f"^{count} layers are quantized already, transformer_blocks"):
            quantize(model, config)


def test_a_model_without_a_block_is_refused():
    with pytest.raises(ValueError, match="Linear"):
        quantize(torch.nn.Linear(8, 8), VQConfig(k=16, d=4))


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_values_that_are_not_finite_are_named_with_their_layer(scope, part):
    transformer = tiny.transformer()
    getattr(transformer.transformer_blocks[1].attn1.to_k, part).data.view(-1)[3] = torch.inf
    with pytest.raises(ValueError, match=rf"1 of \d+ values are not finite \(transformer_blocks.1.attn1.to_k.{part}\)"):
        quantize(transformer, VQConfig(k=16, d=4, codebook_scope=scope))


def test_layers_take_the_codes_that_the_first_fitting_rule_says():
    model = tiny.transformer()
    rules = (("*.0.*.to_q", 8, 2), ("*to_q", 4, 8), ("*.ff.net.2", 32, 4))
    student = quantize(model, VQConfig(k=16, d=4, candidates=2, layers=rules))
    shapes = {name: tuple(layer.codebook.shape) for name, layer in soft_layers(student).items()}
    assert shapes.pop("transformer_blocks.0.attn1.to_q") == (8, 2)
    assert shapes.pop("transformer_blocks.1.attn1.to_q") == (4, 8)
    assert {shapes.pop(f"transformer_blocks.{i}.ff.net.2") for i in range(2)} == {(32, 4)}
    assert len(shapes) == 10 and set(shapes.values()) == {(16, 4)}


@pytest.mark.parametrize("scope, codebooks", [("block", 4), ("model", 2)])
def test_only_layers_of_the_same_codes_share_a_codebook(scope, codebooks):
    rules = (("*to_v", 8, 2),)
    student = quantize(tiny.transformer(), VQConfig(k=16, d=4, codebook_scope=scope, layers=rules))
    assert len({id(layer.codebook) for layer in soft_layers(student).values()}) == codebooks


def test_a_pattern_that_fits_no_layer_is_named():
    for config in ({"layers": (("*to_qq", 8, 2),)}, {"full_precision": ("*to_qq",)}):
        with pytest.raises(ValueError, match=r"pattern '\*to_qq' fits none of the 14 layers, transformer_blocks.0"):
            quantize(tiny.transformer(), VQConfig(k=16, d=4, **config))


def test_a_layer_in_two_places_is_refused():
    model = tiny.transformer()
    attention = model.transformer_blocks[1].attn1
    attention.to_v = attention.to_k
    message = r"transformer_blocks.1.attn1.to_k stands in 2 places of the model: give full_precision=\('trans"
    with pytest.raises(ValueError, match=message):
        quantize(model, VQConfig(k=16, d=4))
    student = quantize(model, VQConfig(k=16, d=4, full_precision=("transformer_blocks.1.attn1.to_k",)))
    assert len(soft_layers(student)) == 12


def test_patterns_that_leave_no_layer_are_named():
    with pytest.raises(ValueError, match=r"full_precision=\('\*',\) leaves none of its 14 linear layers"):
        quantize(tiny.transformer(), VQConfig(k=16, d=4, full_precision=("*",)))


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_layers_of_a_module_that_does_not_call_them_are_refused_by_name(kind):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"inner": kind(32, 2), "up": nn.Linear(32, 32)}) for _ in range(2))
    with pytest.raises(
        ValueError, match=rf"blocks.0.inner.* is part of blocks.0.inner, a {kind.__name__}, which reads"
    ):
        quantize(model, VQConfig(k=16, d=4))
    student = quantize(model, VQConfig(k=16, d=4, full_precision=("*.inner.*",)))
    assert list(soft_layers(student)) == ["blocks.0.up", "blocks.1.up"]


def test_a_rule_that_does_not_fit_a_layer_names_it():
    with pytest.raises(ValueError, match=r"in_features 32 is not divisible by d=5 \(transformer_blocks.1.attn1.to_k\)"):
        quantize(tiny.transformer(), VQConfig(k=16, d=4, layers=(("*.1.*to_k", 16, 5),)))
