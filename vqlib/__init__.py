"""VQ4DiT workbench: post-training vector quantization of Diffusion Transformers (arXiv 2408.17131).

    weights -> codebook -> candidates -> calibrate -> checkpoint -> sample -> evaluate -> figure / table
"""

from vqlib import _compat  # noqa: F401, first: torchvision beside a CPU build of torch
from vqlib.calibrate import Calibration, calibrate
from vqlib.checkpoint import CheckpointError, load_transformer, save, size_report
from vqlib.codebook import Codebook, fit_codebook
from vqlib.config import RECIPES, CalibrationConfig, SamplingConfig, VQConfig, recipe, recipe_vq
from vqlib.estimate import Estimate, estimate
from vqlib.evaluate import Metrics, evaluate
from vqlib.frechet import frechet_distance
from vqlib.hessians import input_hessians
from vqlib.inference import cached_modulation, set_mode
from vqlib.kernels import assign, nearest
from vqlib.layers import CandidateLinear, VQLinear
from vqlib.models import Pipeline, load
from vqlib.packing import pack_codes, unpack_codes
from vqlib.presets import PRESETS, preset
from vqlib.quantize import harden, quantize, reconstruction_error
from vqlib.runs import Record, read_records
from vqlib.sampling import sample

__all__ = [
    "PRESETS",
    "RECIPES",
    "Calibration",
    "CalibrationConfig",
    "CandidateLinear",
    "CheckpointError",
    "Codebook",
    "Estimate",
    "Metrics",
    "Pipeline",
    "Record",
    "SamplingConfig",
    "VQConfig",
    "VQLinear",
    "assign",
    "cached_modulation",
    "calibrate",
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
    "recipe_vq",
    "reconstruction_error",
    "sample",
    "save",
    "set_mode",
    "size_report",
    "unpack_codes",
]
