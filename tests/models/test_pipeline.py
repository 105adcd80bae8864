import json
import shutil
from dataclasses import replace

import families
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline

import vqlib
from vqlib.models import class_conditional, pipeline, structure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline as diffusers writes it."""
    target = tmp_path_factory.mktemp("models") / "pipeline"
    pipe = DiTPipeline(tiny.transformer(), tiny.vae(), DDIMScheduler(beta_start=1e-4, beta_end=0.02))
    pipe.save_pretrained(target)
    index = json.loads((target / "model_index.json").read_text())
    index["id2label"] = {str(i): f"class {i}" for i in range(10)}  # as in facebook/DiT-XL-2-256
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def test_a_diffusers_folder_loads_with_schedule_and_classes(folder):
    pipe = vqlib.load(folder)
    assert pipe.latent_shape == (4, 8, 8) and pipe.null_class == 10 and pipe.class_names[3] == "class 3"
    assert len(pipe.schedule) == 1000 and pipe.schedule.betas[-1].item() == pytest.approx(0.02)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 10])
    expected = class_conditional.forward(tiny.transformer(), x, t, y)
    torch.testing.assert_close(class_conditional.forward(pipe.transformer, x, t, y), expected, rtol=1e-5, atol=1e-6)
    assert pipe.decode(torch.zeros(2, 4, 8, 8)).shape == (2, 1, 32, 32)


def test_an_incomplete_folder_names_the_missing_part(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="vae/config.json is missing"):
        vqlib.load(copy)


def test_an_unknown_name_is_refused_without_asking_the_network():
    with pytest.raises(FileNotFoundError, match="'dit-mini-fashon' is neither a bundled model"):
        vqlib.load("dit-mini-fashon")


def test_blocks_and_their_linears_are_listed_in_forward_order():
    transformer = tiny.transformer(blocks=3)
    assert structure.block_list(transformer) == list(transformer.transformer_blocks)
    names = list(structure.quantizable(transformer))
    assert len(names) == 21
    assert names[0] == "transformer_blocks.0.norm1.linear" and names[-1] == "transformer_blocks.2.ff.net.2"


def test_swap_replaces_one_layer_and_refuses_a_name_that_is_not_there():
    transformer = tiny.transformer()
    new = torch.nn.Identity()
    structure.swap(transformer, "transformer_blocks.1.attn1.to_q", new)
    assert transformer.transformer_blocks[1].attn1.to_q is new
    with pytest.raises(AttributeError):
        structure.swap(transformer, "transformer_blocks.1.attn1.to_x", new)


def test_the_bundled_model_is_what_its_card_says():
    pipe = vqlib.load()
    assert pipe.latent_shape == (4, 8, 8) and len(pipe.class_names) == 10
    assert pipe.transformer.config.out_channels == 8, "learned variance"
    size = sum(path.stat().st_size for path in (pipeline.DATA / pipeline.BUNDLED).rglob("*") if path.is_file())
    assert size < 24 * 2**20


def changed(folder, target, part, **settings):
    """A copy of a folder with other values in one of its JSON files."""
    copy = shutil.copytree(folder, target)
    config = json.loads((copy / part).read_text()) | settings
    (copy / part).write_text(json.dumps(config))
    return copy


SCHEDULER, TRANSFORMER, VAE = ("scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json")


@pytest.mark.parametrize(
    "part, setting, message",
    [
        (SCHEDULER, {"prediction_type": "v_prediction"}, "prediction_type 'v_prediction' is not supported"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not"),
        (SCHEDULER, {"thresholding": True}, "thresholding True is not"),
        (SCHEDULER, {"variance_type": "learned"}, "variance_type 'learned' is not"),
        (SCHEDULER, {"variance_type": "fixed_large"}, "variance_type 'fixed_large' is not"),
        (SCHEDULER, {"timestep_spacing": "trailing"}, "timestep_spacing 'trailing' is not"),
        (SCHEDULER, {"_class_name": "LCMScheduler"}, "scheduler LCMScheduler has no betas of a DDPM"),
        (SCHEDULER, {"beta_start": -1}, "copy: 1000 betas from -1 to 0.02: need"),
        (SCHEDULER, {"beta_end": "0.02"}, "1000 betas from 0.0001 to '0.02': need"),
        (SCHEDULER, {"num_train_timesteps": 10.5}, "num_train_timesteps=10.5 is not an integer"),
        (TRANSFORMER, {"_class_name": "SanaTransformer2DModel"}, "no adapter knows a SanaTransformer2DModel, only DiT"),
        (
            TRANSFORMER,
            {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"},
            "norm_type 'layer_norm' is not",
        ),
        (TRANSFORMER, {"out_channels": 4}, "copy/transformer: the weights cannot be read"),
        (TRANSFORMER, {"num_layers": 1}, r"transformer: transformer_blocks.1.* belongs to no model .* \(19 unexpected"),
        (TRANSFORMER, {"num_layers": 3}, r"transformer: transformer_blocks.2.* is missing in the weights \(19 missing"),
        (TRANSFORMER, {"num_embeds_ada_norm": 20}, "copy/transformer: the weights cannot be read"),
        (VAE, {"_class_name": "AutoencoderTiny"}, "the VAE is a AutoencoderTiny"),
        (VAE, {"latents_mean": [0, 0, 0, 1]}, r"latents_mean \[0, 0, 0, 1\] is not"),
        ("model_index.json", {"id2label": {"10": "one too many"}}, "id2label names class '10', .* classes 0 … 9"),
        ("model_index.json", {"id2label": ["a"]}, "id2label is a list"),
    ],
)
def test_what_a_folder_says_of_its_model_is_heeded_or_refused_by_name(folder, tmp_path, part, setting, message):
    with pytest.raises(ValueError, match=message):
        vqlib.load(changed(folder, tmp_path / "copy", part, **setting))


def test_a_dit_that_leaves_its_outputs_channels_unsaid_has_as_many_as_it_takes():
    plain = families.plain_dit()
    unsaid = type(plain.transformer)(**dict(plain.transformer.config) | {"out_channels": None}).eval()
    pipe = replace(plain, transformer=unsaid)
    assert pipe.output(torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 1]), 1.0).shape == (2, 4, 8, 8)


def test_the_hubs_older_class_name_of_a_dit_is_loaded(folder, tmp_path):
    copy = changed(folder, tmp_path / "copy", TRANSFORMER, _class_name="Transformer2DModel", num_vector_embeds=None)
    assert torch.equal(
        vqlib.sample(vqlib.load(copy), [3], [0], steps=2), vqlib.sample(vqlib.load(folder), [3], [0], steps=2)
    )


def test_a_shift_of_the_vaes_latents_is_heeded(folder, tmp_path):
    plain, pipe = vqlib.load(folder), vqlib.load(changed(folder, tmp_path / "copy", VAE, shift_factor=0.5))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(pipe.decode(x), plain.vae.decode(x / plain.vae.config.scaling_factor + 0.5).sample)


def test_parts_that_do_not_fit_each_other_are_refused_however_they_come(folder):
    pipe, other = vqlib.load(folder), tiny.transformer()
    for block in other.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table = torch.nn.Embedding(10, 32)
    with pytest.raises(ValueError, match="10 rows for 10 classes: the one for no class is missing"):
        pipe.with_transformer(other)
    with pytest.raises(ValueError, match="3 class names for a transformer of 10 classes"):
        replace(pipe, class_names=tuple("abc"))
    for change, message in (
        ({"in_channels": 8}, "out_channels 8 for in_channels 8"),
        ({"in_channels": 2, "out_channels": 4}, "the VAE has 4"),
    ):
        wrong = tiny.transformer()
        wrong.register_to_config(**change)
        with pytest.raises(ValueError, match=message):
            pipe.with_transformer(wrong)
    with pytest.raises(ValueError, match="a Linear has no config"):
        pipe.with_transformer(torch.nn.Linear(2, 2))
    assert pipe.with_transformer(torch.nn.DataParallel(tiny.transformer())).latent_shape == (4, 8, 8)


def test_another_transformer_goes_where_the_pipeline_is(folder):
    elsewhere = vqlib.load(folder).to("meta")
    model = tiny.transformer().train()
    pipe = elsewhere.with_transformer(model)
    assert pipe.device.type == "meta" and pipe.transformer is model and not model.training
    assert replace(elsewhere, vae=None).to("meta").vae is None


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
@pytest.mark.parametrize("shards", ["", "-00001-of-00001"])
def test_a_folder_of_one_variant_alone_is_widened(folder, tmp_path, variant, shards):
    copy, plain = shutil.copytree(folder, tmp_path / "copy"), vqlib.load(folder)
    for part, model in (("transformer", plain.transformer), ("vae", plain.vae)):
        (copy / part / "diffusion_pytorch_model.safetensors").unlink()
        model.save_pretrained(copy / part, variant=variant, max_shard_size="40KB" if shards else "1GB")
    found = vqlib.load(copy).transformer
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.transformer.parameters(), strict=True))
    assert next(found.parameters()).dtype == torch.float32


def test_weights_that_are_absent_ambiguous_or_damaged_are_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="copy/transformer: the weights cannot be read"):
        vqlib.load(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="copy/transformer holds no weights"):
        vqlib.load(copy)
    for variant in ("ema", "fp16"):
        file.with_name(f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="several variants and none plain: ema, fp16"):
        vqlib.load(copy)


@pytest.mark.parametrize(
    "content, message", [("{", "cannot be read as JSON"), ("[]", "holds a list, expected an object")]
)
def test_a_damaged_config_is_named(folder, tmp_path, content, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / SCHEDULER).write_text(content)
    with pytest.raises(ValueError, match=f"scheduler_config.json {message}"):
        vqlib.load(copy)


def test_the_home_folder_may_be_written_as_a_tilde(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert vqlib.load("~/pipeline").latent_shape == (4, 8, 8)


def test_device_and_dtype_are_chosen_by_name(folder):
    pipe = vqlib.load(folder, device="auto", dtype=torch.bfloat16)
    assert pipe.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert next(pipe.transformer.parameters()).dtype == torch.bfloat16
    assert vqlib.sample(pipe, [0], [0], steps=2).dtype == torch.uint8
    with pytest.raises(ValueError, match="device 'gpu' is no device"):
        vqlib.load(folder, device="gpu")
    with pytest.raises(ValueError, match="device 'cuda:99' is not here"):
        vqlib.load(folder, device="cuda:99")
    for device in ("meta", "mps", None):
        with pytest.raises(ValueError, match=f"device {device!r} is no device"):
            vqlib.load(folder, device=device)
    for dtype in ("float16", torch.int8):
        with pytest.raises(ValueError, match=f"dtype {dtype!r} is none of torch's floating types"):
            vqlib.load(folder, dtype=dtype)


def test_a_wrapped_model_has_the_blocks_and_linears_of_the_one_inside():
    transformer = tiny.transformer()
    for wrapped in (torch.compile(transformer), torch.nn.DataParallel(transformer)):
        assert structure.block_list(wrapped) == structure.block_list(transformer)
        assert structure.quantizable(wrapped) == structure.quantizable(transformer)


def test_a_model_without_blocks_is_refused_by_its_class():
    with pytest.raises(ValueError, match="AutoencoderKL has no linear layer in a list of blocks"):
        structure.quantizable(tiny.vae())
