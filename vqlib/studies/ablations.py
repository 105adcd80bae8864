"""Ablations: rows of one model, a named setting and a seed each; finished rows are kept.

A row is one JSON file named by everything it depends on. Two groups that hold the same setting share its row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from vqlib.calibrator.hessians import BATCHES
from vqlib.calibrator.runs import read_records
from vqlib.config import SamplingConfig
from vqlib.evaluation.references import load_reference
from vqlib.models.pipeline import Pipeline
from vqlib.packed.checkpoint import size_report
from vqlib.studies.ablation_settings import Setting
from vqlib.studies.experiments import content_key, measure, packed_model, reference_fingerprint
from vqlib.system.files import write_bytes
from vqlib.system.fingerprint import fingerprint
from vqlib.system.memory import device_label


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
        rows, seeds = [], list(seeds)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {seeds} repeat: a spread over them would be too small")
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
        return {
            "device": device_label(self.pipe.device),
            "source": source,
            "vae": vae,
            "reference": reference_fingerprint(load_reference(self.reference)),
        }

    def _conditions(self, setting: Setting, seed: int) -> dict:
        calibration = setting.calibration and setting.calibration.replace(seed=seed).to_dict()
        model = {"source": self._shared["source"], "vq": setting.vq.to_dict(), "calibration": calibration, "seed": seed}
        if setting.vq.assignment == "error-feedback":
            model["hessian_batches"] = BATCHES
        measured = {"images": self.images, "sampling": self.sampling.to_dict()} | self._shared
        return {"model": model, "measured": measured}

    def _path(self, conditions: dict) -> Path:
        return self.folder / "finished" / f"{content_key(conditions)}.json"


def summary(table: pd.DataFrame, quality: str = "fd") -> pd.DataFrame:
    """Mean and standard deviation over seeds of `quality` by group and setting, in the table's order; NaN with one seed."""
    found = table.groupby(["group", "setting"], sort=False)[quality].agg(["mean", "std", "count"]).reset_index()
    return found.rename(columns={"count": "seeds"})
