"""Training of the bundled models: data with checked sums, and a killed training that goes on where it was."""

import copy
import dataclasses

import pytest
import tiny
import torch

from vqlib.bundled import export, losses, training
from vqlib.bundled.networks import decoder_of
from vqlib.bundled.subjects import FASHION
from vqlib.evaluation import fashion_dataset as dataset
from vqlib.evaluation.classifier import to_model


def test_images_are_padded_to_32_and_match_their_labels(tmp_path):
    images, labels = dataset.load("test", tiny.fashion_mnist(tmp_path / "data"), verify=False)
    assert images.shape == (160, 1, 32, 32) and images.dtype == torch.uint8
    assert images[:, :, :2].max() == 0 and images[:, :, 2].max() > 0
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert to_model(images).min() == -1 and to_model(images).max() == 1


def test_files_that_are_not_fashion_mnist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SHA-256 is .* expected cc1d090a"):
        dataset.load("test", tiny.fashion_mnist(tmp_path / "data"))
    with pytest.raises(ValueError, match="split 'validation'"):
        dataset.load("validation")


def test_a_stopped_training_goes_on_bit_equal(tmp_path):
    images, labels = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    config = training.TrainConfig("classifier", steps=6, batch=8, lr=1e-3, warmup=2, checkpoint_every=2)

    def run(folder, stop=None):
        network = FASHION.build_classifier()
        steps = training.train(network, losses.classifier_loss(images, labels), 64, config, folder, log_every=1)
        seen = [next(steps).step for _ in range(stop)] if stop else [progress.step for progress in steps]
        return network, seen

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop=3)
    resumed, seen = run(tmp_path / "stopped")
    assert seen == [3, 4, 5, 6], "goes on after the checkpoint at 2"
    assert training.finished(tmp_path / "stopped", config).images == 48
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    averaged = export.trained(FASHION.build_classifier(), "classifier", tmp_path / "stopped")
    assert torch.equal(averaged.head.weight, whole.head.weight)


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    images, labels = torch.zeros(8, 1, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    config = training.TrainConfig("classifier", steps=1, batch=2, lr=1e-3, warmup=1)
    loss = losses.classifier_loss(images, labels)
    list(training.train(FASHION.build_classifier(), loss, 8, config, tmp_path))
    with pytest.raises(ValueError, match="belongs to another configuration"):
        list(training.train(FASHION.build_classifier(), loss, 8, dataclasses.replace(config, steps=2), tmp_path))


def test_a_run_on_other_data_other_weights_or_with_another_loss_is_refused(tmp_path):
    config = training.TrainConfig("dit", steps=1, batch=4, lr=1e-3, warmup=1)
    latents, labels = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)

    def run(model, latents, **options):
        list(training.train(model, losses.dit_loss(latents, labels, 10, **options), 8, config, tmp_path))
        return model

    start = FASHION.build_transformer()
    other = copy.deepcopy(start)
    other.proj_out_2.bias.data.add_(1e-3)
    trained = run(copy.deepcopy(start), latents)
    again = run(copy.deepcopy(start), latents)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in trained.state_dict().items())
    for given in ((start, latents + 0.5, {}), (other, latents, {}), (start, latents, {"snr_cap": 0.01})):
        with pytest.raises(ValueError, match="began with other weights, data or options of the loss"):
            run(copy.deepcopy(given[0]), given[1], **given[2])


def test_the_dit_loss_sees_every_part_of_the_output():
    """ε by the mean squared error, v by the variational bound whose mean is stopped."""
    dit = FASHION.build_transformer()
    loss = losses.dit_loss(torch.randn(16, 4, 8, 8), torch.arange(16) % 10, 10)
    loss(dit, torch.arange(16), torch.Generator().manual_seed(0)).backward()
    gradient = dit.proj_out_2.bias.grad.view(2, 2, 8)  # unpatchify reads p, q, channel
    assert gradient[..., :4].abs().min() > 0 and gradient[..., 4:].abs().min() > 0


def test_a_capped_snr_takes_weight_from_the_least_noisy_timesteps_only():
    """min(SNR, γ) / SNR: at γ = 5 the weight is 1 from ᾱ = 5/6 on, and ᾱ falls with the timestep."""
    latents, labels = torch.randn(1, 4, 8, 8), torch.tensor([3])
    plain, capped = losses.dit_loss(latents, labels, 10), losses.dit_loss(latents, labels, 10, snr_cap=5.0)
    dit = FASHION.build_transformer().eval()  # predicts 0: L_simple is the noise's mean square for every timestep
    lighter = 0
    for seed in range(16):
        index, values = torch.zeros(1, dtype=torch.int64), []
        for loss in (plain, capped):
            values.append(loss(dit, index, torch.Generator().manual_seed(seed)).item())
        generator = torch.Generator().manual_seed(seed)
        torch.rand(1, generator=generator)
        step = torch.randint(losses.TIMESTEPS, (1,), generator=generator).item()
        assert (values[1] < values[0]) == (step < 130), step  # ᾱ_130 = 0.83
        lighter += values[1] < values[0]
    assert lighter > 0


def test_training_the_decoder_leaves_the_latents_as_they_are(tmp_path):
    images = torch.randint(0, 256, (32, 1, 32, 32), dtype=torch.uint8)
    vae = FASHION.build_vae().eval()
    mean, std = export.posterior(vae, images)
    decoder, config = decoder_of(vae), training.TrainConfig("decoder", steps=3, batch=8, lr=1e-2, warmup=1)
    before = vae.decode(mean[:2]).sample
    list(training.train(decoder, losses.decoder_loss(images, mean, std), 32, config, tmp_path))
    assert torch.equal(export.encode(vae, images), mean)
    assert not torch.equal(vae.decode(mean[:2]).sample, before)


def test_the_exported_transformer_is_the_trained_one_in_half_precision(tmp_path):
    from diffusers import DiTTransformer2DModel

    dit = FASHION.build_transformer()
    torch.nn.init.normal_(dit.proj_out_2.weight, std=0.02)
    export.export_dit(dit, tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([3, 10])
    with torch.inference_mode():
        a, b = (m(x, timestep=t, class_labels=y, return_dict=False)[0] for m in (dit.eval(), loaded))
    assert torch.allclose(a, b, atol=2e-3)
