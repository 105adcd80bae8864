"""Output distillation, the last stage: codebooks, scales and biases trained on the full-precision model's own output.

Block-wise calibration makes every block's error small by itself; how the errors of all blocks meet in the output it does
not see. Here the student runs end to end, no image seen, and one squared difference is all that is learned from: with
path="teacher" that of the two outputs (ε and v) at the teacher's x_t; with path="student", as in `recipe_distillation("best")`,
that of the signals √ᾱ x̂₀ = x − σ ε, the student at its own x_t, the teacher at its own, from the same noise. With
loss_at="guided" the conditional and the unconditional half count as guidance joins them, at the settings' scale. Assignments
stay as they are or, with `lr_latents`, follow latent weights that are trained straight through the choice of the nearest codeword.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vqlib.calibrator.calibrate import Calibration
from vqlib.config import CalibrationConfig, recipe_distillation
from vqlib.models.pipeline import Pipeline
from vqlib.packed.harden import harden, soften
from vqlib.quantizer.latent import with_latents
from vqlib.quantizer.soft import soft_layers


def distill(
    pipe: Pipeline, model: nn.Module, config: CalibrationConfig | None = None, out: str | Path | None = None
) -> Calibration:
    """A run that distills `pipe.transformer`'s output into `model`; iterate for Records, then `.finish()`, as `calibrate`'s.

    model: a packed transformer, or a calibrated student, whose winners become assignments first; neither is changed.
    config: `recipe_distillation("best")` unless given. `out`, resuming and errors are those of `calibrate`; ValueError also where
    the settings do not compare outputs.
    """
    config = config or recipe_distillation("best")
    require_on_output(config)
    student = soften(harden(model) if soft_layers(model) else model)
    return Calibration(pipe, with_latents(student) if config.lr_latents else student, config, out)


def require_on_output(config: CalibrationConfig) -> None:
    """ValueError for settings that do not compare outputs."""
    if not config.on_output:
        raise ValueError(
            f"loss_at={config.loss_at!r}: distillation compares the models' outputs, loss_at='output' or 'guided'"
        )
