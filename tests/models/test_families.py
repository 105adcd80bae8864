"""Every family: quantize, calibrate, resume, pack, load, sample; and what its adapter tells the model."""

import json
from dataclasses import replace

import families
import pytest
import torch

import vqlib
from vqlib.calibrator.losses import block_loss, distance_weight
from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig
from vqlib.models import flux, structure
from vqlib.models.denoiser import handed_on
from vqlib.models.prompts import Prompts

VQ = VQConfig(k=8, d=2, candidates=2, kmeans_iterations=3)
RUN = CalibrationConfig(iterations=4, batch_size=2, steps=4, checkpoint_every=2)


@pytest.fixture(params=families.ALL)
def pipe(request):
    return families.ALL[request.param]()


def calibrated(pipe, config, out=None):
    return vqlib.calibrate(pipe, vqlib.quantize(pipe.transformer, VQ), config, out)


def equal(a, b):
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_whole_chain(pipe, tmp_path):
    """A run that was cut off and goes on ends in the same bits; what is loaded is what was saved; images are finite and its own."""
    records = list(whole := calibrated(pipe, RUN))
    assert all(0 < loss < 1e3 for record in records for loss in record.block_losses)
    first = calibrated(pipe, RUN, tmp_path / "run")
    next(first), next(first)
    first.close()
    second = calibrated(pipe, RUN, tmp_path / "run")
    assert second.iteration == 2
    packed, resumed = whole.finish(), second.finish()
    assert equal(packed, resumed)
    layers = structure.quantizable(pipe.transformer)
    assert {n for n, m in packed.named_modules() if isinstance(m, vqlib.VQLinear)} == set(layers)
    loaded = vqlib.load_transformer(vqlib.save(packed, tmp_path / "packed"))
    assert equal(packed, loaded) and type(loaded) is type(pipe.transformer)
    again = type(loaded).from_pretrained(tmp_path / "packed")
    settings = SamplingConfig(steps=3, guidance_scale=2.0)
    images = [vqlib.sample(pipe.with_transformer(m), [0, 2], [5, 6], settings) for m in (packed, loaded, again)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not torch.equal(images[0], vqlib.sample(pipe, [0, 2], [5, 6], settings))


@pytest.mark.parametrize(
    "changes", [{"block_inputs": "student"}, {"block_inputs": "end-to-end"}, {"products": "bfloat16"}]
)
def test_other_ways_to_calibrate_know_all_streams(pipe, changes):
    records = list(calibrated(pipe, RUN.replace(iterations=2, **changes)))
    depth = len(structure.block_list(pipe.transformer))
    assert all(len(record.block_losses) == depth and min(record.block_losses) > 0 for record in records)


def test_a_blocks_outputs_take_the_place_of_the_next_ones_streams():
    text, image = torch.ones(1, 2, 3), torch.zeros(1, 4, 3)
    kwargs = {"hidden_states": 0, "encoder_hidden_states": 1, "temb": 2}
    args, found = handed_on((text, image), ("encoder_hidden_states", "hidden_states"), (), kwargs)
    assert args == () and found == {"hidden_states": image, "encoder_hidden_states": text, "temb": 2}
    assert handed_on(image, ("hidden_states",), (0, 5), {"t": 1}) == ((image, 5), {"t": 1})
    with pytest.raises(ValueError, match="are not all among a block's named arguments"):
        handed_on((text, image), ("encoder_hidden_states", "hidden_states"), (0, 1), {})


def test_several_streams_are_compared_as_one_row_of_values():
    """Mean of 6 ones and 12 fours; 18 values an image; the last block of SD3 gives no text."""
    text, image = torch.ones(2, 2, 3), torch.full((2, 4, 3), 2.0)
    zero = torch.zeros(2, 2, 3), torch.zeros(2, 4, 3)
    assert block_loss((text, image), zero).item() == pytest.approx((6 * 1 + 12 * 4) / 18)
    assert distance_weight(CalibrationConfig(), (text, image)) == 18
    assert block_loss((None, image), (None, zero[1])).item() == 4.0


def test_second_moments_are_found_for_every_layer(pipe):
    hessians = vqlib.input_hessians(pipe, RUN, batches=2)
    layers = structure.quantizable(pipe.transformer)
    assert hessians.keys() == layers.keys()
    assert all(hessians[n].shape == (m.in_features,) * 2 and hessians[n].trace() > 0 for n, m in layers.items())


def test_conditions_guidance_and_seeds_change_the_image(pipe):
    def image(label, seed, scale):
        return vqlib.sample(pipe, [label], [seed], SamplingConfig(steps=3, guidance_scale=scale))

    first = image(0, 0, 3.0)
    assert torch.equal(first, image(0, 0, 3.0))
    for other in (image(1, 0, 3.0), image(0, 1, 3.0), image(0, 0, 1.0)):
        assert not torch.equal(first, other)


def test_pixart_of_1024_pixels_is_told_the_size_where_its_config_leaves_that_to_the_class():
    pipe = families.pixart()
    sizes = {"sample_size": 128, "attention_head_dim": 24, "cross_attention_dim": 48, "use_additional_conditions": None}
    pipe = replace(pipe, transformer=type(pipe.transformer)(**dict(pipe.transformer.config) | sizes).eval())
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 1])
    assert pipe.output(x, t, labels, 1.0).isfinite().all()


def test_guidance_is_an_input_of_flux_and_doubles_the_others(pipe):
    rows = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((len(kwargs["timestep"]), kwargs.get("guidance"))), with_kwargs=True
    )
    vqlib.sample(pipe, [0] * 4, range(4), SamplingConfig(steps=1, guidance_scale=3.5))
    ((count, guidance),) = rows
    if pipe.name == "FLUX":
        assert count == 4 and guidance.tolist() == [3.5] * 4
    else:
        assert count == 8 and guidance is None


# --- packing, prompts ------------------------------------------------------------------------------------------------


def test_flux_packs_squares_of_latents_channel_by_channel():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    tokens = flux.pack(x)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # the square right of the first, of both channels
    assert torch.equal(flux.unpack(tokens, 2, 2), x)
    assert flux.positions(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_prompts_are_kept_in_a_file_and_their_rows_found(tmp_path):
    made = families.prompts(mask=True)
    found = Prompts.load(made.save(tmp_path / "prompts.safetensors"))
    assert found.texts == families.TEXTS and found.fingerprint() == made.fingerprint()
    rows = found.rows(torch.tensor([3, 0]), torch.zeros(1, dtype=torch.bfloat16))
    assert rows["prompt_attention_mask"].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert torch.equal(rows["prompt_embeds"], made.tensors["prompt_embeds"][[3, 0]].bfloat16())


def test_prompts_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 rows of a for 3 prompts: need one each, and one for none"):
        Prompts("abc", {"a": torch.zeros(3, 2)})
    with pytest.raises(
        ValueError, match="FLUX needs prompts with prompt_embeds, pooled_prompt_embeds; there are prompt_e"
    ):
        flux.Flux(families.prompts(mask=True))
    with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
        Prompts.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"no file of tensors")
    with pytest.raises(ValueError, match="bad is no file of prompts"):
        Prompts.load(tmp_path / "bad")


def test_a_run_folder_belongs_to_its_prompts_and_its_process(tmp_path):
    pipe = families.sd3()
    run = calibrated(pipe, RUN, tmp_path / "run")
    next(run)
    run.checkpoint()
    run.close()
    for what, other in families.others(pipe).items():
        with pytest.raises(RuntimeError, match=f"holds a run with pipeline.{what}="):
            calibrated(other, RUN, tmp_path / "run")


def test_a_pipelines_identity_is_all_that_counts_besides_weights(pipe):
    """Equal for the pipeline made again, whatever its weights; as JSON reads it back; another for another process."""
    found = pipe.identity()
    again = families.ALL[pipe.name]()
    next(again.transformer.parameters()).data += 1.0
    assert json.loads(json.dumps(found)) == found == again.to("cpu").identity()
    here = {"steps": 500} if pipe.name not in ("plain DiT", "PixArt") else {"prediction": "sample"}
    assert replace(pipe, schedule=replace(pipe.schedule, **here)).identity() != found
