"""Rows are made once, shared between groups, and kept apart by everything they depend on."""

import pytest
import tiny

from vqlib import ablations
from vqlib.ablations import SCOPES, Ablation, Setting, standard_settings
from vqlib.config import RECIPE_VQ, RECIPES, CalibrationConfig, SamplingConfig, VQConfig

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


def test_the_standard_settings_hold_every_recipe_at_both_scopes_and_change_one_thing_at_a_time():
    base, vq = CalibrationConfig(iterations=7), VQConfig(candidates=3)
    settings = standard_settings(vq, base)
    assert len({(s.group, s.name) for s in settings}) == len(settings)
    assert all(s.vq.bits == 2 for s in settings)
    by_group = {}
    for setting in settings:
        by_group.setdefault(setting.group, {})[setting.name] = setting
    for scope, group in SCOPES.items():
        found = by_group[group]
        names = ["k-means", *(f"paper, n = {n}" for n in (1, 2, 3, 4)), "release, n = 2"]
        assert [name for name in found if "steps" not in name] == [*names, *(f"best, n = {n}" for n in (1, 2, 3, 4))]
        assert {s.vq.codebook_scope for s in found.values()} == {scope}
        assert {s.calibration.iterations for n, s in found.items() if s.calibration and "steps" not in n} == {7}
        released, best = found["release, n = 2"], found["best, n = 2"]
        assert (released.vq.candidates, released.vq.ratio_start) == (2, "distance")
        assert best.calibration == RECIPES["best"].replace(iterations=7)
        assert best.vq == RECIPE_VQ["best"].replace(codebook_scope=scope)
    best = by_group["a codebook per layer"]["best, n = 2"]
    for group, found in by_group.items():
        if group in SCOPES.values():
            continue
        start = (best.calibration, best.vq) if group.startswith("best") else (base, vq)
        for setting in found.values():
            changed = {k for k, v in setting.calibration.to_dict().items() if v != start[0].to_dict()[k]}
            changed |= {k for k, v in setting.vq.to_dict().items() if v != start[1].to_dict()[k]}
            assert len(changed - {"k", "d"}) <= 2, (setting, changed)
