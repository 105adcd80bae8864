"""The making of a table's rows: each method's transformer, measured once, locked while it is being made."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from vqlib.calibrator.hessians import input_hessians
from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig, recipe, recipe_vq
from vqlib.evaluation.references import load_reference
from vqlib.models import pipeline
from vqlib.models.pipeline import Pipeline
from vqlib.studies.baselines.baseline import Baseline, full_precision, packed
from vqlib.studies.baselines.gptq import gptq
from vqlib.studies.baselines.round_to_nearest import round_to_nearest
from vqlib.studies.experiments import content_key, measure, packed_model, reference_fingerprint
from vqlib.studies.paper_table import FULL_PRECISION, PAPER
from vqlib.studies.table_rows import Row, TableConfig
from vqlib.system.files import write_bytes
from vqlib.system.fingerprint import fingerprint
from vqlib.system.memory import device_label

GROUP_SIZES = {2: 32, 3: 64, 4: 64}  # bits -> weights a scale: uniform methods store at least as many bits as VQ


class Bench:
    """One process's work on a table: the model, and how each method's transformer is made from it.

    A pipeline that is not given is loaded, onto the GPU where there is one. Raises ValueError for an unknown method.
    """

    def __init__(self, config: TableConfig, folder: str | Path, pipe: Pipeline | None = None) -> None:
        for name in {row.method for row in config.rows()} - METHODS.keys():
            raise ValueError(f"method {name!r} is not one of {', '.join(METHODS)}")
        for row in config.rows():
            if row.method in ("RTN", "GPTQ") and row.bits not in GROUP_SIZES:
                raise ValueError(
                    f"{row.method} at {row.bits} bits: a group's size is known for {list(GROUP_SIZES)} bits"
                )
        self.config, self.folder = config, Path(folder)
        self.pipe = pipe or pipeline.load(config.model, device="auto")
        source = {"transformer": fingerprint(self.pipe.transformer), "vae": fingerprint(self.pipe.vae)}
        self._shared = (
            source
            | {"device": device_label(self.pipe.device)}
            | {"reference": reference_fingerprint(load_reference(config.reference))}
        )

    @cached_property
    def hessians(self) -> dict[str, Tensor]:
        """Second moments of the layers' inputs on the calibration trajectory; held on the model's device."""
        return input_hessians(self.pipe, self.settings, self.config.hessian_batches)

    @property
    def settings(self) -> CalibrationConfig:
        """Of every calibrated row but the paper's own."""
        return self._recipe(self.config.recipe)

    def _recipe(self, name: str) -> CalibrationConfig:
        return recipe(name, iterations=self.config.iterations, seed=self.config.seed)

    def build(self, row: Row) -> Baseline:
        """The row's transformer, made or loaded."""
        return METHODS[row.method](self, row.bits)

    def vq(self, method: str, bits: int) -> VQConfig:
        """The codes of a vector-quantized method: candidates and how they are found."""
        if method in (PAPER, "VQ4DiT"):
            return recipe_vq("paper" if method == PAPER else self.config.recipe, bits)
        return VQConfig(
            bits=bits, candidates=1, assignment="error-feedback" if method.startswith("GPTVQ") else "nearest"
        )

    def vector_quantized(self, method: str, bits: int, settings: CalibrationConfig | None = None) -> Baseline:
        """A packed model in a folder named by all it depends on; `settings` None: not calibrated."""
        vq = self.vq(method, bits)
        about = {"vq": vq.to_dict(), "settings": settings and settings.to_dict(), "seed": self.config.seed}
        feedback = {"inputs": self.settings.to_dict(), "hessian_batches": self.config.hessian_batches}
        about |= {"source": self._shared["transformer"]} | (feedback if vq.assignment == "error-feedback" else {})
        name = re.sub(r"[^a-z0-9]+", "-", f"{method} {vq.bits}bit".lower())
        folder = self.folder / "models" / f"{name}-{content_key(about)[:8]}"
        how = settings, folder, self.config.seed, self.settings, self.config.hessian_batches
        return packed(method, packed_model(self.pipe, vq, *how), about)

    def path(self, row: Row) -> Path:
        """The file of a finished row."""
        about = dataclasses.asdict(row) | self._shared
        own = ("guidance_scale", "bootstrap", "seed", "batch_size")
        about |= {name: getattr(self.config, name) for name in own}
        return self.folder / "rows" / f"{content_key(about | self._depends_on(row))}.json"

    def _depends_on(self, row: Row) -> dict:
        """What makes the row's transformer, besides the model: codes or groups, calibration, second moments."""
        if row.method in (FULL_PRECISION, "RTN, per channel"):
            return {}
        if row.method in ("RTN", "GPTQ"):
            found = {"group_size": GROUP_SIZES[row.bits]}
        else:
            found = {"vq": self.vq(row.method, row.bits).to_dict()}
        if row.method not in ("RTN", "k-means"):
            found["settings"] = self._recipe("paper" if row.method == PAPER else self.config.recipe).to_dict()
        if row.method == "GPTQ" or found.get("vq", {}).get("assignment") == "error-feedback":
            found["hessian_batches"] = self.config.hessian_batches
        return found

    def finished(self, row: Row) -> dict | None:
        """The stored row, None while it is missing."""
        path = self.path(row)
        return json.loads(path.read_text()) if path.exists() else None

    def make(self, row: Row) -> bool:
        """Make a row unless it is there or another process has it; whether it was made here."""
        path = self.path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if path.exists():
                    return False
                write_bytes(path, (json.dumps(self._measured(row), indent=2) + "\n").encode())
                return True
        except Timeout:
            return False

    def _measured(self, row: Row) -> dict:
        start, config = time.monotonic(), self.config
        baseline = self.build(row)
        sampling = SamplingConfig(row.steps, config.guidance_scale, batch_size=config.batch_size)
        what = self.pipe, baseline.model, row.images, self.folder / "metrics", sampling, config.reference
        metrics = measure(*what, bootstrap=config.bootstrap)
        found = {"row": dataclasses.asdict(row), "metrics": metrics.to_dict()}
        found |= {"minutes": (time.monotonic() - start) / 60}
        return found | {"bits_per_weight": baseline.bits_per_weight, "size_bytes": baseline.size_bytes}


def _calibrated(method: str, bench: Bench, bits: int) -> Baseline:
    return bench.vector_quantized(method, bits, bench.settings)


Method = Callable[[Bench, int | None], Baseline]
METHODS: dict[str, Method] = {
    FULL_PRECISION: lambda bench, bits: full_precision(bench.pipe.transformer),
    "RTN": lambda bench, bits: round_to_nearest(bench.pipe, bits, GROUP_SIZES[bits]),
    "RTN, per channel": lambda bench, bits: round_to_nearest(bench.pipe, bits),
    "GPTQ": lambda bench, bits: gptq(bench.pipe, bits, bench.hessians, GROUP_SIZES[bits]),
    "k-means": lambda bench, bits: bench.vector_quantized("k-means", bits),
    "GPTVQ-like": lambda bench, bits: bench.vector_quantized("GPTVQ-like", bits),
    PAPER: lambda bench, bits: bench.vector_quantized(PAPER, bits, bench._recipe("paper")),
} | {name: partial(_calibrated, name) for name in ("codebook only", "GPTVQ-like, calibrated", "VQ4DiT")}
