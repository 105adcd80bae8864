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
