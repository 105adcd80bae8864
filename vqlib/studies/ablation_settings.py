"""The settings of the ablations: named, in groups, each a small change of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vqlib.config import RATIO_STARTS, RECIPES, CalibrationConfig, VQConfig
from vqlib.studies.experiments import VectorQuantized

SCOPES = {"layer": "a codebook per layer", "model": "one codebook for all layers"}
BEST = RECIPES["best"]
HALF = {"codebook_dtype": "float16"}  # what is distilled is stored as in the study of few bits, whose rows it shares
K_D_AT_2_BITS = ((4, 1), (16, 2), (64, 3), (256, 4))


@dataclass(frozen=True)
class Setting:
    """One point of an ablation; `calibration` None is k-means alone, `distillation` the last stage, None for none.

    The seed of a row replaces the settings' own.
    """

    group: str
    name: str
    vq: VQConfig
    calibration: CalibrationConfig | None
    distillation: CalibrationConfig | None = None

    def method(self, seed: int) -> VectorQuantized:
        """Codes, calibration and last stage of that seed."""
        return VectorQuantized(self.vq, self.calibration, distillation=self.distillation).seeded(seed)


def standard_settings(
    vq: VQConfig | None = None, base: CalibrationConfig | None = None, distillation: int | None = None
) -> list[Setting]:
    """The recipes side by side at every n and codebook scope, then the pieces of each changed alone, then the conditions
    under which n = 1 and n = 3 of recipe `paper` could change places.

    vq, base: bits, (k, d), k-means and iterations, batch, steps of all settings (n = 3, recipe `paper` unless given).
    distillation: iterations of recipe `best`'s last stage, whose settings come after the others; None leaves them out.
    """
    vq, base = vq or VQConfig(), base or CalibrationConfig()
    known = [*_recipes(vq, base), *_pieces_of_best(vq, base), *_pieces_of_paper(vq, base), *_one_or_three(vq, base)]
    return known if distillation is None else [*known, *_distilled(vq, base, BEST.last(base, iterations=distillation))]


def sweep_settings(
    bits: Iterable[int], candidates: Iterable[int], name: str = "best", base: CalibrationConfig | None = None
) -> list[Setting]:
    """A recipe at every number of bits (a group each) and of candidates; `base`: length, batch and trajectory of all."""
    recipe, base, candidates = RECIPES[name], base or CalibrationConfig(), list(candidates)
    return [
        Setting(f"{b} bits", f"n = {n}", recipe.codes(VQConfig(bits=b), candidates=n), recipe.run(base))
        for b in bits
        for n in candidates
    ]


def _recipes(vq: VQConfig, base: CalibrationConfig) -> Iterator[Setting]:
    release = RECIPES["release"]
    for scope, group in SCOPES.items():
        scoped = vq.replace(codebook_scope=scope)
        yield Setting(group, "k-means", scoped.replace(candidates=1), None)
        for n in (1, 2, 3, 4):
            yield Setting(group, f"paper, n = {n}", scoped.replace(candidates=n), base)
        yield Setting(group, "release, n = 2", release.codes(scoped), release.run(base))
        for n in (1, 2):
            yield Setting(group, f"best, n = {n}", BEST.codes(scoped, candidates=n), BEST.run(base))
    longer = round(1.4 * base.iterations)  # more minutes than n = 2 takes
    alone = BEST.codes(vq, candidates=1)
    yield Setting(SCOPES["layer"], f"best, n = 1, {longer} iterations", alone, BEST.run(base, iterations=longer))


def _pieces_of_best(vq: VQConfig, base: CalibrationConfig) -> Iterator[Setting]:
    for name, how in {"nearest": {"assignment": "nearest", "ratio_start": "least-squares"}, "feedback": {}}.items():
        for n in (1, 2):
            yield Setting("best: assignments", f"{name}, n = {n}", BEST.codes(vq, candidates=n, **how), BEST.run(base))
    for start in RATIO_STARTS:
        yield Setting("best: ratio start", start, BEST.codes(vq, ratio_start=start), BEST.run(base))
    hardening = {
        "by timetable": {},
        "Eq. 9, threshold": {"ratio_loss_when": "always", "freeze_rule": "threshold"},
        "timetable, Eq. 9": {"ratio_loss_when": "always"},
    }
    for name, changes in hardening.items():
        yield Setting("best: hardening", name, BEST.codes(vq), BEST.run(base, **changes))


def _pieces_of_paper(vq: VQConfig, base: CalibrationConfig) -> Iterator[Setting]:
    for k, d in K_D_AT_2_BITS if vq.bits == 2 else ():
        yield Setting("paper: k, d at 2 bits", f"{k}, {d}", vq.replace(k=k, d=d), base)
    for start in ("equal", "distance"):
        for loss in ("absolute", "quadratic"):
            changed = vq.replace(ratio_start=start), base.replace(ratio_loss=loss)
            yield Setting("paper: ratio start, ratio loss", f"{start}, {loss}", *changed)
    for inputs in ("full", "student", "end-to-end"):
        yield Setting("paper: block inputs", inputs, vq, base.replace(block_inputs=inputs))
    for inputs in ("trajectory", "noise"):
        yield Setting("paper: calibration inputs", inputs, vq, base.replace(inputs=inputs))


def _one_or_three(vq: VQConfig, base: CalibrationConfig) -> Iterator[Setting]:
    """Recipe `paper` with n = 1 and n = 3 under other weights, rates and lengths, and with more candidates."""
    for scope, where in (("layer", "codebook per layer"), ("model", "one codebook")):
        scoped, group = vq.replace(codebook_scope=scope), f"λ_r, {where}"
        for n in (1, 2, 3, 4):
            yield Setting(f"paper: n, {where}", str(n), scoped.replace(candidates=n), base)
        for n in (1, 2, 3, 4):  # n = 1 has no ratio loss to weigh
            mean = base.replace(block_loss="mean")
            yield Setting(f"mean loss: n, {where}", str(n), scoped.replace(candidates=n), mean if n > 1 else base)
        yield Setting(group, "n = 1", scoped.replace(candidates=1), base)
        yield Setting(group, "sum, 1", scoped, base)
        for weight in (1e-3, 1e-2, 1.0):
            yield Setting(group, f"mean, {weight:g}", scoped, base.replace(lambda_r=weight, block_loss="mean"))
    alone, three = (vq.replace(codebook_scope="model", candidates=n) for n in (1, vq.candidates))
    for rate in (1e-4, 1e-3):
        for shape in (alone, three):
            changed = base.replace(lr_codebooks=rate)
            yield Setting("codebook rate, one codebook", f"n = {shape.candidates}, {rate:g}", shape, changed)
    for iterations in sorted({max(1, base.iterations // 4), base.iterations, 2 * base.iterations}):
        for shape in (alone, three):
            changed = base.replace(iterations=iterations)
            yield Setting("iterations, one codebook", f"n = {shape.candidates}, {iterations}", shape, changed)
    trained = {"all": {}, "no biases": {"train_biases": False}, "biases alone": {"train_codebooks": "never"}}
    for name, changes in trained.items():
        yield Setting("trained at n = 1, one codebook", name, alone, base.replace(**changes))


def _distilled(vq: VQConfig, base: CalibrationConfig, last: CalibrationConfig) -> Iterator[Setting]:
    """Recipe `best` with its last stage at both scopes, and what of the stage is changed."""
    for scope, group in SCOPES.items():
        codes = BEST.codes(vq.replace(codebook_scope=scope), **HALF)
        yield Setting(group, "best, n = 2, distilled", codes, BEST.run(base), last)
    stages = {
        "none": None,
        "codes stay": last.replace(lr_latents=0.0),
        "codes move": last,
        "teacher's path": last.replace(path="teacher"),
        "guided output": last.replace(loss_at="guided"),
    }
    for name, stage in stages.items():
        yield Setting("best: last stage", name, BEST.codes(vq, **HALF), BEST.run(base), stage)
