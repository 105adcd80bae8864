import json
import shutil

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline

import vqlib
from vqlib.models import dit, pipeline


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
    expected = dit.forward(tiny.transformer(), x, t, y)
    torch.testing.assert_close(dit.forward(pipe.transformer, x, t, y), expected, rtol=1e-5, atol=1e-6)
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
    assert dit.block_list(transformer) == list(transformer.transformer_blocks)
    names = list(dit.quantizable(transformer))
    assert len(names) == 21
    assert names[0] == "transformer_blocks.0.norm1.linear" and names[-1] == "transformer_blocks.2.ff.net.2"


def test_swap_replaces_one_layer_and_refuses_a_name_that_is_not_there():
    transformer = tiny.transformer()
    new = torch.nn.Identity()
    dit.swap(transformer, "transformer_blocks.1.attn1.to_q", new)
    assert transformer.transformer_blocks[1].attn1.to_q is new
    with pytest.raises(AttributeError):
        dit.swap(transformer, "transformer_blocks.1.attn1.to_x", new)


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


@pytest.mark.parametrize(
    "part, setting, message",
    [
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "v_prediction"},
            "prediction_type 'v_prediction' is not",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear' is not"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding True is not"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler FlowMatchEulerDiscreteScheduler has no betas",
        ),
        ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "the transformer is a PixArt"),
        (
            "transformer/config.json",
            {"out_channels": 4},
            "out_channels 4 for in_channels 4; a learned variance needs 8",
        ),
        ("model_index.json", {"id2label": {"10": "one too many"}}, "id2label names class '10', .* classes 0 … 9"),
    ],
)
def test_what_a_folder_says_of_its_model_is_heeded_or_refused_by_name(folder, tmp_path, part, setting, message):
    with pytest.raises(ValueError, match=message):
        vqlib.load(changed(folder, tmp_path / "copy", part, **setting))


def test_a_class_table_without_a_row_for_no_class_is_refused(folder, tmp_path):
    copy, file = shutil.copytree(folder, tmp_path / "copy"), "transformer/diffusion_pytorch_model.safetensors"
    pipe = vqlib.load(copy)
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table = torch.nn.Embedding(10, 32)
    with pytest.raises(ValueError, match="10 rows for 10 classes: the one for no class is missing"):
        pipeline._require_classes(str(copy / file), pipe.transformer)


def test_a_folder_of_fp16_variants_alone_is_widened(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in copy.rglob("diffusion_pytorch_model.safetensors"):
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found, plain = vqlib.load(copy).transformer, vqlib.load(folder).transformer
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))
    assert next(found.parameters()).dtype == torch.float32


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


def test_a_wrapped_model_has_the_blocks_and_linears_of_the_one_inside():
    transformer = tiny.transformer()
    for wrapped in (torch.compile(transformer), torch.nn.DataParallel(transformer)):
        assert dit.block_list(wrapped) == dit.block_list(transformer)
        assert dit.quantizable(wrapped) == dit.quantizable(transformer)
