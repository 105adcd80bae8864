"""Rows are made once, shared between groups, and kept apart by everything they depend on."""

import dataclasses

import pytest
import tiny
import torch

from vqlib.config import RECIPES, CalibrationConfig, SamplingConfig, VQConfig
from vqlib.studies import experiments, few_bits, row_tasks
from vqlib.studies.ablation_settings import SCOPES, Setting, standard_settings, sweep_settings
from vqlib.studies.ablations import Ablation

GEOMETRY = VQConfig(k=16, d=4, candidates=2, kmeans_iterations=3)
SHORT = CalibrationConfig(iterations=1, batch_size=2, steps=2)
SETTING = Setting("a", "n = 2", GEOMETRY, SHORT)


@pytest.fixture
def study(tmp_path):
    return Ablation(
        tiny.pipeline(), tmp_path, images=140, sampling=SamplingConfig(steps=1), reference="fashion-mnist-test"
    )


def test_a_finished_row_is_read_and_shared_by_groups(study, monkeypatch):
    assert study.finished(SETTING, 0) is None
    first = study.row(SETTING, 0)
    monkeypatch.setattr(experiments, "packed_model", lambda *a: pytest.fail("made again"))
    other_group = Setting("b", "base", GEOMETRY, SHORT.replace(seed=7))  # the row's seed counts, not this one
    assert study.row(SETTING, 0) == study.finished(other_group, 0) == first
    table = study.table([SETTING, other_group], [0, 1])
    assert table[["group", "setting", "seed"]].values.tolist() == [["a", "n = 2", 0], ["b", "base", 0]]
    assert table["fd"].tolist() == [first["metrics"]["fd"]] * 2
    assert study.finished(SETTING, 1) is None


def test_a_table_of_nothing_finished_is_empty(study):
    assert len(study.table([SETTING], [0])) == 0


@pytest.mark.parametrize(
    "change", [{"vq": GEOMETRY.replace(candidates=1)}, {"calibration": SHORT.replace(lambda_r=0.5)}]
)
def test_rows_of_other_settings_are_other_rows(study, change, monkeypatch):
    monkeypatch.setattr(row_tasks.Evaluated, "after", lambda self: ())
    monkeypatch.setattr(row_tasks.Evaluated, "run", lambda *_: {"made": True})
    assert study.row(SETTING, 0) == study.finished(SETTING, 0) == {"made": True}
    other = Setting("a", "n = 2", **({"vq": GEOMETRY, "calibration": SHORT} | change))
    assert study.finished(other, 0) is None


def test_the_standard_settings_hold_every_recipe_at_both_scopes_and_change_one_thing_at_a_time():
    base, vq = CalibrationConfig(iterations=7), VQConfig(candidates=3)
    settings = standard_settings(vq, base, distillation=9)
    assert len({(s.group, s.name) for s in settings}) == len(settings)
    assert all(s.vq.bits == 2 for s in settings)
    by_group = {}
    for setting in settings:
        by_group.setdefault(setting.group, {})[setting.name] = setting
    for scope, group in SCOPES.items():
        found = by_group[group]
        distilled = "best, n = 2, distilled"
        names = ["k-means", *(f"paper, n = {n}" for n in (1, 2, 3, 4)), "release, n = 2"]
        assert [name for name in found if "iterations" not in name] == [*names, "best, n = 1", "best, n = 2", distilled]
        assert {s.vq.codebook_scope for s in found.values()} == {scope}
        assert {s.calibration.iterations for n, s in found.items() if s.calibration and "iterations" not in n} == {7}
        released, best = found["release, n = 2"], found["best, n = 2"]
        assert (released.vq.candidates, released.vq.ratio_start) == (2, "distance")
        assert best.calibration == RECIPES["best"].calibration.replace(iterations=7)
        assert best.vq == RECIPES["best"].vq.replace(codebook_scope=scope)
        assert [name for name, s in found.items() if s.distillation] == [distilled]
        assert found[distilled].distillation == RECIPES["best"].distillation.replace(iterations=9)
        assert found[distilled].calibration == best.calibration
        assert found[distilled].vq == best.vq.replace(codebook_dtype="float16")
    best = by_group["a codebook per layer"]["best, n = 2"]
    shape = {"codebook_scope", "candidates"}
    pieces = {
        "best: assignments": {"assignment", "ratio_start", "candidates"},
        "best: ratio start": {"ratio_start"},
        "best: hardening": {"ratio_loss_when", "freeze_rule"},
        "paper: k, d at 2 bits": {"k", "d"},
        "paper: ratio start, ratio loss": {"ratio_start", "ratio_loss"},
        "paper: block inputs": {"block_inputs"},
        "paper: calibration inputs": {"inputs"},
        "paper: n, codebook per layer": {"candidates"},
        "paper: n, one codebook": shape,
        "mean loss: n, codebook per layer": shape | {"block_loss"},
        "mean loss: n, one codebook": shape | {"block_loss"},
        "λ_r, codebook per layer": shape | {"lambda_r", "block_loss"},
        "λ_r, one codebook": shape | {"lambda_r", "block_loss"},
        "codebook rate, one codebook": shape | {"lr_codebooks"},
        "iterations, one codebook": shape | {"iterations"},
        "trained at n = 1, one codebook": shape | {"train_codebooks", "train_biases"},
    }
    stages = by_group.pop("best: last stage")
    distilled = by_group["a codebook per layer"]["best, n = 2, distilled"]
    assert {(s.vq, s.calibration) for s in stages.values()} == {(distilled.vq, distilled.calibration)}
    assert stages.pop("none").distillation is None
    whole = dataclasses.asdict(distilled.distillation)
    changed = [{k for k, v in dataclasses.asdict(s.distillation).items() if v != whole[k]} for s in stages.values()]
    assert changed == [{"lr_latents"}, set(), {"path"}, {"loss_at"}]
    assert set(pieces) == by_group.keys() - set(SCOPES.values())
    for group, allowed in pieces.items():
        start = (best.calibration, best.vq) if group.startswith("best") else (base, vq)
        own, tried = allowed - shape or allowed, set()
        for setting in by_group[group].values():
            pairs = ((setting.calibration, start[0]), (setting.vq, start[1]))
            changed = {k for new, old in pairs for k, v in dataclasses.asdict(new).items() if v != getattr(old, k)}
            assert changed <= allowed, (setting, changed)
            tried |= changed & own
        assert tried == own, group  # every field that the group is about is changed somewhere in it


def test_what_is_distilled_is_the_row_of_the_study_of_few_bits():
    plain, whole = standard_settings(), standard_settings(distillation=RECIPES["best"].distillation.iterations)
    assert whole[: len(plain)] == plain and not any(s.distillation for s in plain)
    settings = {(s.group, s.name): s for s in whole}
    rows = {(c.codes, c.last): c.method(2) for c in few_bits.choices() if c.group == few_bits.OURS}
    for scope, codes in (("layer", "k 256, d 4"), ("model", "k 256, d 4, one codebook")):
        assert settings[SCOPES[scope], "best, n = 2, distilled"].method(2) == rows[codes, few_bits.MOVING]
    assert settings["best: last stage", "none"].method(2) == rows["k 256, d 4", few_bits.NONE]


def test_settings_of_one_step_are_settings_too():
    settings = standard_settings(base=CalibrationConfig(iterations=1))
    assert {s.name for s in settings if s.group == "iterations, one codebook"} == {
        f"n = {n}, {i}" for n in (1, 3) for i in (1, 2)
    }


def test_where_n_1_and_n_3_are_compared_each_condition_has_both():
    settings = standard_settings(VQConfig(candidates=3), CalibrationConfig(iterations=8))
    for group in ("codebook rate, one codebook", "iterations, one codebook"):
        found = [s for s in settings if s.group == group]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        assert len(pairs) in (2, 3)
        for one, three in pairs:
            assert one.calibration == three.calibration and one.vq.replace(candidates=3) == three.vq
    for group, scope in (("λ_r, codebook per layer", "layer"), ("λ_r, one codebook", "model")):
        several = [s.calibration for s in settings if s.group == group and s.vq.candidates == 3]
        weights = [(c.block_loss, c.lambda_r) for c in several]
        assert weights == [("sum", 1.0), *(("mean", w) for w in (1e-3, 1e-2, 1.0))]
        assert {s.vq.codebook_scope for s in settings if s.group == group} == {scope}


def test_a_sweep_has_every_setting_with_every_seed_and_nobody_keeps_the_list(study):
    base = CalibrationConfig(iterations=7, checkpoint_every=3)
    settings = sweep_settings((2, 3), (1, 2), "paper", base)
    assert [(s.group, s.name, s.vq.bits, s.vq.candidates) for s in settings] == [
        (f"{b} bits", f"n = {n}", b, n) for b in (2, 3) for n in (1, 2)
    ]
    assert {s.calibration for s in settings} == {base}
    best = sweep_settings((2,), (3,))[0]
    assert (best.vq, best.calibration) == (RECIPES["best"].vq.replace(candidates=3), RECIPES["best"].calibration)
    tasks = study.tasks(settings, range(3))
    found = [(task.made.method.vq, task.made.method.seed) for task in tasks]
    assert found == [(s.vq, seed) for s in settings for seed in range(3)] and len(list(tasks)) == 12
    assert tasks is not iter(tasks)


def test_rows_of_a_cluster_are_those_of_its_device_and_ask_for_it(study):
    there = dataclasses.replace(study, device="NVIDIA H100")
    here, far = study.task(SETTING, 0), there.task(SETTING, 0)
    assert (here.needs.gpus, far.needs.gpus) == (0, 1) and here.made_of() != far.made_of()
    assert 512 << 20 < far.needs.memory <= here.needs.memory < 1 << 30
    wide = dataclasses.replace(SETTING, calibration=SHORT.replace(batch_size=16384))
    assert study.task(wide, 0).needs.memory > 2 << 30  # 2 · 16384 rows of 16 · 32 numbers, 34 of these and more
    last = CalibrationConfig(block_inputs="end-to-end", loss_at="output", batch_size=16384)
    method = dataclasses.replace(here.made.method, distillation=last)
    assert dataclasses.replace(here.made, method=method).needs.memory > 4 << 30  # as many rows, both blocks' graphs
    assert here.made.made_of() == far.made.made_of()  # the model is one


def test_features_that_were_lost_are_made_again_and_leave_nothing_behind(study):
    study.row(SETTING, 0)
    before = study.task(SETTING, 0).features(study.folder)
    for path in (study.folder / "features").iterdir():
        path.unlink()
    assert torch.equal(study.task(SETTING, 0).features(study.folder), before)
    assert not list(study.folder.rglob("unfinished/*"))
