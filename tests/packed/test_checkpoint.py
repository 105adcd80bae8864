"""Packed checkpoints: load equals save, nothing is stored twice, and damage is named instead of loaded."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from tests.fuzz_checkpoint import (
    CONFIG,
    WEIGHTS,
    content,
    forge,
    forward,
    fuzz,
    kill_while_saving,
    pack,
    same,
    tiny_dit,
)
from vqlib import CheckpointError, load_transformer, save, size_report
from vqlib.config import VQConfig
from vqlib.kernels.bits import pack_codes
from vqlib.packed.checkpoint import packed_layers, stored_in
from vqlib.packed.harden import harden, soften
from vqlib.quantizer.quantize import quantize
from vqlib.system import folders


@pytest.mark.parametrize("k", [2, 3, 8, 13, 32, 64, 100, 256, 300, 1024])
def test_loading_gives_what_was_saved_at_any_width_of_code(tmp_path, k):
    model = pack(tiny_dit(), k=k, d=2)
    save(model, tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed")
    assert same(loaded, model) and torch.equal(forward(loaded), forward(model))
    assert not loaded.training and all(not p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_codebooks_keep_dtype_scale_and_sharing(tmp_path, dtype, shared):
    model = pack(tiny_dit(), shared=shared, dtype=dtype)
    save(model, tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed")
    books = [layer.codebook for layer in packed_layers(loaded).values()]
    assert {book.dtype for book in books} == {dtype}
    assert len({book.data_ptr() for book in books}) == (1 if shared else len(books))
    assert torch.equal(forward(loaded), forward(model))
    config = json.loads((tmp_path / "packed" / CONFIG).read_text())["quantization_config"]
    assert config["codebook_scope"] == ("model" if shared else "layer")


def test_layers_of_other_codes_are_written_in_the_config_and_come_back(tmp_path):
    rules = (("*to_q", 8, 2), ("*.1.*to_k", 32, 4))
    model = harden(quantize(tiny_dit(), VQConfig(k=16, d=4, candidates=1, layers=rules, codebook_dtype="float16")))
    save(model, tmp_path / "packed")
    loaded = load_transformer(tmp_path / "packed")
    assert same(loaded, model) and torch.equal(forward(loaded), forward(model))
    sizes = {name: (layer.k, layer.d) for name, layer in packed_layers(loaded).items()}
    assert sizes["transformer_blocks.1.attn1.to_k"] == (32, 4) and sizes["transformer_blocks.0.attn1.to_k"] == (16, 4)
    assert {layer.codebook.dtype for layer in packed_layers(loaded).values()} == {torch.float16}
    known = loaded.hf_quantizer.quantization_config.config
    assert {name: (known.for_layer(name).k, known.for_layer(name).d) for name in sizes} == sizes


def test_a_config_says_no_more_than_that_of_earlier_files_unless_it_must(tmp_path):
    """The checksum is over the whole config: a key more, and files made before it could not be read."""
    save(pack(tiny_dit()), tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / CONFIG).read_text())["quantization_config"]
    keys = {"quant_method", "format", "bits", "k", "d", "codebook_scope", "storage", "provenance"}
    assert set(written) == keys


def test_the_embedders_of_all_blocks_are_one_in_file_and_memory(tmp_path):
    save(pack(tiny_dit(num_layers=5)), tmp_path / "packed")
    with safe_open(tmp_path / "packed" / WEIGHTS, "pt") as file:
        assert len([name for name in file.keys() if "norm1.emb.class_embedder" in name]) == 1
    blocks = load_transformer(tmp_path / "packed").transformer_blocks
    first, last = (blocks[i].norm1.emb.class_embedder.embedding_table.weight for i in (0, 4))
    assert first is last


def test_the_file_is_codes_codebooks_and_the_rest_once_in_half(tmp_path):
    model = pack(tiny_dit(num_attention_heads=6, attention_head_dim=32, num_layers=6), k=256, d=4)
    save(model, tmp_path / "packed")
    layers = packed_layers(model)
    promised = sum(layer.codes.numel() + 4 * layer.codebook.numel() for layer in layers.values())
    inside = tuple(f"{name}." for name in layers)
    copies = tuple(f"transformer_blocks.{i}.norm1.emb." for i in range(1, 6))
    for name, tensor in model.state_dict().items():
        if name.endswith(".bias") and name.startswith(inside) or not name.startswith(inside + copies):
            promised += 2 * tensor.numel()
    size = sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    assert promised <= size <= 1.02 * promised + 4096
    report = size_report(model)
    columns = ["codes_bytes", "codebook_bytes", "bias_bytes", "other_bytes"]
    assert report[columns].to_numpy().sum() == report.attrs["tensor_bytes"] <= size
    assert 2.0 < report.attrs["bits_per_weight"] < 2.5
    assert list(report["layer"])[:-1] == list(layers) and report["shape"][0] == "1152×192"


def test_size_report_counts_a_shared_codebook_once():
    report = size_report(pack(tiny_dit(), k=16, d=4, shared=True))
    scales = 4 * (len(report) - 1)
    assert report["codebook_bytes"].sum() == 16 * 4 * 4 + scales


def test_size_report_tells_what_an_entropy_coder_would_store():
    model = pack(tiny_dit(num_layers=1), k=4, d=4)
    layers = packed_layers(model)
    for layer in layers.values():  # half of the codes are 0, a quarter 1, an eighth each 2 and 3: 1.75 bits, not 2
        codes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]).repeat(layer.count // 8)
        layer.codes = pack_codes(codes, layer.code_bits)
    report = size_report(model)
    assert report["code_entropy"].tolist()[:-1] == pytest.approx([1.75] * len(layers))
    saved = report.attrs["bits_per_weight"] - report.attrs["entropy_coded"]
    assert saved == pytest.approx(0.25 / 4)
    for layer in layers.values():
        layer.codes = pack_codes(torch.zeros(layer.count, dtype=torch.long), layer.code_bits)
    assert size_report(model)["code_entropy"].sum() == 0.0


def test_float32_storage_rounds_nothing(tmp_path):
    model = pack(tiny_dit())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "wide", storage="float32")
    loaded = load_transformer(tmp_path / "wide").state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.items())
    save(model, tmp_path / "again")  # what is known of the model stays true
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    save(model, tmp_path / "half", storage="float16")
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="rounded to float16 when it was packed"):
        save(model, tmp_path / "wide", storage="float32")


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_hardened_model_is_the_students_own_values_and_none_of_its_memory(scope, tmp_path):
    student = quantize(tiny_dit(), VQConfig(k=8, d=4, candidates=2, codebook_scope=scope, kmeans_iterations=2))
    wide, half = harden(student, storage="float32"), harden(student)
    expected = {name: tensor for name, tensor in student.state_dict().items() if name in wide.state_dict()}
    assert all(torch.equal(wide.state_dict()[name].float(), tensor) for name, tensor in expected.items())
    assert size_report(wide).attrs["tensor_bytes"] > 1.5 * size_report(half).attrs["tensor_bytes"]
    save(wide, tmp_path / "wide")
    loaded = load_transformer(tmp_path / "wide").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wide.state_dict().items())
    assert stored_in(harden(soften(wide)), None) == "float32" and stored_in(harden(soften(half)), None) == "float16"
    before = forward(half)
    with torch.no_grad():
        for tensor in student.parameters():  # what goes on training
            tensor.mul_(1.5)
    assert torch.equal(forward(half), before)


def test_values_beyond_half_precision_are_kept_in_full(tmp_path):
    model = pack(tiny_dit())
    with torch.no_grad():
        model.proj_out_2.bias.fill_(1e6 + 1)
    save(model, tmp_path / "packed")
    assert torch.equal(load_transformer(tmp_path / "packed").proj_out_2.bias, torch.full((32,), 1e6 + 1))


def test_a_broken_model_is_not_saved_over_a_good_one(tmp_path):
    model = pack(tiny_dit())
    save(model, tmp_path / "packed")
    good = forward(model)
    packed_layers(model)["transformer_blocks.1.attn1.to_k"].codebook[3, 1] = float("nan")
    with pytest.raises(ValueError, match="transformer_blocks.1.attn1.to_k.codebook holds NaN"):
        save(model, tmp_path / "packed")
    assert torch.equal(forward(load_transformer(tmp_path / "packed")), good)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_provenance_is_kept_through_load_and_save(tmp_path):
    save(pack(tiny_dit()), tmp_path / "a", {"source": "tiny", "steps": (50, 100), "seed": 3})
    save(load_transformer(tmp_path / "a"), tmp_path / "b")
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert config["quantization_config"]["provenance"] == {"source": "tiny", "steps": [50, 100], "seed": 3}
    assert config["quantization_config"]["format"] == 1 and config["_class_name"] == "DiTTransformer2DModel"
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "records.json").write_text("{}")
    with pytest.raises(FileExistsError, match="records.json"):
        save(pack(tiny_dit()), tmp_path)
    assert (tmp_path / "records.json").read_text() == "{}"


def test_a_model_without_packed_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DiTTransformer2DModel has 0 packed layers"):
        save(tiny_dit(), tmp_path / "packed")


def test_random_damage_is_refused_or_does_not_matter(tmp_path):
    assert fuzz(300, 11, tmp_path, pack(tiny_dit(), k=12, shared=True)) > 250


def rename(tensors, manifest, config):
    tensors["transformer_blocks.0.attn1.to_x.codes"] = tensors.pop("transformer_blocks.0.attn1.to_q.codes")


Q = "transformer_blocks.0.attn1.to_q"
FORGERIES = {  # what is done to tensors, manifest and config; what the message must say
    "code above k": (lambda t, m, c: t[f"{Q}.codes"].fill_(0xFF), "code 15 names no codeword: k=12"),
    "codes too long": (
        lambda t, m, c: t.update({f"{Q}.codes": torch.zeros(99, dtype=torch.uint8)}),
        r"to_q.codes: is U8 \[99\]; a weight \[16, 16\] with k=12, d=4 takes U8 \[32\]",
    ),
    "codes as floats": (lambda t, m, c: t.update({f"{Q}.codes": torch.zeros(32)}), r"is F32 \[32\]"),
    "flat codebook": (lambda t, m, c: t.update({f"{Q}.codebook": torch.zeros(48)}), "not a floating codebook"),
    "odd d": (lambda t, m, c: t.update({f"{Q}.codebook": torch.zeros(12, 5)}), "d=5 does not divide in_features 16"),
    "infinite codeword": (lambda t, m, c: t[f"{Q}.codebook"].fill_(float("inf")), "codebook: holds NaN or infinity"),
    "missing tensor": (lambda t, m, c: t.pop("proj_out_2.bias"), "proj_out_2.bias: is missing"),
    "missing codebook": (lambda t, m, c: t.pop(f"{Q}.codebook"), "to_q.codebook: is missing"),
    "extra tensor": (lambda t, m, c: t.update(extra=torch.zeros(2)), "extra: is not part of this DiT"),
    "wrong shape": (
        lambda t, m, c: t.update({"proj_out_2.bias": torch.zeros(31)}),
        r"has shape \[31\], the model \[32\]",
    ),
    "unknown layer": (rename, "no linear layer of that name"),
    "alias of nothing": (lambda t, m, c: m["aliases"].update({"proj_out_2.bias": "nowhere"}), "alias of 'nowhere'"),
    "other format": (lambda t, m, c: m.update(format=2), "format 2; this version reads format 1"),
    "endless layers": (lambda t, m, c: c.update(num_layers=10**6), "num_layers: 1000000 cannot be right"),
    "huge table": (lambda t, m, c: c.update(sample_size=100_000), "sample_size: 100000 asks for a position table"),
    "table of a float": (lambda t, m, c: c.update(sample_size=9000.0), "sample_size: 9000.0 is no size"),
    "negative table": (lambda t, m, c: c.update(sample_size=-6000), "sample_size: -6000 is no size"),
    "layers in a list": (lambda t, m, c: c.update(layers=[1, [10**6]]), "layers: 1000000 cannot be right"),
    "huge number": (lambda t, m, c: c.update(attention_head_dim=10**12), "attention_head_dim: 1000000000000"),
    "no model": (lambda t, m, c: c.update(_class_name="DDPMScheduler"), "'DDPMScheduler' is not a diffusers model"),
    "other model": (lambda t, m, c: c.update(_class_name="PixArtTransformer2DModel"), "PixArtTransformer2DModel"),
    "wrong type": (lambda t, m, c: c.update(num_layers="two"), "cannot be built"),
    "other method": (lambda t, m, c: c["quantization_config"].update(quant_method="gguf"), "not that of a packed"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_with_fitting_checksums_is_refused_with_its_reason(tmp_path, name):
    change, reason = FORGERIES[name]
    save(pack(tiny_dit(), k=12), tmp_path / "packed")
    forge(tmp_path / "packed", change)
    with pytest.raises(CheckpointError, match=reason):
        load_transformer(tmp_path / "packed")


def test_config_and_weights_of_two_checkpoints_do_not_mix(tmp_path):
    save(pack(tiny_dit()), tmp_path / "a", {"bits": 2})
    save(pack(tiny_dit()), tmp_path / "b", {"bits": 3})
    (tmp_path / "a" / CONFIG).write_bytes((tmp_path / "b" / CONFIG).read_bytes())
    with pytest.raises(CheckpointError, match="is not the config that was saved with these weights"):
        load_transformer(tmp_path / "a")
    with pytest.raises(CheckpointError, match="config.json"):
        type(tiny_dit()).from_pretrained(tmp_path / "a")


def test_what_is_no_checkpoint_at_all_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: cannot be read"):
        load_transformer(tmp_path / "nowhere")
    tiny_dit().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not that of a packed checkpoint"):
        load_transformer(tmp_path / "plain")


@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are POSIX")
def test_a_kill_while_saving_leaves_the_old_or_the_new_model(tmp_path):
    assert len(kill_while_saving(rounds=6, seed=3, folder=tmp_path)) == 6


def test_without_a_folder_swap_an_interrupted_replacement_is_recovered(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "swap_folders", lambda a, b: False)
    model, other = pack(tiny_dit(1), seed=1), pack(tiny_dit(2), seed=2)
    save(model, tmp_path / "packed")
    save(other, tmp_path / "packed")
    assert same(load_transformer(tmp_path / "packed"), other)
    (tmp_path / "packed").rename(tmp_path / ".packed.previous")  # killed between the two renames
    assert same(load_transformer(tmp_path / "packed"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_another_process_loads_bit_equal(tmp_path):
    model = pack(tiny_dit())
    save(model, tmp_path / "packed")
    code = (
        "import sys, vqlib, torch; from tests.fuzz_checkpoint import forward\n"
        "torch.save(forward(vqlib.load_transformer(sys.argv[1])), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "packed", tmp_path / "out.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), forward(model))


def test_a_file_from_before_its_class_had_a_setting_loads(tmp_path):
    model = pack(tiny_dit())
    save(model, tmp_path / "packed")
    forge(tmp_path / "packed", lambda t, m, c: c.pop("norm_eps"))
    assert same(load_transformer(tmp_path / "packed"), model)
    forge(tmp_path / "packed", lambda t, m, c: None)
    with pytest.raises(CheckpointError, match="config.json is not the one that was saved"):
        type(tiny_dit()).from_pretrained(tmp_path / "packed", norm_elementwise_affine=True)
