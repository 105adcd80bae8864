"""diffusers as host: its own calls save, load, quantize and dequantize, for DiT and for other transformers."""

import copy
import json
import logging

import pytest
import torch

import vqlib

# isort: split
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from tests.fuzz_checkpoint import CONFIG, WEIGHTS, content, forward, pack, same, tiny_dit
from vqlib import CheckpointError, VQConfig, VQLinear, fit_codebook, load_transformer, save
from vqlib.packed.checkpoint import attach
from vqlib.packed.diffusers_backend import packed_layers

SMALL = VQConfig(k=16, d=4)


@pytest.fixture
def plain(tmp_path):
    """A folder with an ordinary full-precision DiT."""
    tiny_dit().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_both_doors_write_the_same_file_and_read_the_same_model(tmp_path):
    model = attach(pack(tiny_dit()), {"source": "tiny"})
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    assert theirs == ours
    for loaded in (
        DiTTransformer2DModel.from_pretrained(tmp_path / "ours"),
        AutoModel.from_pretrained(str(tmp_path / "ours")),
        load_transformer(tmp_path / "theirs"),
    ):
        assert same(loaded, model) and torch.equal(forward(loaded), forward(model))


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_a_model_fresh_from_harden_saves_and_loads_through_diffusers_alone(tmp_path, scope):
    packed = vqlib.harden(vqlib.quantize(tiny_dit(), SMALL.replace(candidates=2, codebook_scope=scope)))
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModel.from_pretrained(str(tmp_path / "packed"))
    assert same(loaded, packed) and torch.equal(forward(loaded), forward(packed))
    assert loaded.config.quantization_config.config.codebook_scope == scope


def test_no_path_of_this_machine_is_written(plain, tmp_path):
    model = DiTTransformer2DModel.from_pretrained(plain, quantization_config=SMALL)
    model.save_pretrained(tmp_path / "a")
    DiTTransformer2DModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    save(load_transformer(tmp_path / "b"), tmp_path / "c")
    copy.deepcopy(load_transformer(tmp_path / "c")).save_pretrained(tmp_path / "d")
    load_transformer(tmp_path / "d").dequantize().save_pretrained(tmp_path / "e")
    for name in "abcde":
        text = (tmp_path / name / CONFIG).read_text()
        assert str(tmp_path) not in text and "_name_or_path" not in text, name
    assert content(tmp_path / "a") == content(tmp_path / "d")


def test_quantize_on_load_is_kmeans_of_every_block_linear(plain):
    model = DiTTransformer2DModel.from_pretrained(plain, quantization_config=SMALL)
    layers = packed_layers(model)
    assert len(layers) == 14 and not any("norm1.emb" in name for name in layers)
    original = tiny_dit().get_submodule("transformer_blocks.1.ff.net.2").weight.detach()
    book = fit_codebook(original.reshape(-1, 4), 16, seed=0)
    layer = layers["transformer_blocks.1.ff.net.2"]
    assert torch.equal(layer.weight(), book.codewords[book.assignments].view_as(original))
    assert layer.bias is not None and float(layer.scale) == 1.0


def test_a_model_quantized_on_load_saves_and_reloads_without_arguments(plain, tmp_path):
    model = DiTTransformer2DModel.from_pretrained(plain, quantization_config=SMALL)
    model.save_pretrained(tmp_path / "packed")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(forward(loaded), forward(model))
    assert loaded.config.quantization_config.config.k == 16
    assert loaded.config.quantization_config.provenance["made_by"] == "k-means on load"


def test_sharded_full_precision_models_are_quantized_on_load(plain, tmp_path):
    tiny_dit().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "shards", quantization_config=SMALL)
    assert same(model, DiTTransformer2DModel.from_pretrained(plain, quantization_config=SMALL))


def test_layers_that_cannot_be_quantized_are_named_and_kept(plain, caplog):
    with caplog.at_level(logging.WARNING, logger="vqlib"):
        model = DiTTransformer2DModel.from_pretrained(plain, quantization_config=VQConfig(k=100, d=4))
    assert "transformer_blocks.0.attn1.to_q (64 sub-vectors are fewer than k=100)" in caplog.text
    assert type(model.transformer_blocks[0].attn1.to_q) is nn.Linear
    assert isinstance(model.transformer_blocks[0].ff.net[0].proj, VQLinear)
    with pytest.raises(ValueError, match="no linear layer of DiTTransformer2DModel can be quantized with k=16, d=5"):
        DiTTransformer2DModel.from_pretrained(plain, quantization_config=VQConfig(k=16, d=5))


def test_a_shared_codebook_on_load_says_what_to_call_instead(plain):
    with pytest.raises(ValueError, match="codebook_scope='model'.*vqlib.quantize"):
        DiTTransformer2DModel.from_pretrained(plain, quantization_config=SMALL.replace(codebook_scope="model"))
    with pytest.raises(ValueError, match="assignment='error-feedback'.*vqlib.quantize"):
        DiTTransformer2DModel.from_pretrained(plain, quantization_config=SMALL.replace(assignment="error-feedback"))


def test_loading_in_bfloat16_casts_codebooks_but_neither_codes_nor_scales(tmp_path):
    model = pack(tiny_dit(), shared=True)
    save(model, tmp_path / "packed")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    layer, original = (packed_layers(m)["transformer_blocks.0.attn1.to_q"] for m in (loaded, model))
    assert torch.equal(layer.codes, original.codes) and layer.codebook.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, original.scale)
    x = random(2, 4, 8, 8).bfloat16()
    out = loaded(x, timestep=torch.tensor([3, 4]), class_labels=torch.tensor([0, 1])).sample
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_dequantized_models_are_dense_and_survive_a_round_trip(tmp_path):
    model = attach(pack(tiny_dit(), shared=True))
    save(model, tmp_path / "packed")
    packed_output = forward(model)
    for quantized in (model, load_transformer(tmp_path / "packed")):
        dense = quantized.dequantize()
        assert not packed_layers(dense) and "quantization_config" not in dense.config
        torch.testing.assert_close(forward(dense), packed_output)
        dense.save_pretrained(tmp_path / "dense")
        assert torch.equal(forward(DiTTransformer2DModel.from_pretrained(tmp_path / "dense")), forward(dense))
        dense.half()  # allowed again
        pointers = [p.data_ptr() for p in dense.parameters()]
        assert len(set(pointers)) == len(pointers) == sum(1 for _ in dense.state_dict())


def test_a_copied_model_saves_on_its_own(tmp_path):
    model = attach(pack(tiny_dit()))
    twin = copy.deepcopy(model)
    packed_layers(twin)["transformer_blocks.0.attn1.to_q"].codebook.mul_(2)
    twin.save_pretrained(tmp_path / "twin")
    assert same(load_transformer(tmp_path / "twin"), twin) and not same(twin, model)


def test_pickle_is_refused(tmp_path):
    with pytest.raises(ValueError, match="safetensors only"):
        attach(pack(tiny_dit())).save_pretrained(tmp_path / "packed", safe_serialization=False)


def test_damage_is_found_by_from_pretrained_too(tmp_path):
    save(pack(tiny_dit()), tmp_path / "packed")
    data = bytearray((tmp_path / "packed" / WEIGHTS).read_bytes())
    data[-3] ^= 4
    (tmp_path / "packed" / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have the checksum|do not have the checksum"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "packed")


def tiny_pipeline():
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return DiTPipeline(tiny_dit(num_embeds_ada_norm=1000), vae, DDIMScheduler())


def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline([1, 2], num_inference_steps=2, generator=generator, output_type="np").images)


def test_a_whole_pipeline_goes_through_disk(tmp_path):
    pipeline = tiny_pipeline()
    attach(pack(pipeline.transformer))
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert packed_layers(loaded.transformer)
    assert torch.equal(images(loaded), images(pipeline))


def test_a_whole_pipeline_is_quantized_on_load(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": SMALL})
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline", quantization_config=mapping)
    assert len(packed_layers(pipeline.transformer)) == 14


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, caption_channels=12,
        cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 5, 12), "timestep": torch.tensor([7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    return model, inputs


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 5, 16),
        "pooled_projections": random(1, 12), "timestep": torch.tensor([7]),
    }  # fmt: skip
    return model, inputs


def flux():
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": random(1, 6, 4), "encoder_hidden_states": random(1, 5, 12),
        "pooled_projections": random(1, 12), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model, inputs


@pytest.mark.parametrize("build", [pixart, sd3, flux])
def test_other_transformers_are_quantized_saved_and_loaded(build, tmp_path):
    torch.manual_seed(0)
    model, inputs = build()
    model.save_pretrained(tmp_path / "plain")
    quantized = type(model).from_pretrained(tmp_path / "plain", quantization_config=VQConfig(k=8, d=2))
    assert len(packed_layers(quantized)) >= 16
    save(quantized, tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed")
    assert type(loaded) is type(model)
    with torch.inference_mode():
        expected, found = quantized(**inputs).sample, loaded(**inputs).sample
    assert torch.equal(found, expected) and bool(found.isfinite().all())
    assert torch.equal(type(model).from_pretrained(tmp_path / "packed")(**inputs).sample, found)
