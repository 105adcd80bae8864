"""Rows are made once, shared between groups, and kept apart by everything they depend on."""

import pandas as pd
import pytest
import tiny

from vqlib import ablations
from vqlib.ablations import Ablation, Setting, standard_settings, summary
from vqlib.config import RECIPES, CalibrationConfig, SamplingConfig, VQConfig

GEOMETRY = VQConfig(k=16, d=4, candidates=2, kmeans_iterations=3)
SHORT = CalibrationConfig(iterations=1, batch_size=2, steps=2)
SETTING = Setting("a", "n = 2", GEOMETRY, SHORT)


@pytest.fixture
def study(tmp_path):
    return Ablation(tiny.pipeline(), tmp_path, images=140, sampling=SamplingConfig(steps=1))


def test_a_finished_row_is_read_and_shared_by_groups(study, monkeypatch):
    assert study.finished(SETTING, 0) is None
    first = study.row(SETTING, 0)
    monkeypatch.setattr(ablations, "packed_model", lambda *a: pytest.fail("made again"))
    other_group = Setting("b", "base", GEOMETRY, SHORT.replace(seed=7))  # the row's seed counts, not this one
    assert study.row(SETTING, 0) == study.finished(other_group, 0) == first
    table = study.table([SETTING, other_group], [0, 1])
    assert table[["group", "setting", "seed"]].values.tolist() == [["a", "n = 2", 0], ["b", "base", 0]]
    assert table["fd"].tolist() == [first["metrics"]["fd"]] * 2
    assert study.finished(SETTING, 1) is None


def test_a_table_of_nothing_finished_is_empty(study):
    assert len(study.table([SETTING], [0])) == 0


@pytest.mark.parametrize("change", [{"vq": GEOMETRY.replace(candidates=1)}, {"calibration": SHORT.replace(lambda_r=0.5)}])
def test_rows_of_other_settings_have_other_files(study, change):
    other = Setting("a", "n = 2", **({"vq": GEOMETRY, "calibration": SHORT} | change))
    assert study._path(study._conditions(other, 0)) != study._path(study._conditions(SETTING, 0))


def test_the_standard_settings_change_one_thing_at_a_time():
    base, vq = CalibrationConfig(iterations=7), VQConfig(candidates=3)
    settings = standard_settings(vq, base)
    assert len({(s.group, s.name) for s in settings}) == len(settings)
    by_group = {}
    for setting in settings:
        by_group.setdefault(setting.group, []).append(setting)
    assert [s.name for s in by_group["candidates, a codebook per layer"]] == ["k-means", "n = 1", "n = 2", "n = 3", "n = 4"]
    assert [s.name for s in by_group["recipe"]] == list(RECIPES)
    assert all(s.vq.bits == 2 for s in settings)
    for group in by_group.keys() - {"recipe"}:
        for setting in by_group[group]:
            changed = {k for k, v in (setting.calibration or base).to_dict().items() if v != base.to_dict()[k]}
            changed |= {k for k, v in setting.vq.to_dict().items() if v != vq.to_dict()[k]}
            assert len(changed - {"k", "d"}) <= 2, (setting, changed)
    released = next(s for s in by_group["recipe"] if s.name == "release")
    assert (released.vq.candidates, released.vq.ratio_start, released.calibration.iterations) == (2, "distance", 7)


def test_the_summary_is_over_seeds_and_keeps_the_order():
    table = pd.DataFrame({"group": "g", "setting": ["z", "z", "a"], "seed": [0, 1, 0], "fd": [1.0, 3.0, 5.0]})
    found = summary(table)
    assert found["setting"].tolist() == ["z", "a"] and found["mean"].tolist() == [2.0, 5.0]
    assert found["std"].iloc[0] == pytest.approx(2**0.5) and pd.isna(found["std"].iloc[1])
