"""The sampler against a slow transcription of the published equations; seeds, batches, streaming, errors."""

import ctypes
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import vqlib  # noqa: F401, first: diffusers beside a CPU build of torch

# isort: split
from diffusers import AutoencoderKL, DiTTransformer2DModel

from vqlib.config import SamplingConfig
from vqlib.models import sampling
from vqlib.models.ddpm import NoiseSchedule, guide
from vqlib.models.pipeline import Pipeline
from vqlib.models.sampling import SamplingCancelled, sample, sample_batches, to_uint8
from vqlib.system.memory import keep_freed_memory, peak_memory

LABELS, SEEDS = [3, 1, 4, 1, 5, 9, 2], [10, 11, 12, 13, 14, 15, 16]


def transformer():
    """A random twin of the bundled transformer, with the published 8 output channels and 10 + 1 classes."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


@pytest.fixture(scope="module")
def pipe():
    model = transformer()
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=1.0,
    ).eval()
    return Pipeline("twin", model, vae, NoiseSchedule.linear(), tuple("abcdefghij"))


def watched(pipe, calls):
    """The pipeline with a transformer that notes the rows, labels and timestep of each forward."""

    class Watch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = pipe.transformer, pipe.transformer.config

        def forward(self, x, timestep, class_labels):
            calls.append(SimpleNamespace(rows=len(x), labels=class_labels.tolist(), timestep=timestep.tolist()))
            return self.inner(x, timestep=timestep, class_labels=class_labels)

    return pipe.with_transformer(Watch())


def final_latents(pipe, labels, seeds, **settings):
    kept = {}
    sample(pipe, labels, seeds, preview=lambda done, x: kept.update(x=x.clone()), **settings)
    return kept["x"]


# --- the published sampler, slowly -----------------------------------------------------------------------------------


def published_schedule(steps):
    """Linear betas (Ho et al. 2020), strided to `steps` (Nichol & Dhariwal 2021, section 4), as Python floats."""
    abar, product = [], 1.0
    for i in range(1000):
        product *= 1.0 - (1e-4 + (2e-2 - 1e-4) * i / 999)
        abar.append(product)
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += 999 / (steps - 1)
    return kept, [abar[t] for t in kept]


def published_step(x, output_class, output_null, noise, i, abar, scale, guided_channels):
    """x_{t−1} of one image from x_t and two outputs, element by element in float64.

    μ = (x_t − β ε / √(1 − ᾱ)) / √α (Ho et al., eq. 11); Σ = exp(v log β + (1 − v) log β̃) (Nichol & Dhariwal, eq. 15),
    v scaled from −1 … 1 to 0 … 1, β̃ = β (1 − ᾱ_{t−1}) / (1 − ᾱ_t); no noise at the last step; x_0 is not clipped.
    """
    before = abar[i - 1] if i > 0 else 1.0
    beta = 1.0 - abar[i] / before
    result = torch.empty_like(x)
    for c in range(x.shape[0]):
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                at = (c, row, column)
                epsilon = output_class[at].item()
                if c < guided_channels:
                    epsilon = output_null[at].item() + scale * (epsilon - output_null[at].item())
                value = (x[at].item() - beta / math.sqrt(1.0 - abar[i]) * epsilon) / math.sqrt(1.0 - beta)
                if i > 0:
                    beta_tilde = beta * (1.0 - before) / (1.0 - abar[i])
                    v = (output_class[x.shape[0] + c, row, column].item() + 1.0) / 2.0
                    variance = math.exp(v * math.log(beta) + (1.0 - v) * math.log(beta_tilde))
                    value += math.sqrt(variance) * noise[at].item()
                result[at] = value
    return result


def published_sampler(model, label, seed, steps, scale, guided_channels):
    """x_0 [C, h, w] float64 of one image. The model sees one image at a time, in float64 too."""
    kept, abar = published_schedule(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, 8, generator=generator).double()
    for i in reversed(range(steps)):
        time = torch.tensor([kept[i]])
        outputs = [
            model(x[None], timestep=time, class_labels=torch.tensor([c])).sample[0].double() for c in (label, 10)
        ]
        noise = torch.randn(4, 8, 8, generator=generator).double() if i > 0 else None
        x = published_step(x, *outputs, noise, i, abar, scale, guided_channels)
    return x


@torch.no_grad()
@pytest.mark.parametrize(("steps", "scale", "channels"), [(50, 1.5, 3), (10, 4.0, 4), (10, 1.0, 3)])
def test_parity_with_the_published_equations(pipe, steps, scale, channels):
    config = SamplingConfig(steps=steps, guidance_scale=scale, guidance_channels=channels)
    ours = final_latents(pipe, [3, 7], [42, 5], config=config)
    slow_model = transformer().double()
    for image, label, seed in zip(ours, (3, 7), (42, 5), strict=True):
        theirs = published_sampler(slow_model, label, seed, steps, scale, channels)
        error = (image.double() - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-4


# --- guidance and rounding -------------------------------------------------------------------------------------------


def test_three_channels_are_guided_and_variance_is_the_conditional_halfs():
    conditional, null = torch.full((2, 8, 1, 1), 2.0), torch.full((2, 8, 1, 1), 1.0)
    output = torch.cat([conditional, null])
    assert guide(output, 1.5, 3)[0].flatten().tolist() == [2.5, 2.5, 2.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert guide(output, 1.5, 4)[0].flatten().tolist() == [2.5, 2.5, 2.5, 2.5, 2.0, 2.0, 2.0, 2.0]


def test_uint8_is_truncated_and_clamped():
    images = torch.tensor([-2.0, -1.0, 0.0, 0.5 / 127.5, 0.9 / 127.5, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 128, 128, 128, 255, 255]


def test_both_halves_share_one_forward_and_no_guidance_means_no_second_half(pipe):
    calls = []
    sample(watched(pipe, calls), [3, 1, 4, 1], range(4), steps=3, guidance_scale=1.5)
    assert [call.rows for call in calls] == [8, 8, 8]
    assert calls[0].labels == [3, 1, 4, 1, 10, 10, 10, 10]
    assert [call.timestep[0] for call in calls] == [999, 500, 0]
    calls.clear()
    sample(watched(pipe, calls), [3, 1, 4, 1], range(4), steps=3, guidance_scale=1)
    assert [call.rows for call in calls] == [4, 4, 4]


def test_guidance_and_guided_channels_change_the_image(pipe):
    results = [
        final_latents(pipe, [3], [0], config=SamplingConfig(steps=4, guidance_scale=scale, guidance_channels=channels))
        for scale, channels in ((1.0, 3), (4.0, 3), (4.0, 4))
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


# --- an image is its label and its seed ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_image_does_not_depend_on_the_batch_size(pipe, batch_size):
    """Forwards have 4 rows or more and the VAE always decodes the same count; the rest is rounding, which uint8 hides."""
    whole = sample(pipe, LABELS, SEEDS, SamplingConfig(steps=6))
    assert torch.equal(sample(pipe, LABELS, SEEDS, SamplingConfig(steps=6, batch_size=batch_size)), whole)


def test_image_does_not_depend_on_its_place_or_its_neighbors(pipe):
    whole = sample(pipe, LABELS, SEEDS, steps=6)
    turned = sample(pipe, LABELS[::-1], SEEDS[::-1], steps=6)
    assert torch.equal(turned.flip(0), whole)
    assert torch.equal(sample(pipe, LABELS[2:5], SEEDS[2:5], steps=6), whole[2:5])


def test_latents_agree_to_rounding_across_batch_sizes_without_guidance_too(pipe):
    """With several threads a matrix product may split its rows differently for another batch size, and so round differently."""
    whole = final_latents(pipe, LABELS, SEEDS, steps=6, guidance_scale=1.0)
    for i in (0, 6):
        alone = final_latents(pipe, LABELS[i : i + 1], SEEDS[i : i + 1], steps=6, guidance_scale=1.0)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-5 * whole.abs().max().item())


def test_vae_decodes_the_same_count_for_every_batch_size(pipe):
    """A convolution rounds differently for another batch size, which a truncation to uint8 would show now and then."""
    counts = []

    class Watched(Pipeline):
        def decode(self, latents):
            counts.append(len(latents))
            return super().decode(latents)

    for batch_size in (2, 7, 11):
        images = sample(Watched(**vars(pipe)), [0] * 11, range(11), SamplingConfig(steps=2, batch_size=batch_size))
        assert len(images) == 11
    assert len(set(counts)) == 1


def test_seed_decides_and_global_random_state_is_neither_read_nor_changed(pipe):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = final_latents(pipe, [3, 3], [7, 8], steps=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(final_latents(pipe, [3, 3], [7, 8], steps=4), first)
    assert not torch.equal(first[0], first[1])


# --- streaming, preview, cancel --------------------------------------------------------------------------------------


def test_batches_are_computed_one_at_a_time_and_can_be_resumed(pipe):
    calls, config = [], SamplingConfig(steps=3, batch_size=4)
    stream = sample_batches(watched(pipe, calls), LABELS, SEEDS, config)
    assert calls == []
    first = next(stream)
    assert len(calls) == 3
    stream.close()
    rest = list(sample_batches(pipe, LABELS[4:], SEEDS[4:], config))
    assert [len(batch) for batch in (first, *rest)] == [4, 3]
    assert torch.equal(torch.cat([first, *rest]), sample(pipe, LABELS, SEEDS, config))


def test_images_are_uint8_on_the_cpu_and_ordinary_tensors(pipe):
    images = sample(pipe, LABELS[:2], SEEDS[:2], steps=2)
    assert images.dtype == torch.uint8 and images.shape == (2, 1, 32, 32) and not images.is_inference()
    assert not torch.is_inference_mode_enabled()
    stream = sample_batches(pipe, LABELS, SEEDS, SamplingConfig(steps=2, batch_size=4))
    next(stream)
    assert not torch.is_inference_mode_enabled()


def test_preview_sees_every_step_of_real_images_only(pipe):
    seen = []
    sample(pipe, [1, 2], [0, 1], steps=3, preview=lambda done, x: seen.append((done, tuple(x.shape))))
    assert seen == [(1, (2, 4, 8, 8)), (2, (2, 4, 8, 8)), (3, (2, 4, 8, 8))]


def test_preview_cancels_by_returning_false(pipe):
    calls = []
    with pytest.raises(SamplingCancelled, match="step 2 of 5, after 0 of 7 images"):
        sample(watched(pipe, calls), LABELS, SEEDS, steps=5, preview=lambda done, x: done < 2)
    assert len(calls) == 2


def test_preview_may_raise_an_error_of_its_own(pipe):
    def preview(done, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, [0], [0], steps=3, preview=preview)


def test_progress_leaves_a_line_with_count_and_time(pipe, capsys):
    sample(pipe, [0, 1], [0, 1], steps=2, progress=True)
    assert "2 images (2 steps, guidance 1.5) in" in capsys.readouterr().out


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 10, 207])
def test_label_outside_the_classes_is_named_with_their_range(pipe, label):
    with pytest.raises(ValueError, match=rf"class label {label} \(image 1\) is outside 0 … 9"):
        sample_batches(pipe, [0, label], [0, 1])


def test_counts_that_differ_are_both_named(pipe):
    with pytest.raises(ValueError, match="3 class labels but 2 seeds"):
        sample_batches(pipe, [0, 1, 2], [0, 1])


def test_other_impossible_requests_are_refused_before_any_forward(pipe):
    calls = []
    model = watched(pipe, calls)
    with pytest.raises(ValueError, match="nothing to sample"):
        sample_batches(model, [], [])
    with pytest.raises(ValueError, match="steps=1001"):
        sample_batches(model, [0], [0], steps=1001)
    with pytest.raises(ValueError, match="guidance_channels=5 but the latents have 4"):
        sample_batches(model, [0], [0], SamplingConfig(guidance_channels=5))
    model.transformer.train()
    with pytest.raises(ValueError, match="training mode"):
        sample_batches(model, [0], [0])
    model.transformer.eval()
    assert calls == []


# --- memory of the process -------------------------------------------------------------------------------------------


def test_freed_memory_is_kept_on_glibc_and_asking_twice_is_harmless():
    first = keep_freed_memory()
    assert keep_freed_memory() is first
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert first is True


def test_peak_memory_counts_bytes():
    block = torch.ones(16 * 1024 * 1024)  # 64 MiB, touched
    assert peak_memory() > block.numel() * block.element_size()
    assert peak_memory() < 2**40


@pytest.mark.parametrize(
    "labels, seeds, message",
    [
        ([0], [0.2], "seed of image 0=0.2 is not an integer"),
        ([0, 1], [0, "1"], "seed of image 1='1' is not an integer"),
        ([0], [True], "seed of image 0=True is not an integer"),
        ([0], [2**32], "seed of image 0=4294967296 is outside 0"),
        ([0], [-1], "seed of image 0=-1 is outside 0"),
        ([0], torch.tensor([True]), r"seed of image 0=tensor\(True\) is not an integer"),
        ([1.5], [0], "class label of image 0=1.5 is not an integer"),
        (torch.eye(2, dtype=torch.int64), [0, 1], r"class label of image 0=tensor\(\[1, 0\]\) is not an integer"),
        (3, [0], "class labels 3 are no sequence"),
        ([0], {7}, r"seeds \{7\} are no sequence"),
        ([0], None, "seeds None are no sequence"),
    ],
)
def test_seeds_and_labels_that_are_no_integers_are_refused_by_name(labels, seeds, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny.pipeline(), labels, seeds, steps=2)


def test_numpys_and_torchs_integers_are_seeds_like_pythons():
    pipe = tiny.pipeline()
    plain = sample(pipe, [0, 1], [3, 2**32 - 1], steps=2)
    assert torch.equal(sample(pipe, np.array([0, 1]), torch.tensor([3, 2**32 - 1]), steps=2), plain)
    assert not torch.equal(plain[0], plain[1])


def test_latents_that_are_not_finite_stop_with_step_class_and_seed():
    pipe = tiny.pipeline()
    forward, calls = pipe.transformer.forward, []

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            output.sample[1] = torch.nan
        return output

    pipe.transformer.forward = broken
    with pytest.raises(FloatingPointError, match="latents after step 2 of 3 are not finite .*: class 7, seed 9"):
        sample(pipe, [4, 7], [8, 9], steps=3, guidance_scale=1.0)


def test_where_steps_are_looked_at_only_in_the_end_the_first_bad_one_is_named_all_the_same():
    good = torch.tensor([5, 2, 3])  # steps after which each of three images was still finite
    with pytest.raises(FloatingPointError, match="step 3 of 5 are not finite .*: class 8, seed 1"):
        sampling.require_finite(good, 5, "latents after step {} of 5", [7, 8, 9], [0, 1, 2])
    sampling.require_finite(good[:1], 5, "latents", [7], [0])


def test_images_that_are_not_finite_stop_with_class_and_seed():
    pipe = tiny.pipeline()
    pipe.vae.decoder.conv_out.bias.data[0] = torch.inf
    with pytest.raises(FloatingPointError, match="decoded images are not finite .*: class 2, seed 5"):
        sample(pipe, [2], [5], steps=1)


def test_images_asked_for_twice_are_told():
    with pytest.warns(UserWarning, match="1 of 3 images have class and seed of another"):
        sample(tiny.pipeline(), [0, 1, 0], [5, 5, 5], steps=1)


@pytest.mark.parametrize("products", ["tf32", "bfloat16"])
def test_products_are_the_transformers_and_latents_are_decoded_in_float32(products):
    """TF32 is float32 on a CPU; bfloat16 is not, and an image stays one."""
    pipe = tiny.pipeline()
    decode, flags = pipe.vae.decode, []
    pipe.vae.decode = lambda latents: flags.append(torch.is_autocast_enabled("cpu")) or decode(latents)
    exact, rounded = (
        sample(pipe, [0, 1], [3, 4], SamplingConfig(steps=3, products=name)) for name in ("float32", products)
    )
    assert torch.equal(exact, rounded) is (products == "tf32") and not any(flags) and flags
    assert (exact.int() - rounded.int()).abs().float().mean() < 8
    with pytest.raises(ValueError, match="products='float16' is not one of"):
        SamplingConfig(products="float16")
