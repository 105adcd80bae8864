"""Minutes, memory and disk of a job before it starts, from a short probe of the same code on the same machine.

The first block of the model, or more where they are small, or seeded ones of its shape, are quantized, calibrated for a
few steps and run packed; the whole model takes as many times that as it has blocks. Not counted: loading, evaluation, a
download of weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch

from vqlib.calibrator.calibrate import Calibration
from vqlib.calibrator.distill import distill
from vqlib.calibrator.hessians import BATCHES, input_hessians
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.models.blueprint import Blueprint
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.flow import FlowMatching
from vqlib.models.geometry import MIB, Geometry
from vqlib.models.pipeline import Pipeline, device_of
from vqlib.models.sampling import DECODED_AT_ONCE
from vqlib.packed.harden import harden
from vqlib.quantizer.quantize import quantize
from vqlib.quantizer.soft import CandidateLinear
from vqlib.studies.job_memory import codebook_bytes, graph_bytes, packed_bytes, sampling_bytes, unquantized_bytes
from vqlib.studies.presets import Preset, preset

GIB = 2**30
PROBE_WEIGHTS = 30e6  # of the blocks tried; one block of DiT-XL/2 has 24 million
PROBE_ITERATIONS = 4  # of calibration; the first warms up
PROBE_FLOPS = {"cpu": 3e11, "cuda": 3e13}  # of one timed forward pass
SETTINGS = {"calibration": "calibration", "last stage": "distillation"}  # stage -> field of a preset


@dataclass(frozen=True)
class Estimate:
    """What a job will take, stage by stage: seconds, bytes of memory at the peak, bytes on disk at the peak."""

    job: str
    device: str
    seconds: dict[str, float]
    memory: dict[str, int]  # of the process on a CPU, of torch's allocator on a GPU
    disk: dict[str, int]

    @property
    def minutes(self) -> float:
        """Of all stages together."""
        return sum(self.seconds.values()) / 60

    @property
    def peak_memory(self) -> int:
        """Bytes at the peak of all stages."""
        return max(self.memory.values())

    def table(self) -> pd.DataFrame:
        """One row per stage and one for the whole job: minutes, memory in GiB, disk in MiB."""
        rows = [(name, self.seconds[name], self.memory[name], self.disk[name]) for name in self.seconds]
        rows.append(("whole job", sum(self.seconds.values()), self.peak_memory, sum(self.disk.values())))
        columns = ["stage", "minutes", "memory GiB", "disk MiB"]
        return pd.DataFrame([(name, s / 60, m / GIB, d / MIB) for name, s, m, d in rows], columns=columns)

    def __str__(self) -> str:
        formats = dict.fromkeys(("minutes", "memory GiB"), "{:.2f}".format) | {"disk MiB": "{:.1f}".format}
        return f"{self.job} on {self.device}, estimated:\n{self.table().to_string(index=False, formatters=formats)}"


def estimate(
    source: Pipeline | Geometry | Blueprint, job: Preset | str, device: torch.device | str | None = None
) -> Estimate:
    """What `job` will take with `source`: a loaded pipeline, or its shape alone (then without the decoding of images).

    device: by name, by default the pipeline's, else the CPU. Takes seconds for the bundled model and on a GPU, longer for
    DiT-XL/2 on a CPU. Nothing is written but a temporary folder.
    """
    job = preset(job) if isinstance(job, str) else job
    pipe = source if isinstance(source, Pipeline) else None
    geometry = _shape(pipe) if pipe else source
    device = device_of(device or (pipe.device if pipe else "cpu"))
    geometry.sizes(job.vq)  # a pattern that fits no layer is told here
    for k, d in {(job.vq.k, job.vq.d), *((k, d) for _, k, d in job.vq.layers)}:
        _compile(job.vq.replace(bits=None, k=k, d=d, layers=(), full_precision=()), device)
    held = _held(device) + (0 if pipe else 4 * geometry.parameters_in_memory)
    probe = _first_blocks(pipe, geometry, device)
    hessians, moments = _moments(probe, job, device)
    codes = _of_probe(job.vq, list(structure.quantizable(probe.transformer)))
    fit, student = _timed(lambda: quantize(probe.transformer, codes, hessians=hessians), device)
    runs = {"calibration": _Probe(partial(Calibration, probe, student), job.calibration)}
    packed = harden(student)
    if job.distillation:
        runs["last stage"] = _Probe(partial(distill, probe, packed), job.distillation)
    share = sum(layer.weight.numel() for layer in structure.quantizable(probe.transformer).values()) / geometry.weights
    flops = share * geometry.flops()
    sampling = _sampling(probe.with_transformer(packed), job, device, flops) if job.images else 0.0
    seconds = {"codebooks": (fit + moments) / share}
    seconds |= {stage: run.whole(getattr(job, SETTINGS[stage])) / share for stage, run in runs.items()}
    seconds["sampling"] = sampling / share + (_decoding(pipe, job, device) if pipe and job.images else 0.0)
    # Of every run the old and the new checkpoint, and at the end the packed file.
    disk = {"codebooks": 0} | {stage: int(2 * run.state / share) for stage, run in runs.items()}
    disk[list(runs)[-1]] += packed_bytes(geometry, job.vq)
    disk["sampling"] = job.images * _image_bytes(pipe, geometry) if job.images else 0
    soft = [layer for layer in student.modules() if isinstance(layer, CandidateLinear)]
    memory = {"codebooks": codebook_bytes(geometry, job.vq, runs["calibration"].layers / share, soft)}
    for stage, run in runs.items():
        snapshot = run.state if device.type == "cpu" else 0  # a checkpoint is written from a copy in the CPU's memory
        memory[stage] = (run.layers + run.optimizer + snapshot) / share
        memory[stage] += graph_bytes(geometry, getattr(job, SETTINGS[stage]), run.rows, run.layers / share)
    memory["sampling"] = sampling_bytes(geometry, job.vq, job.sampling.batch_size)
    held += unquantized_bytes(geometry)
    return Estimate(job.name, _name(device), seconds, {stage: int(held + own) for stage, own in memory.items()}, disk)


class _Probe:
    """A few iterations of the first blocks: seconds of one, of a checkpoint, a teacher forward; bytes of what a run holds.

    `begin(config, folder)` gives the run.
    """

    def __init__(self, begin: Callable[[CalibrationConfig, str], Calibration], config: CalibrationConfig) -> None:
        short = config.replace(iterations=PROBE_ITERATIONS, checkpoint_every=0)
        # No trajectory is spread out first: noise in place of it or, where the student has a path, all images at one timestep.
        own_path = config.path == "student"
        short = short.replace(timestep_order="sequential") if own_path else short.replace(inputs="noise")
        with tempfile.TemporaryDirectory() as folder:
            run = begin(short, folder)
            probe = run.pipe
            device = probe.device
            records = [next(run) for _ in range(PROBE_ITERATIONS - 1)]
            whole, last = _timed(lambda: (next(run), run.close())[0], device)
            self.seconds = sorted(record.seconds for record in [*records[1:], last])[(PROBE_ITERATIONS - 1) // 2]
            self.checkpoint = max(0.0, whole - last.seconds)
            self.state = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        self.layers = sum(t.numel() * t.element_size() for m in run.layers.values() for t in m.state_dict().values())
        self.optimizer = sum(t.numel() * t.element_size() for one in run.optimizers() for t in one.state().values())
        inputs = Trajectory(probe, short).inputs()
        self.rows, self.teacher = len(inputs.x), _fastest(partial(probe.output, *inputs), device, 2)

    def whole(self, config: CalibrationConfig) -> float:
        """Seconds of all steps, checkpoints, and moves before the first step."""
        steps = self.seconds * config.iterations + self.checkpoint * _checkpoints(config)
        return steps + _moves(config) * self.teacher


def _moments(probe: Pipeline, job: Preset, device: torch.device) -> tuple[dict[str, torch.Tensor] | None, float]:
    """Second moments of the probe's inputs where error feedback needs them, and the seconds of all batches of them."""
    if job.vq.assignment == "nearest":
        return None, 0.0
    tried, noise = 2, job.calibration.replace(inputs="noise")
    seconds, hessians = _timed(lambda: input_hessians(probe, noise, tried), device)
    return hessians, (BATCHES + _moves(job.calibration)) / tried * seconds


def _compile(vq: VQConfig, device: torch.device) -> None:
    """Compile the kernels for this d and n on one small block, so that no probe pays for it."""
    k = min(vq.k, 300)
    vq = vq.replace(bits=None, k=k, candidates=min(vq.candidates, k), kmeans_iterations=2)
    probe = _first_blocks(None, Geometry(hidden=64 * vq.d, heads=1, depth=1, sample_size=4, classes=2), device)
    single = CalibrationConfig(batch_size=1)
    hessians = input_hessians(probe, single, 1) if vq.assignment == "error-feedback" else None
    student = quantize(probe.transformer, vq, hessians=hessians)
    _Probe(partial(Calibration, probe, student), single)
    probe.output(*_inputs(probe, 2), model=harden(student))


def _first_blocks(pipe: Pipeline | None, geometry: Geometry | Blueprint, device: torch.device) -> Pipeline:
    """A pipeline, without VAE, of the first blocks alone, or of seeded ones of that geometry; at least one."""
    depth = min(geometry.depth, max(1, int(PROBE_WEIGHTS * geometry.depth // geometry.weights)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = geometry.first(depth).build().eval().requires_grad_(False)
    if pipe:
        weights = pipe.transformer.state_dict()
        # SD3's last block has other shapes than those before it: there the random values stay.
        fitting = {name: weights[name] for name, own in transformer.state_dict().items() if _fits(weights, name, own)}
        transformer.load_state_dict(fitting, strict=False)
    transformer = structure.with_fast_products(transformer)
    names = tuple(map(str, range(geometry.classes))) if isinstance(geometry, Geometry) else ("a prompt",)
    if pipe:
        return Pipeline("probe", transformer.to(device), None, pipe.schedule, pipe.class_names, pipe.denoiser)
    denoiser = None if isinstance(geometry, Geometry) else geometry.denoiser()
    schedule = FlowMatching() if denoiser else NoiseSchedule.linear()  # what a step takes is the model's part
    return Pipeline("probe", transformer.to(device), None, schedule, names, denoiser)


def _of_probe(vq: VQConfig, names: list[str]) -> VQConfig:
    """The settings as far as they are about these layers; what would leave none of them to quantize does not count."""

    def fits(pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names)

    own = vq.replace(
        layers=tuple(rule for rule in vq.layers if fits(rule[0])), full_precision=tuple(filter(fits, vq.full_precision))
    )
    return own if any(map(own.takes, names)) else own.replace(full_precision=())


def _fits(weights: dict[str, torch.Tensor], name: str, own: torch.Tensor) -> bool:
    return name in weights and weights[name].shape == own.shape


def _shape(pipe: Pipeline) -> Geometry | Blueprint:
    return Blueprint.of(pipe) if hasattr(pipe.denoiser, "prompts") else Geometry.of(pipe.transformer.config)


def _inputs(probe: Pipeline, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    x = torch.randn(rows, *probe.latent_shape, generator=torch.Generator().manual_seed(0)).to(probe.device)
    timestep, labels = (torch.full((rows,), value, device=probe.device) for value in (500, 0))
    return x, timestep, labels, 1.0


def _sampling(packed: Pipeline, job: Preset, device: torch.device, flops: float) -> float:
    """Seconds of the probe's blocks in all forward passes of sampling, from one of as many rows as affordable."""
    guided = 2 if job.sampling.guided and packed.denoiser.halves else 1
    rows = guided * min(job.sampling.batch_size, job.images)
    affordable = PROBE_FLOPS.get(device.type, 3e11) / flops
    tried = min(rows, max(4, int(affordable)))
    inputs = _inputs(packed, tried)
    with torch.inference_mode():
        seconds = _fastest(partial(packed.output, *inputs), device, 3)
    return seconds / tried * guided * job.images * job.sampling.steps


def _image_bytes(pipe: Pipeline | None, geometry: Geometry | Blueprint) -> int:
    """Of one image as uint8; without a pipeline, of DiT-XL/2's VAE: 3 channels, 8 pixels a latent's side."""
    if pipe is None:
        return 3 * (8 * geometry.sample_size) ** 2
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return pipe.vae.config.out_channels * (scale * geometry.sample_size) ** 2


def _decoding(pipe: Pipeline, job: Preset, device: torch.device) -> float:
    """Seconds to decode all images, from one decoding of as many as are decoded at once."""
    latents = torch.zeros(DECODED_AT_ONCE, *pipe.latent_shape, device=device)
    return _fastest(partial(pipe.decode, latents), device, 2) * job.images / DECODED_AT_ONCE


def _checkpoints(config: CalibrationConfig) -> int:
    return 1 + -(-config.iterations // (config.checkpoint_every or config.iterations))  # the start is kept, too


def _moves(config: CalibrationConfig) -> int:
    """Teacher forwards before the first step, to spread the images over the trajectory."""
    if config.timestep_order != "staggered" or config.inputs == "noise":
        return 0
    return (config.batch_size - 1) * config.steps // config.batch_size


def _timed(call: Callable, device: torch.device) -> tuple[float, object]:
    """Seconds of a call, waiting for the device on both sides, and what it returned."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - started, result


def _fastest(call: Callable, device: torch.device, times: int) -> float:
    return min(_timed(call, device)[0] for _ in range(times))


def _held(device: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
