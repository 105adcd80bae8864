"""The sampler against a slow transcription of the published equations; seeds, batches, streaming, errors."""

import math
from types import SimpleNamespace

import pytest
import torch

import vqlib  # noqa: F401, first: diffusers beside a CPU build of torch

# isort: split
from diffusers import AutoencoderKL, DiTTransformer2DModel

from vqlib.config import SamplingConfig
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.pipeline import Pipeline
from vqlib.models.process import guide
from vqlib.models.sampling import SamplingCancelled, sample, sample_batches, to_uint8

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
