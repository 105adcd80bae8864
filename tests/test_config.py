import pytest

from vqlib.config import RECIPE_VQ, RECIPES, CalibrationConfig, VQConfig, recipe, recipe_vq


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
    ],
)
def test_impossible_geometry_is_refused_with_the_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**settings)


def test_every_recipe_survives_a_round_trip_through_a_dict():
    for settings in RECIPES.values():
        assert CalibrationConfig.from_dict(settings.to_dict()) == settings


def test_every_recipe_has_its_candidates_and_start_at_any_bits():
    assert set(RECIPES) == set(RECIPE_VQ)
    assert recipe_vq("best", 3) == VQConfig(bits=3, candidates=2, ratio_start="leading", assignment="error-feedback")
    assert recipe_vq("paper", candidates=5) == VQConfig(bits=2, candidates=5)
    with pytest.raises(ValueError, match="recipe 'papr' is not one of"):
        recipe_vq("papr")


def test_the_paper_weighs_the_squared_norm_and_the_release_the_mean():
    assert {name: settings.block_loss for name, settings in RECIPES.items()} == {
        "paper": "sum",
        "release": "mean",
        "best": "sum",
    }
    assert RECIPES["paper"] == CalibrationConfig()
    with pytest.raises(ValueError, match=r"block_loss='norm' is not one of \('mean', 'sum'\)"):
        CalibrationConfig(block_loss="norm")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="recipe 'papr' is not one of"):
        recipe("papr")
    with pytest.raises(ValueError, match="no setting iteration"):
        CalibrationConfig.from_dict({"iteration": 3})
    with pytest.raises(ValueError, match="loss_at='output'"):
        CalibrationConfig(loss_at="output")


def test_a_setting_added_later_leaves_names_of_what_was_made_before_it_as_they_are():
    assert "products" not in CalibrationConfig().to_dict() and "lr_ratios" in CalibrationConfig().to_dict()
    changed = CalibrationConfig(products="bfloat16")
    assert changed.to_dict()["products"] == "bfloat16" and CalibrationConfig.from_dict(changed.to_dict()) == changed
    assert CalibrationConfig.from_dict(CalibrationConfig().to_dict()) == CalibrationConfig()
