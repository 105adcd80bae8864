"""VQ4DiT workbench: post-training vector quantization of Diffusion Transformers (arXiv 2408.17131).

weights -> codebook -> candidates -> calibrate -> checkpoint -> sample -> evaluate -> figure / table
"""

from vqlib.system import compat  # noqa: F401, isort: skip, first: torchvision beside a CPU build of torch
from vqlib.calibrator.calibrate import Calibration, calibrate
from vqlib.calibrator.distill import distill
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.runs import Record, read_records
from vqlib.config import RECIPES, CalibrationConfig, SamplingConfig, VQConfig, recipe, recipe_distillation, recipe_vq
from vqlib.evaluation.evaluate import Metrics, evaluate
from vqlib.evaluation.frechet import frechet_distance
from vqlib.kernels import assign, nearest
from vqlib.kernels.bits import pack_codes, unpack_codes
from vqlib.models.denoiser import Denoiser
from vqlib.models.modulation import cached_modulation
from vqlib.models.pipeline import Pipeline, load
from vqlib.models.prompts import Prompts
from vqlib.models.sampling import sample
from vqlib.packed.checkpoint import CheckpointError, load_transformer, save, size_report
from vqlib.packed.harden import harden, reconstruction_error, soften
from vqlib.packed.layer import VQLinear
from vqlib.packed.modes import set_mode
from vqlib.quantizer.codebook import Codebook, fit_codebook
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear
from vqlib.studies.estimate import Estimate, estimate
from vqlib.studies.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "RECIPES",
    "Calibration",
    "CalibrationConfig",
    "CandidateLinear",
    "CheckpointError",
    "Codebook",
    "Denoiser",
    "Estimate",
    "Metrics",
    "Pipeline",
    "Prompts",
    "Record",
    "SamplingConfig",
    "VQConfig",
    "VQLinear",
    "assign",
    "cached_modulation",
    "calibrate",
    "distill",
    "estimate",
    "evaluate",
    "fit_codebook",
    "frechet_distance",
    "harden",
    "input_hessians",
    "load",
    "load_transformer",
    "nearest",
    "pack_codes",
    "preset",
    "quantize",
    "read_records",
    "recipe",
    "recipe_distillation",
    "recipe_vq",
    "reconstruction_error",
    "sample",
    "save",
    "set_mode",
    "size_report",
    "soften",
    "unpack_codes",
]
