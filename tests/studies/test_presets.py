import dataclasses
import json
import math

import pytest

from vqlib.config import RECIPES, CalibrationConfig
from vqlib.evaluation.references import reference_of
from vqlib.models import pipeline
from vqlib.models.geometry import Geometry
from vqlib.studies.presets import PRESETS, preset

TEXT_TO_IMAGE = {"pixart-sigma-xl-1024": 20, "sd3.5-medium": 40, "flux.1-dev": 28}


def test_every_preset_has_the_papers_calibration_and_its_own_name():
    assert list(PRESETS) == [
        f"{model}-w{bits}"
        for model in (
            "dit-xl-2-256",
            "dit-xl-2-512",
            "dit-mini-fashion",
            "sit-mini-emoji",
            "sit-xl-2-256",
            *TEXT_TO_IMAGE,
        )
        for bits in (2, 3, 4)
    ]
    for name, job in PRESETS.items():
        assert job.name == name and name.endswith(f"-w{job.vq.bits}")
        if name.rpartition("-")[0] in TEXT_TO_IMAGE:
            assert job.calibration.steps == job.sampling.steps == TEXT_TO_IMAGE[name.rpartition("-")[0]]
            continue
        assert job.calibration.replace(checkpoint_every=100) == CalibrationConfig()
        assert job.vq.candidates == 3 and job.sampling.guidance_scale == 1.5 and job.sampling.steps == 50


def test_expected_sizes_are_the_papers():
    assert round(preset("dit-xl-2-256-w2").sizes.total, 2) == 162.08
    assert round(preset("dit-xl-2-256-w3").sizes.total, 2) == 241.14
    assert preset("dit-xl-2-512-w2").sizes == preset("dit-xl-2-256-w2").sizes


def test_quoted_figures_come_with_their_source_and_unknown_ones_stay_unknown():
    quoted = preset("dit-xl-2-256-w2").quoted
    assert quoted["fid"] == 12.42 and quoted["mark"] == "third-party" and math.isnan(quoted["timesteps"])
    assert preset("dit-xl-2-512-w2").quoted["fid"] == 35.08
    assert preset("dit-xl-2-256-w3").quoted is None and preset("dit-mini-fashion-w2").quoted is None


def test_the_figure_expected_is_the_readmes_and_goes_with_its_settings():
    readme = (pipeline.DATA.parent / "README.md").read_text()
    for name, row in (
        ("paper", "| 2 | VQ4DiT, recipe `paper` (n = 3) |"),
        ("best", "| 2 | VQ4DiT, recipe `best` (n = 2) |"),
    ):
        job = preset("dit-mini-fashion-w2")
        job = dataclasses.replace(job, vq=RECIPES[name].vq, calibration=RECIPES[name].calibration)
        line = next(line for line in readme.splitlines() if line.startswith(row))
        assert f"FD-5k (fashion) {line.split('|')[4].strip()}," in job.expected
    assert preset("dit-mini-fashion-w2").expected == RECIPES["paper"].expected
    changed = preset("dit-mini-fashion-w2").with_settings({"calibration.iterations": 20})
    others = [changed, preset("dit-mini-fashion-w3"), preset("dit-xl-2-256-w2")]
    assert [job.expected for job in others] == [""] * 3


@pytest.mark.parametrize("model", [pipeline.BUNDLED, pipeline.BUNDLED_FLOW])
def test_the_bundled_presets_have_the_bundled_geometry_and_reference(model):
    config = json.loads((pipeline.DATA / model / "transformer" / "config.json").read_text())
    job = preset(f"{model}-w2")
    assert job.geometry == Geometry.of(config) and job.reference == reference_of(model)


def test_settings_are_changed_by_their_dotted_names():
    job = preset("dit-xl-2-256-w2").with_settings({"calibration.iterations": 20, "vq.k": 64, "vq.d": 2, "images": 500})
    assert job.calibration == preset("dit-xl-2-256-w2").calibration.replace(iterations=20)
    assert (job.vq.bits, job.vq.k, job.vq.d, job.images) == (3, 64, 2, 500)
    assert preset("dit-xl-2-256-w2").with_settings({"vq.bits": 4}).vq.k == 256


@pytest.mark.parametrize("key", ["iterations", "calibration.steep", "pipe.model", "name"])
def test_unknown_settings_are_named(key):
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        preset("dit-mini-fashion-w2").with_settings({key: 1})


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="'dit-xl-2' is not one of dit-xl-2-256-w2"):
        preset("dit-xl-2")


@pytest.mark.parametrize(
    "images, message", [("many", "images='many' is not an integer"), (-3, "images=-3 must be 0 or more")]
)
def test_a_count_that_is_none_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        preset("dit-mini-fashion-w2").with_settings({"images": images})
