"""What sampling refuses or tells: values that are not finite, seeds and labels that are no integers, precision."""

import numpy as np
import pytest
import tiny
import torch

from vqlib.config import SamplingConfig
from vqlib.models import sampling
from vqlib.models.sampling import sample


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
