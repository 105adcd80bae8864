"""Modes hold what they promise within their budget and change no output; the adaLN cache changes none either."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from tests.fuzz_checkpoint import pack, tiny_dit
from vqlib import load_transformer, sample, save
from vqlib.config import SamplingConfig
from vqlib.models.modulation import cached_modulation
from vqlib.packed.checkpoint import attach
from vqlib.packed.diffusers_backend import packed_layers
from vqlib.packed.modes import set_mode


def model(seed=0, **changes):
    return pack(tiny_dit(seed, **changes)).requires_grad_(False)


def batch(count=8, timestep=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(count, 4, 8, 8, generator=generator), torch.arange(count) % 11
    return {"hidden_states": x, "timestep": torch.full((count,), timestep), "class_labels": labels}


def output(transformer, inputs):
    with torch.inference_mode():
        return transformer(**inputs).sample


def test_every_mode_gives_the_same_output_and_holds_what_it_says():
    packed, inputs = model(), batch()
    layers = list(packed_layers(packed).values())
    expected, sizes = output(packed, inputs), [4 * layer.in_features * layer.out_features for layer in layers]
    for mode, budget, kept, extra in [
        ("speed", None, 14, sum(sizes)),
        ("memory", None, 0, max(sizes)),
        ("auto", sum(sizes), 14, sum(sizes)),
        ("auto", sum(sizes) - 1, 13, sum(sizes)),
        ("auto", 0, 0, max(sizes)),
        ("auto", None, 14, sum(sizes)),
    ]:
        choice = set_mode(packed, mode, budget)
        held = [layer.dense.numel() * 4 for layer in layers if layer.dense is not None]
        if mode == "auto" and budget == sum(sizes) - 1:
            assert choice.extra_bytes <= budget and 0 < choice.dense_layers < 14
        else:
            assert (choice.dense_layers, choice.extra_bytes) == (kept, extra)
        assert choice.layers == 14 and len(held) == choice.dense_layers and sum(held) <= choice.extra_bytes
        assert torch.equal(output(packed, inputs), expected), mode


def test_a_budget_is_never_exceeded_and_more_of_it_keeps_no_less():
    packed = model()
    total, kept = set_mode(packed, "speed").extra_bytes, -1
    least = set_mode(packed, "memory").extra_bytes
    for budget in range(least, total + 1, (total - least) // 9):
        choice = set_mode(packed, "auto", budget)
        held = sum(4 * m.dense.numel() for m in packed_layers(packed).values() if m.dense is not None)
        assert kept <= held <= choice.extra_bytes <= budget == choice.budget_bytes
        kept = held


def test_codebooks_in_bfloat16_give_the_same_in_both_modes():
    packed = pack(tiny_dit(), shared=True, dtype=torch.bfloat16)
    set_mode(packed, "memory")
    expected = output(packed, batch())
    set_mode(packed, "speed")
    assert torch.equal(output(packed, batch()), expected)


def test_what_cannot_be_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="DiTTransformer2DModel has 0 packed layers"):
        set_mode(tiny_dit())
    with pytest.raises(ValueError, match="mode='fast' is not one of memory, speed, auto"):
        set_mode(model(), "fast")
    with pytest.raises(ValueError, match="budget_bytes=5 with mode='speed'"):
        set_mode(model(), "speed", 5)
    with pytest.raises(ValueError, match="training mode"), cached_modulation(tiny_dit().train()):
        pass
    with pytest.raises(ValueError, match="Linear has no adaLN"), cached_modulation(torch.nn.Linear(2, 2).eval()):
        pass


@pytest.mark.parametrize("packed", [True, False])
def test_sampling_with_the_cache_gives_bit_equal_images(packed):
    pipe = tiny.pipeline()
    pipe = pipe.with_transformer(pack(pipe.transformer)) if packed else pipe
    labels, seeds = [i % 10 for i in range(12)], range(12)
    config = {"steps": 3, "guidance_scale": 1.5}
    expected = sample(pipe, labels, seeds, **config)
    with cached_modulation(pipe.transformer) as cache:
        assert torch.equal(sample(pipe, labels, seeds, **config), expected)
        assert cache.rows == 3 * 11 and cache.nbytes == 3 * 11 * 2 * 7 * 32 * 4
        misses = cache.misses
        assert torch.equal(sample(pipe, labels, seeds, **config), expected)
        assert cache.misses == misses and cache.hits >= 3


def test_every_output_is_the_same_to_rounding_whatever_comes_together():
    packed = model(num_attention_heads=3, attention_head_dim=16)
    forwards = [batch(count, timestep, seed) for count in (4, 8, 11, 16) for timestep in (0, 999) for seed in (1, 2)]
    expected = [output(packed, inputs) for inputs in forwards]
    with cached_modulation(packed) as cache:
        assert all(torch.allclose(output(packed, i), e, atol=1e-5) for i, e in zip(forwards, expected, strict=True))
        assert cache.hits == 10 and cache.misses == 6  # pairs come as the batches grow: 4, 8 and 11 classes
        with torch.no_grad():  # tables made in inference mode serve outside of it
            assert torch.allclose(packed(**forwards[0]).sample, expected[0], atol=1e-5)


def test_the_cache_leaves_no_trace():
    packed, inputs = model(), batch()
    names, expected = list(packed.state_dict()), output(packed, inputs)
    with pytest.raises(RuntimeError), cached_modulation(packed) as cache:
        output(packed, inputs)
        raise RuntimeError
    assert list(packed.state_dict()) == names and cache.hits + cache.misses == 1
    assert torch.equal(output(packed, inputs), expected) and cache.hits + cache.misses == 1


def test_beyond_its_budget_the_cache_computes_as_usual():
    packed, inputs = model(), batch()
    expected = output(packed, inputs)
    row = 2 * 7 * 16 * 4
    with cached_modulation(packed, budget_bytes=9 * row) as cache:
        for timestep in (500, 400, 500):
            found = output(packed, inputs | {"timestep": torch.full((8,), timestep)})
        assert torch.equal(found, expected)
        assert (cache.rows, cache.nbytes, cache.hits, cache.misses) == (8, 8 * row, 1, 2)


def test_a_forward_cut_off_in_the_middle_does_not_leave_half_a_table():
    packed, inputs = model(), batch()
    expected = output(packed, inputs)

    def fail(*_):
        raise KeyboardInterrupt

    with cached_modulation(packed) as cache:
        handle = packed.transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            output(packed, inputs)
        handle.remove()
        assert torch.equal(output(packed, inputs), expected) and cache.rows == 8


def test_no_graph_is_kept_of_a_model_that_could_be_trained():
    dense = tiny_dit()
    with cached_modulation(dense) as cache:
        dense(**batch())
        assert len(cache.own.held) == 4 and not any(held.requires_grad for held in cache.own.held.values())


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_the_packed_model_compiles_to_one_graph(mode):
    packed, inputs = model(num_layers=1), batch()
    set_mode(packed, mode)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    # A compiler brings its own matrix products, so the outputs may differ by rounding.
    torch.testing.assert_close(output(compiled, inputs), output(packed, inputs), rtol=1e-5, atol=1e-5)


def test_threads_that_sample_side_by_side_in_one_cache_get_the_images_they_get_alone():
    pipe = tiny.pipeline()
    jobs = [(label, seed) for label in (1, 8) for seed in range(4)] * 2

    def images(job):
        return sample(pipe, [job[0]] * 4, range(job[1], job[1] + 4), steps=3)

    alone = [images(job) for job in jobs]
    with cached_modulation(pipe.transformer), ThreadPoolExecutor(4) as pool:
        together = list(pool.map(images, jobs))
    worst = max((a.float() - b.float()).abs().max() for a, b in zip(alone, together, strict=True))
    assert worst <= 1  # products of other numbers of rows may round differently


def test_a_model_saved_inside_the_cache_is_the_model_itself(tmp_path):
    packed, inputs = attach(model()), batch()  # as rounded as its file
    expected, names = output(packed, inputs), list(packed.state_dict())
    with cached_modulation(packed):
        output(packed, inputs)
        assert list(packed.state_dict()) == names and len(packed_layers(packed)) == 14
        save(packed, tmp_path / "packed")
    assert torch.equal(output(load_transformer(tmp_path / "packed"), inputs), expected)


def test_one_cache_at_a_time():
    packed = model()
    with cached_modulation(packed), pytest.raises(ValueError, match="cached, or patched"), cached_modulation(packed):
        pass
    with cached_modulation(packed):
        pass


def test_dense_weights_kept_for_speed_follow_what_is_loaded_into_the_model():
    first, second, inputs = model(0), model(1), batch()
    set_mode(first, "speed")
    output(first, inputs)
    first.load_state_dict(second.state_dict())
    assert torch.equal(output(first, inputs), output(second, inputs))


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_a_packed_model_survives_torch_save_and_a_deep_copy(tmp_path, mode):
    packed, inputs = attach(model()), batch()
    set_mode(packed, mode)
    expected = output(packed, inputs)
    torch.save(packed, tmp_path / "model.pt")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(packed)):
        assert torch.equal(output(other, inputs), expected)
        save(other, tmp_path / "again")
        assert torch.equal(output(load_transformer(tmp_path / "again"), inputs), expected)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = save(model(), "~/packed")
    assert folder == tmp_path / "home" / "packed" and not (tmp_path / "~").exists()
    assert len(packed_layers(load_transformer("~/packed"))) == 14


def test_rows_of_one_precision_do_not_answer_for_another():
    pipe = tiny.pipeline()
    config = SamplingConfig(steps=3, guidance_scale=1.5)
    images = {name: sample(pipe, range(4), range(4), config.replace(products=name)) for name in ("bfloat16", "float32")}
    with cached_modulation(pipe.transformer):
        for name in (*images, *images):
            assert torch.equal(sample(pipe, range(4), range(4), config.replace(products=name)), images[name])
