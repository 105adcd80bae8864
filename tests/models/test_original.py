import argparse

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import vqlib
from vqlib.models import class_conditional, original
from vqlib.models.flow import FlowMatching
from vqlib.studies.sources import Source


def transformer(blocks=2):
    torch.manual_seed(0)
    settings = {"num_attention_heads": 1, "attention_head_dim": 64, "out_channels": 8, "num_layers": blocks}
    model = DiTTransformer2DModel(**settings, sample_size=8, num_embeds_ada_norm=10).eval()
    copies = [block.norm1.emb for block in model.transformer_blocks]
    for emb in copies[1:]:
        emb.load_state_dict(copies[0].state_dict())
    return model


def state_dict(model):
    """What the original code would have saved of the same weights."""
    new = model.state_dict()
    weights = {"pos_embed": model.pos_embed.pos_embed.clone()}
    for key, names in original.key_map(model.config.num_layers).items():
        weights[key] = torch.cat([new[name] for name in names]) if ".qkv." in key else new[names[0]]
    return weights


@pytest.fixture
def file(tmp_path):
    """Function that writes one state dict as a `.pt` file."""

    def write(content):
        torch.save(content, tmp_path / "DiT.pt")
        return tmp_path / "DiT.pt"

    return write


@pytest.fixture
def pipeline_folder(tmp_path):
    folder = tmp_path / "pipeline"
    DiTPipeline(transformer(), tiny.vae(), DDIMScheduler(beta_start=1e-4, beta_end=0.02)).save_pretrained(folder)
    return folder


def test_both_formats_of_one_model_give_the_same_outputs(file, pipeline_folder):
    folder, single = vqlib.load(pipeline_folder), vqlib.load(file(state_dict(transformer())), vae=pipeline_folder)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    outputs = [class_conditional.forward(pipe.transformer, x, t, y) for pipe in (folder, single)]
    assert torch.equal(*outputs)
    assert single.latent_shape == folder.latent_shape and single.null_class == folder.null_class == 10
    assert torch.equal(single.schedule.betas, folder.schedule.betas)
    assert torch.equal(single.decode(x), folder.decode(x))
    images = [vqlib.sample(pipe, [1, 2], [0, 1], steps=2) for pipe in (folder, single)]
    assert torch.equal(*images)


def test_the_same_file_is_a_sit_where_that_is_said(file, pipeline_folder):
    """Its output is the data's direction at the time 1 − σ; of the channels of a learned σ nothing is used."""
    weights = file(state_dict(transformer()))
    pipe = vqlib.load(weights, vae=pipeline_folder, family="sit")
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([250.0, 500.0, 1000.0]), torch.tensor([0, 9, 10])
    expected = -class_conditional.forward(pipe.transformer, x, torch.tensor([0.75, 0.5, 0.0]), y)[:, :4]
    torch.testing.assert_close(pipe.output(x, t, y, 1.0), expected)
    assert isinstance(pipe.schedule, FlowMatching) and pipe.schedule.shift == 1.0
    again = Source.of(pipe).load("cpu")  # as a worker has it
    assert again.denoiser.original and again.identity() == pipe.identity() and again.loaded_with == pipe.loaded_with
    with pytest.raises(ValueError, match="family 'uvit' is not one of dit, sit"):
        vqlib.load(weights, vae=pipeline_folder, family="uvit")


def test_every_block_gets_its_own_copy_of_the_embedders_and_the_model_can_be_saved(file, tmp_path):
    model = original.read_transformer(file(state_dict(transformer(blocks=3))))
    tables = [block.norm1.emb.class_embedder.embedding_table.weight for block in model.transformer_blocks]
    assert torch.equal(tables[0], tables[2]) and len({table.data_ptr() for table in tables}) == 3
    model.save_pretrained(tmp_path / "saved")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_training_checkpoint_gives_its_moving_average(file):
    weights = state_dict(transformer())
    other = {key: value + 1 for key, value in weights.items()}
    content = {"model": other, "ema": weights, "opt": {"state": {}}, "args": argparse.Namespace(epochs=3)}
    model = original.read_transformer(file(content))
    assert torch.equal(model.proj_out_2.bias, weights["final_layer.linear.bias"])


def test_half_precision_is_widened(file):
    model = original.read_transformer(file({key: value.half() for key, value in state_dict(transformer()).items()}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("blocks.1.attn.qkv.weight", None, r"blocks.1.attn.qkv.weight \[192, 64\] is missing"),
        ("blocks.0.mlp.fc1.weight", (128, 64), r"blocks.0.mlp.fc1.weight is \[128, 64\], expected \[256, 64\]"),
        ("t_embedder.mlp.0.weight", (64, 128), r"t_embedder.mlp.0.weight is \[64, 128\], expected \[64, 256\]"),
        ("x_embedder.proj.weight", None, "x_embedder.proj.weight is missing"),
        ("pos_embed", (1, 17, 64), r"pos_embed is \[1, 17, 64\], expected \[1, 16, 64\]"),
        ("pos_embed", (1, 16, 64), "pos_embed is not DiT's table"),
        ("blocks.0.norm.weight", (64,), r"blocks.0.norm.weight \[64\] belongs to no DiT"),
    ],
)
def test_the_first_wrong_key_is_named_with_both_shapes(file, key, change, message):
    weights = state_dict(transformer())
    weights.pop(key, None)
    if change:
        weights[key] = torch.zeros(change)
    with pytest.raises(ValueError, match=message):
        original.read_transformer(file(weights))


def test_a_published_model_must_have_all_its_blocks(file):
    zeros = {"x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,), "pos_embed": (1, 256, 1152)}
    zeros |= {"final_layer.linear.weight": (32, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}
    with pytest.raises(ValueError, match=r"final_layer.adaLN_modulation.1.weight \[2304, 1152\] is missing"):
        original.read_transformer(file({key: torch.zeros(shape) for key, shape in zeros.items()}))
    names = original.key_map(original.PUBLISHED[1152][1])
    assert "blocks.27.mlp.fc2.bias" in names and len(names["y_embedder.embedding_table.weight"]) == 28


def test_files_that_are_no_weights_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        original.read_transformer(file([1, 2]))
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match="text.pt cannot be read as weights"):
        original.read_transformer(tmp_path / "text.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        original.read_transformer(file({"run": Unsafe()}))
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.pt"):
        vqlib.load(tmp_path / "absent.pt")


class Unsafe:
    """Stands for an object whose loading would run code."""


def test_a_vae_that_cannot_be_fetched_is_named_with_the_way_out(file):
    with pytest.raises(FileNotFoundError, match=r"VAE 'stabilityai/sd-vae-ft-ema' .* give vae="):
        vqlib.load(file(state_dict(transformer())))


def test_the_vae_may_be_a_folder_of_its_own(file, pipeline_folder):
    pipe = vqlib.load(file(state_dict(transformer())), vae=pipeline_folder / "vae")
    assert pipe.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda w: {f"module.{key}": value for key, value in w.items()},
        lambda w: {f"_orig_mod.module.{key}": value for key, value in w.items()},
        lambda w: {"state_dict": w},
        lambda w: {"state_dict": {f"model.{key}": value for key, value in w.items()}, "epoch": 3},
        lambda w: {"model": {key: value * 2 for key, value in w.items()}, "ema": w, "opt": {}},
        lambda w: {"checkpoint": {"net": {f"module._orig_mod.{key}": value for key, value in w.items()}}},
        lambda w: {"delta": w, "epoch": 3},
        lambda w: {key: value * 2 for key, value in w.items()} | {f"ema.{key}": value for key, value in w.items()},
        lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()} | {"vae.conv_in.weight": torch.zeros(1)}},
        lambda w: {"model_ema": {"module": w}, "model": {"module": {key: value * 2 for key, value in w.items()}}},
    ],
)
def test_the_usual_prefixes_and_nests_are_taken_off(file, wrapped):
    plain = original.read_transformer(file(state_dict(transformer()))).state_dict()
    found = original.read_transformer(file(wrapped(state_dict(transformer())))).state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_several_models_without_a_moving_average_are_refused_by_their_names(file):
    weights = state_dict(transformer())
    with pytest.raises(ValueError, match=r"holds several models \(model\., best\.\)"):
        original.read_transformer(file({"model": weights, "best": weights}))


def test_what_is_no_tensor_of_floats_is_named(file):
    weights = state_dict(transformer())
    with pytest.raises(ValueError, match="final_layer.linear.weight is torch.int8"):
        original.read_transformer(file(weights | {"final_layer.linear.weight": torch.ones(32, 64).to(torch.int8)}))


def test_a_file_without_learned_variance_is_refused(file, pipeline_folder):
    weights = state_dict(transformer())
    half = {key: weights[key][:16] for key in ("final_layer.linear.weight", "final_layer.linear.bias")}
    with pytest.raises(ValueError, match="out_channels 4 for in_channels 4; a learned variance needs 8"):
        vqlib.load(file(weights | half), vae=pipeline_folder)


def test_both_paths_may_start_at_home(file, pipeline_folder, monkeypatch):
    path = file(state_dict(transformer()))
    monkeypatch.setenv("HOME", str(path.parent))
    assert vqlib.load("~/DiT.pt", vae="~/pipeline").latent_shape == (4, 8, 8)
