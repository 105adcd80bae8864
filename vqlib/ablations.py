"""Ablations: named settings in groups, each a small change of one base, measured for several seeds; finished rows are kept.

A row is one JSON file named by everything it depends on. Two groups that hold the same setting share its row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from vqlib.checkpoint import size_report
from vqlib.config import RECIPE_VQ, RECIPES, CalibrationConfig, SamplingConfig, VQConfig
from vqlib.experiments import content_key, measure, packed_model, reference_fingerprint
from vqlib.files import write_bytes
from vqlib.fingerprint import fingerprint
from vqlib.models import Pipeline
from vqlib.references import load_reference
from vqlib.runs import read_records

SCOPES = {"layer": "a codebook per layer", "model": "one codebook for all layers"}


@dataclass(frozen=True)
class Setting:
    """One point of an ablation; `calibration` None is k-means alone. The seed of a row replaces the calibration's own."""

    group: str
    name: str
    vq: VQConfig
    calibration: CalibrationConfig | None


def standard_settings(vq: VQConfig | None = None, base: CalibrationConfig | None = None) -> list[Setting]:
    """The recipes side by side at every n and codebook scope, then the pieces of each, changed alone.

    vq, base: bits, (k, d), k-means and iterations, batch, steps of all settings (n = 3, recipe `paper` unless given).
    """
    vq, base = vq or VQConfig(), base or CalibrationConfig()
    common = {name: getattr(base, name) for name in ("iterations", "steps", "checkpoint_every")}
    best, chosen = RECIPES["best"].replace(**common, batch_size=base.batch_size), RECIPE_VQ["best"]
    found = []

    def add(group: str, name: str, calibration: CalibrationConfig | None = base, **changes) -> None:
        found.append(Setting(group, name, vq.replace(**changes), calibration))

    def add_best(group: str, name: str, candidates: int = chosen.candidates, scope: str = "layer", start="", **changes):
        own = {"candidates": candidates, "ratio_start": start or chosen.ratio_start, "codebook_scope": scope}
        add(group, name, best.replace(**changes), **own)

    for scope, group in SCOPES.items():
        add(group, "k-means", None, codebook_scope=scope, candidates=1)
        for n in (1, 2, 3, 4):
            add(group, f"paper, n = {n}", codebook_scope=scope, candidates=n)
        released = {"candidates": RECIPE_VQ["release"].candidates, "ratio_start": RECIPE_VQ["release"].ratio_start}
        add(group, "release, n = 2", RECIPES["release"].replace(**common), codebook_scope=scope, **released)
        for n in (1, 2, 3, 4):
            add_best(group, f"best, n = {n}", n, scope)
    longer = round(1.4 * base.iterations)  # as many minutes as n = 2 takes
    add_best(SCOPES["layer"], f"best, n = 1, {longer} steps", 1, iterations=longer)
    for start in ("equal", "distance", "least-squares"):
        add_best("best: ratio start", start, start=start)
    add_best("best: hardening", "by timetable")
    add_best("best: hardening", "Eq. 9, threshold", ratio_loss_when="always", freeze_rule="threshold")
    add_best("best: hardening", "timetable, Eq. 9", ratio_loss_when="always")
    for k, d in ((4, 1), (16, 2), (64, 3), (256, 4)):
        if vq.bits == 2:
            add("paper: k, d at 2 bits", f"{k}, {d}", k=k, d=d)
    for start in ("equal", "distance"):
        for loss in ("absolute", "quadratic"):
            add("paper: ratio start, ratio loss", f"{start}, {loss}", base.replace(ratio_loss=loss), ratio_start=start)
    for weight in (0.01, 0.1, 1.0):
        add("paper: weight of the ratio loss", f"{weight:g}", base.replace(lambda_r=weight))
    for inputs in ("full", "student", "end-to-end"):
        add("paper: block inputs", inputs, base.replace(block_inputs=inputs))
    for inputs in ("trajectory", "noise"):
        add("paper: calibration inputs", inputs, base.replace(inputs=inputs))
    return found


@dataclass(frozen=True)
class Ablation:
    """Rows of one model under one way of measuring: `images` samples a row, the same sampling seeds in every row."""

    pipe: Pipeline
    folder: Path
    images: int
    sampling: SamplingConfig = SamplingConfig()
    reference: str | Path = "fashion-mnist-test"

    def row(self, setting: Setting, seed: int) -> dict:
        """The row of one setting and seed of codebooks and calibration; made where it is not finished."""
        found = self.finished(setting, seed)
        if found is not None:
            return found
        conditions = self._conditions(setting, seed)
        calibration = setting.calibration and setting.calibration.replace(seed=seed)
        place = self.folder / "models" / content_key(conditions["model"])
        packed = packed_model(self.pipe, setting.vq, calibration, place, seed)
        minutes = sum(r.seconds for r in read_records(place / "calibration")) / 60 if calibration else 0.0
        metrics = measure(self.pipe, packed, self.images, self.folder / "rows", self.sampling, self.reference)
        row = {"bits per weight": size_report(packed).attrs["bits_per_weight"], "minutes of calibration": minutes}
        row |= {"metrics": metrics.to_dict()}
        content = json.dumps({"conditions": conditions, "row": row}, indent=2) + "\n"
        write_bytes(self._path(conditions), content.encode())
        return row

    def finished(self, setting: Setting, seed: int) -> dict | None:
        """The row if it has been made."""
        path = self._path(self._conditions(setting, seed))
        return json.loads(path.read_text())["row"] if path.exists() else None

    def table(self, settings: Iterable[Setting], seeds: Iterable[int]) -> pd.DataFrame:
        """The finished rows: columns group, setting, seed, fd, accuracy, and the conditions that the rows do not share."""
        rows = []
        for setting in settings:
            for seed in seeds:
                found = self.finished(setting, seed)
                if found is not None:
                    row = {"group": setting.group, "setting": setting.name, "seed": seed}
                    row |= {name: found["metrics"][name] for name in ("fd", "accuracy", "precision", "recall")}
                    rows.append(row | {name: value for name, value in found.items() if name != "metrics"})
        return pd.DataFrame(rows, columns=["group", "setting", "seed", "fd"] if not rows else None)

    @cached_property
    def _shared(self) -> dict[str, str]:
        source, vae = fingerprint(self.pipe.transformer), fingerprint(self.pipe.vae)
        return {"source": source, "vae": vae, "reference": reference_fingerprint(load_reference(self.reference))}

    def _conditions(self, setting: Setting, seed: int) -> dict:
        calibration = setting.calibration and setting.calibration.replace(seed=seed).to_dict()
        model = {"source": self._shared["source"], "vq": setting.vq.to_dict(), "calibration": calibration, "seed": seed}
        measured = {"images": self.images, "sampling": self.sampling.to_dict()} | self._shared
        return {"model": model, "measured": measured}

    def _path(self, conditions: dict) -> Path:
        return self.folder / "finished" / f"{content_key(conditions)}.json"


def summary(table: pd.DataFrame, quality: str = "fd") -> pd.DataFrame:
    """Mean and standard deviation over seeds of `quality` by group and setting, in the table's order; NaN with one seed."""
    found = table.groupby(["group", "setting"], sort=False)[quality].agg(["mean", "std", "count"]).reset_index()
    return found.rename(columns={"count": "seeds"})
