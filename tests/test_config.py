import json

import numpy as np
import pytest

from vqlib.config import (
    OTHER_TRAJECTORIES,
    RECIPES,
    CalibrationConfig,
    SamplingConfig,
    VQConfig,
    recipe,
    recipe_distillation,
    recipe_vq,
)


@pytest.mark.parametrize("bits, k, d", [(2, 256, 4), (3, 64, 2), (4, 256, 2)])
def test_bits_choose_the_codebook(bits, k, d):
    config = VQConfig(bits=bits)
    assert (config.k, config.d, config.bits) == (k, d, bits)


def test_bits_follow_from_k_and_d():
    assert VQConfig(k=512, d=4).bits == 2.25


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 2, "k": 64, "d": 4}, "log2.k./d = 1.5"),
        ({"k": 16}, "give both or neither"),
        ({"bits": 2, "candidates": 300}, "candidates=300 is outside 1 … k=256"),
        ({"codebook_scope": "head"}, "codebook_scope='head'"),
        ({"codebook_dtype": "int8"}, "codebook_dtype='int8'"),
        ({"layers": [("*to_q", 16)]}, r"layers=\[.*\] is not a list of .pattern, k, d."),
        ({"layers": [("*to_q", 1, 4)]}, r"k=1, d=4: .*\(\*to_q\)"),
        ({"layers": [("*to_q", 2, 4)]}, r"candidates=3 is outside 1 … k=2 \(\*to_q\)"),
    ],
)
def test_impossible_geometry_is_refused_with_the_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**settings)


def test_every_recipe_survives_a_round_trip_through_a_dict():
    for chosen in RECIPES.values():
        assert CalibrationConfig.from_dict(json.loads(json.dumps(chosen.calibration.to_dict()))) == chosen.calibration
        assert VQConfig.from_dict(chosen.vq.to_dict()) == chosen.vq


def test_rules_of_layers_survive_json():
    config = VQConfig(k=16, d=4, layers=(("*to_q", 8, 2), ("*", 4, 4)), candidates=2, full_precision=("*.3.*",))
    assert VQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.for_layer("blocks.0.to_q") == VQConfig(k=8, d=2, candidates=2)
    assert config.takes("blocks.0.to_q") and not config.takes("blocks.3.to_q")
    with pytest.raises(ValueError, match="full_precision='q' is not a list of patterns"):
        VQConfig(full_precision="q")


def test_every_recipe_has_its_candidates_and_start_at_any_bits():
    assert recipe_vq("best", 3) == VQConfig(bits=3, candidates=2, ratio_start="leading", assignment="error-feedback")
    assert recipe_vq("paper", candidates=5) == VQConfig(bits=2, candidates=5)
    with pytest.raises(ValueError, match="recipe 'papr' is not one of"):
        recipe_vq("papr")


def test_the_paper_weighs_the_squared_norm_and_the_release_the_mean():
    assert {name: chosen.calibration.block_loss for name, chosen in RECIPES.items()} == {
        "paper": "sum",
        "release": "mean",
        "best": "sum",
    }
    assert RECIPES["paper"].calibration == CalibrationConfig()
    with pytest.raises(ValueError, match=r"block_loss='norm' is not one of \('mean', 'sum'\)"):
        CalibrationConfig(block_loss="norm")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="recipe 'papr' is not one of"):
        recipe("papr")
    with pytest.raises(ValueError, match="no setting iteration"):
        CalibrationConfig.from_dict({"iteration": 3})
    with pytest.raises(ValueError, match="loss_at='output'"):
        CalibrationConfig(loss_at="output")


def test_a_recipe_is_laid_over_the_sizes_of_another_study():
    best = RECIPES["best"]
    codes = best.codes(VQConfig(k=16, d=2, codebook_scope="model"), candidates=4)
    expected = {"k": 16, "d": 2, "codebook_scope": "model", "assignment": "error-feedback", "ratio_start": "leading"}
    assert codes == VQConfig(**expected, candidates=4)
    base = CalibrationConfig(iterations=7, batch_size=3, steps=9, guidance_scale=3.5, lr_codebooks=1.0, seed=4)
    sizes = {"batch_size": 3, "steps": 9, "guidance_scale": 3.5}
    assert best.run(base) == recipe("best", iterations=7, **sizes)
    assert best.last(base, iterations=8) == recipe_distillation(
        "best", iterations=8, seed=4 + OTHER_TRAJECTORIES, **sizes
    )
    assert best.last(base).iterations == best.distillation.iterations  # which it sets itself
    with pytest.raises(ValueError, match=r"the recipe does not distill; of .* these do: \['best'\]"):
        RECIPES["paper"].last(base)
    assert RECIPES["release"].run(base) == recipe("release", iterations=7, steps=9)  # guidance and batch are its own


def test_numbers_of_numpy_are_as_good_as_pythons():
    given = CalibrationConfig(
        iterations=np.int64(2), lr_ratios=np.float32(0.5), train_biases=np.bool_(False), lambda_r=1
    )
    assert given == CalibrationConfig(iterations=2, lr_ratios=0.5, train_biases=False, lambda_r=1.0)
    assert {type(value) for value in given.to_dict().values()} == {int, float, bool, str}
    assert json.loads(json.dumps(given.to_dict())) == given.to_dict()


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("iterations", "500", "iterations='500' is not an integer"),
        ("iterations", 2.5, "iterations=2.5 is not an integer"),
        ("iterations", True, "iterations=True is not an integer"),
        ("iterations", None, "iterations=None is not an integer"),
        ("lr_ratios", float("nan"), "lr_ratios=nan is not a finite number"),
        ("lr_ratios", float("inf"), "lr_ratios=inf is not a finite number"),
        ("lr_ratios", "0.05", "lr_ratios='0.05' is not a finite number"),
        ("train_biases", 1, "train_biases=1 is neither True nor False"),
        ("optimizer", 3, "optimizer=3 is not a word"),
        ("seed", -1, "seed=-1 is outside 0"),
        ("seed", 2**32, "seed=4294967296 is outside 0"),
        ("iterations", 0, "iterations=0 must be positive"),
        ("checkpoint_every", -5, "checkpoint_every=-5"),
        ("smoothing", 1.5, "smoothing=1.5"),
        ("lambda_r", -1.0, "lambda_r=-1.0"),
    ],
)
def test_what_a_setting_cannot_be_is_said_with_its_name(setting, value, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**{setting: value})


def test_guidance_is_on_but_for_a_scale_of_one():
    assert [SamplingConfig(guidance_scale=g).guided for g in (0.5, 1.0, 1.5)] == [True, False, True]
    assert not CalibrationConfig(guidance_scale=1).guided
