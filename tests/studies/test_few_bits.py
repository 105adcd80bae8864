"""Rival codes are what they say, are trained on the output, and store what is counted; rows of the same images pair."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from vqlib.config import OTHER_TRAJECTORIES, CalibrationConfig, SamplingConfig, recipe_distillation
from vqlib.models import structure
from vqlib.quantizer.codebook import fit_codebook
from vqlib.studies.ablations import Ablation
from vqlib.studies.baselines.additive import Additive, learn, least_squares, search, total
from vqlib.studies.baselines.baseline import Moments
from vqlib.studies.baselines.gptq import GPTQ
from vqlib.studies.baselines.lattice import Lattice, LatticeLinear, e8p, gaussian_scale, rotation
from vqlib.studies.baselines.low_rank import LowRank, low_rank
from vqlib.studies.baselines.made import Trained, rates
from vqlib.studies.compared import Compared
from vqlib.studies.few_bits import MOVING, NONE, Choice, choices, compare, summary
from vqlib.system.fingerprint import fingerprint

SIZES = {"batch_size": 4, "steps": 4, "iterations": 3}
INPUTS = CalibrationConfig(**SIZES)
MOMENTS = Moments(INPUTS, batches=3)
OUTPUT = recipe_distillation("best", batch_size=8, steps=4, iterations=60, lr_latents=0.0)
UNTRAINED, TRAINED = Trained(MOMENTS), Trained(MOMENTS, OUTPUT)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def output_error(pipe, model):
    """Squared difference of the outputs on one batch."""
    x = torch.randn(8, *pipe.latent_shape, generator=torch.Generator().manual_seed(5))
    how = x, torch.full((8,), 500), torch.arange(8), 1.0
    with torch.no_grad():
        return float((pipe.output(*how) - pipe.output(*how, model=model)).square().mean())


@pytest.mark.parametrize("method", [Additive(UNTRAINED, k=16), LowRank(UNTRAINED, rank=2)])
def test_a_rival_is_nearer_to_the_weights_the_more_it_stores_and_nearer_to_the_output_once_trained(pipe, method):
    plain, trained = method.build(pipe), replace(method, how=TRAINED).build(pipe)
    assert plain.bits_per_weight == trained.bits_per_weight and plain.seconds == 0.0 < trained.seconds
    changed = [
        n
        for n, layer in structure.quantizable(trained.model).items()
        if not torch.equal(layer.weight, plain.model.get_submodule(n).weight)
    ]
    assert len(changed) == len(structure.quantizable(pipe.transformer))
    assert output_error(pipe, trained.model) < output_error(pipe, plain.model)
    for name, layer in structure.quantizable(pipe.transformer).items():
        left = (layer.weight - plain.model.get_submodule(name).weight).square().sum() / layer.weight.square().sum()
        assert left < 0.6, name


def test_bits_of_rivals_are_what_their_parts_take(pipe):
    layers = structure.quantizable(pipe.transformer).values()
    count, rows = sum(layer.weight.numel() for layer in layers), sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    additive = Additive(UNTRAINED, k=16, d=8, books=2).build(pipe)
    assert additive.bits_per_weight * count == pytest.approx(2 * 4 * count / 8 + 16 * rows + 16 * 2 * 16 * 8)
    grid = LowRank(UNTRAINED, bits=2, rank=3).build(pipe)
    assert grid.bits_per_weight * count == pytest.approx(2 * count + 18 * rows + 16 * 3 * (rows + inputs))
    assert grid.size_bytes > grid.bits_per_weight * count / 8
    for how in (UNTRAINED, TRAINED):  # a product of two halves, of 11 significant bits each, has 22
        halves = structure.quantizable(Additive(how, k=16, d=4, books=1).build(pipe).model).values()
        assert all(layer.weight.view(torch.int32).bitwise_and(3).eq(0).all() for layer in halves)


def test_the_points_of_e8p_are_half_odd_of_even_sum_a_quarter_aside_and_better_than_any_small_codebook():
    points = e8p()
    assert points.shape == points.unique(dim=0).shape == (65536, 8)
    plus, minus = points[:32768] - 0.25, points[32768:] + 0.25
    assert torch.equal(plus, minus) and (plus * 2).remainder(2).eq(1).all() and plus.sum(dim=1).remainder(2).eq(0).all()
    assert plus.square().sum(dim=1).max() == 12 and (plus.square().sum(dim=1) <= 10).sum() == 227 * 128
    x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(1))
    own = gaussian_scale(points) * points
    left = torch.cdist(x, own).min(dim=1).values.square().mean() / 8
    book = fit_codebook(torch.randn(1 << 14, 4, generator=torch.Generator().manual_seed(2)), 256).codewords
    fours = torch.cdist(x.view(-1, 4), book).min(dim=1).values.square().mean() / 4
    assert 2.0**-4 < left < fours


def test_lattice_codes_undo_their_rotations_and_train_their_gains(pipe, tmp_path):
    turn = rotation(12, torch.Generator().manual_seed(0))
    assert torch.allclose(turn @ turn.T, torch.eye(12, dtype=torch.float64))
    few = tiny.pipeline(blocks=1)
    made = Lattice(TRAINED).build(few, tmp_path)
    layers = structure.quantizable(few.transformer)
    for name, layer in layers.items():
        left = (layer.weight - made.model.get_submodule(name).weight).square().sum() / layer.weight.square().sum()
        assert left < 0.3, name
    count = sum(layer.weight.numel() for layer in layers.values())
    gains = sum(32 + 16 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert made.bits_per_weight * count == pytest.approx(2 * count + gains)
    again = Lattice(TRAINED).build(few, tmp_path)  # from the folder
    assert again.seconds == made.seconds
    assert all(torch.equal(t, made.model.state_dict()[n]) for n, t in again.model.state_dict().items())


def test_a_folder_holds_one_rival_of_one_model(pipe, tmp_path):
    made = Additive(UNTRAINED, k=16).build(pipe, tmp_path)
    again = Additive(UNTRAINED, k=16).build(pipe, tmp_path)
    assert again.bits_per_weight == made.bits_per_weight and fingerprint(again.model) == fingerprint(made.model)
    with pytest.raises(RuntimeError, match=r"dense.safetensors holds Additive\(.*, now LowRank\("):
        LowRank(UNTRAINED, rank=3).build(pipe, tmp_path)
    with pytest.raises(RuntimeError, match="holds Additive.* of weights .*, now Additive"):
        Additive(UNTRAINED, k=16).build(pipe.with_transformer(tiny.transformer(1)), tmp_path)


def test_additive_codes_find_their_sums_and_least_squares_never_adds_error():
    generator = torch.Generator().manual_seed(0)
    books = [torch.randn(8, 4, generator=generator), 0.1 * torch.randn(8, 4, generator=generator)]
    codes = torch.randint(8, (2, 300), generator=generator)
    assert torch.equal(search(total(books, codes), books), codes)
    x = torch.randn(2000, 4, generator=generator)
    start = learn(x, 8, 1)
    before = (x - total(start, search(x, start))).square().mean()
    learned = learn(x, 8, 2)
    found = search(x, learned)
    error = (x - total(learned, found)).square().mean()
    assert error < 0.6 * before
    assert (x - total(least_squares(x, found, 8), found)).square().mean() <= error * 1.0001


def test_the_low_rank_part_is_the_best_in_the_metric_of_the_inputs():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 8, generator=generator), torch.randn(100, 8, generator=generator)
    hessian = x.T @ x / 100 * torch.linspace(0.1, 4, 8)[:, None] * torch.linspace(0.1, 4, 8)
    left, right = low_rank(weight, hessian, 3)
    u, s, v = torch.linalg.svd(weight)
    plain = u[:, :3] @ s[:3].diag() @ v[:3]

    def error(kept):
        return float(torch.trace((weight - kept) @ hessian @ (weight - kept).T))

    assert error(left @ right) < error(plain)
    with pytest.raises(ValueError, match=r"rank=99 is outside 1 … 32 \(transformer_blocks.0"):
        LowRank(UNTRAINED, rank=99).build(tiny.pipeline())


def test_a_rival_refuses_a_training_that_it_would_not_follow():
    others = {"lr_latents": 6e-3, "path": "teacher", "products": "bfloat16", "activation_checkpointing": True}
    for name, value in (others | {"train_biases": False, "train_codebooks": "never"}).items():
        with pytest.raises(ValueError, match=f"its codes as they are, in float32, not with {name}={value!r}"):
            Trained(MOMENTS, OUTPUT.replace(**{name: value}))


def test_a_rival_is_trained_on_the_guided_output_where_the_last_stage_is(pipe):
    def weights(**changes):
        how = Trained(MOMENTS, OUTPUT.replace(iterations=3, **changes))
        model = Additive(how, k=16).build(pipe).model
        return torch.cat([layer.weight.flatten() for layer in structure.quantizable(model).values()])

    assert not torch.equal(weights(), weights(loss_at="guided"))
    assert torch.equal(weights(guidance_scale=1.0), weights(guidance_scale=1.0, loss_at="guided"))


def test_a_rivals_parameters_move_by_the_same_share_of_themselves(pipe):
    layer = next(iter(structure.quantizable(pipe.transformer).values()))
    points = gaussian_scale(e8p()) * e8p()
    turns = [rotation(n, torch.Generator().manual_seed(0)) for n in layer.weight.shape]
    made = LatticeLinear(layer, torch.eye(layer.in_features), *turns, points, trained=True)
    found, size = rates([made], OUTPUT), float(made.weight().square().mean().sqrt())
    assert found[made.bias] == OUTPUT.lr_codebooks
    assert found[made.rows] == found[made.columns] == pytest.approx(OUTPUT.lr_codebooks / size)  # gains of 1
    shared = nn.Parameter(torch.full((4,), 3.0))
    made.own, other = shared, LatticeLinear(layer, torch.eye(layer.in_features), *turns, points, trained=False)
    other.own = shared
    assert rates([made, other], OUTPUT)[shared] == pytest.approx(3.0 * OUTPUT.lr_codebooks / size)
    assert len(rates([made, other], OUTPUT)) == 5  # the other's bias, and the shared one once


@pytest.mark.parametrize("method", [LowRank(UNTRAINED), GPTQ(2, 16, MOMENTS)])
def test_a_wrapped_transformer_is_quantized_like_the_one_inside(method):
    pipe = tiny.pipeline(blocks=1)
    plain, wrapped = (method.build(p) for p in (pipe, pipe.with_transformer(nn.DataParallel(pipe.transformer))))
    assert wrapped.size_bytes == plain.size_bytes and wrapped.bits_per_weight == plain.bits_per_weight
    layers = structure.quantizable(wrapped.model)
    assert all(torch.equal(layer.weight, plain.model.get_submodule(name).weight) for name, layer in layers.items())


def test_a_width_that_codes_do_not_divide_is_refused_by_name(pipe):
    with pytest.raises(ValueError, match=r"in_features 32 is not divisible by d=5 \(transformer_blocks.0"):
        Additive(UNTRAINED, d=5).build(pipe)


def test_rows_of_the_frontier_are_made_once_and_compared_on_their_own_images(tmp_path):
    known = choices(**SIZES)
    assert len({(row.group, row.name) for row in known}) == len(known)
    one = next(row for row in known if row.codes == "k 512, d 6, one codebook" and row.last == MOVING)
    assert one.method(3).calibration.seed == 3 and one.method(3).distillation.seed == 3 + OTHER_TRAJECTORIES
    assert one.method(3).moments.inputs.seed == one.method(3).seed == 3
    study = Ablation(tiny.pipeline(), tmp_path, 140, SamplingConfig(steps=1), "fashion-mnist-test")
    rows = [known[0], Choice("low rank", "2 bits", NONE, LowRank(UNTRAINED))]
    made = [study.row(row, 0) for row in rows]
    compared = compare(study, [*rows, known[1]], [0, 1])
    assert list(compared.results) == rows  # the others are not finished
    with pytest.raises(ValueError, match=r"seeds \[0, 0\] repeat"):
        compare(study, rows, [0, 0])
    with pytest.raises(ValueError, match="100 images against 10000 of the reference are too few for 128"):
        replace(study, images=100)  # before anything is trained
    difference, low, high = compared.more(rows[1], rows[0])
    assert difference == pytest.approx(made[1]["metrics"]["fd"] - made[0]["metrics"]["fd"]) and low < difference < high
    found = summary(compared)
    assert found["codes"].tolist() == ["float16", "2 bits"] and found["seeds"].tolist() == [1, 1]
    assert found["method"].tolist() == ["full precision", "low rank, not on the output"]
    assert found["above"].tolist() == [0.0, difference] and found["× full precision"][0] == 1.0
    assert math.isclose(found["FD"][0], made[0]["metrics"]["fd"])


def test_a_row_of_several_seeds_counts_by_its_mean():
    one = choices(**SIZES)[1]
    results = [
        {"bits_per_weight": 2.0, "calibration_minutes": m, "metrics": {"fd": fd, "accuracy": 0.5, "images": 140}}
        for fd, m in ((1.0, 3), (2.0, 5))
    ]
    compared = Compared({one: results}, {one: torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)})
    found = summary(compared).loc[0]
    assert (found["seeds"], found["FD"], found["minutes"], found["stored bits"]) == (2, 1.5, 4.0, 2.0)
    assert found["± (std)"] == pytest.approx(0.5**0.5) and found["low"] < 1.5 < found["high"] and "above" not in found
