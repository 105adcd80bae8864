"""Long jobs from a shell, without a browser; the same configs and functions as in a notebook.

    python -m vqlib estimate  --preset dit-xl-2-256-w2                   minutes, memory, disk; needs no weights
    python -m vqlib quantize  --preset dit-mini-fashion-w2               k-means alone, packed
    python -m vqlib calibrate --preset dit-mini-fashion-w2               the whole method, packed; resumes a killed run
    python -m vqlib calibrate --preset dit-mini-fashion-w2 --recipe best --distill 1000    and then on the model's output
    python -m vqlib sample    --preset dit-mini-fashion-w2 --set images=64
    python -m vqlib evaluate  --preset dit-mini-fashion-w2
    python -m vqlib table     --preset dit-mini-fashion-w2 --workers 2   or --on ray: this machine, or RAY_ADDRESS

Everything goes to --out, by default data/runs/<preset>. Another setting: --set calibration.iterations=20 (repeatable).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqlib.calibrator.runs import read_records
from vqlib.config import OTHER_TRAJECTORIES, RECIPES
from vqlib.evaluation.references import require_enough
from vqlib.figures.tables import markdown, save_table
from vqlib.models import pipeline as models
from vqlib.models.sampling import require_fitting
from vqlib.studies.ablation_settings import HALF
from vqlib.studies.estimate import estimate
from vqlib.studies.experiments import class_labels, measure, packed_model, sampled_batches
from vqlib.studies.main_table import TableConfig, make_table
from vqlib.studies.on_ray import PLACES
from vqlib.studies.presets import PRESETS, Preset, preset
from vqlib.studies.rows import content_key
from vqlib.studies.table_rows import DISTILLED
from vqlib.system.files import replacing
from vqlib.system.fingerprint import fingerprint
from vqlib.system.memory import device_label

TABLE_SETTINGS = (
    *("images", "reference", "vq.bits"),
    *("calibration.iterations", "calibration.steps", "calibration.guidance_scale", "calibration.batch_size"),
    *("sampling.steps", "sampling.guidance_scale", "sampling.batch_size"),
)
DISTILLING = ("estimate", "calibrate", "sample", "evaluate", "table")
REPORT_EVERY = 10.0  # seconds between two looks at a run's records
LAST = "iterations of a last stage on the output, recipe best's; codebooks are then stored in float16"
SEED = f"of codebooks, candidates and calibration, the last stage's is {OTHER_TRAJECTORIES} more; images have seeds 0, 1, 2 …"


def main(arguments: list[str] | None = None) -> None:
    """One command; errors of the caller are printed as one line and end the process with status 1."""
    options = _parser().parse_args(arguments)
    try:
        job = _job(options)
        check(job, options)
        COMMANDS[options.command](job, options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"vqlib {options.command}: {error}")


def check(job: Preset, options: argparse.Namespace) -> None:
    """Refuse now what would be refused after an hour of work: the device, the folder written to, the reference, the count."""
    unused = [text.partition("=")[0] for text in options.set if text.partition("=")[0] not in TABLE_SETTINGS]
    if options.distill < 0:
        raise ValueError(f"--distill {options.distill} must be 0 or more")
    if options.distill and options.command not in DISTILLING:
        raise ValueError(
            f"--distill {options.distill}: {options.command} has no last stage, {', '.join(DISTILLING)} have"
        )
    if options.command != "table" and (options.on, options.store, options.workers) != ("local", "", 1):
        raise ValueError("--on, --store and --workers are table's alone")
    if options.on == "ray" and options.workers != 1:
        raise ValueError(f"--workers {options.workers} is of --on local: Ray has as many as its cluster has cores")
    if options.command == "sample" and not job.images:
        raise ValueError("images=0: there is nothing to sample")
    if options.command == "table" and unused:
        raise ValueError(f"--set {unused[0]}: a table takes {', '.join(TABLE_SETTINGS)}; the rest is --recipe's")
    if options.command == "table":
        table = _table(job, options)
        if options.distill:
            table.last_stage()  # a recipe without one is told here
        made = table.calibration()
        others = [name for name, value in job.calibration.to_dict().items() if value != getattr(made, name)]
        if others:
            raise ValueError(f"--set calibration.{others[0]}: a table has recipe {options.recipe!r} with its own")
    options.device, options.out = models.device_of(options.device), options.out.expanduser()
    if options.command == "estimate":
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=options.out):  # a read-only or full disk is told here
        pass
    if options.command in ("evaluate", "table"):
        require_enough(_reference(job), job.images)


def estimate_job(job: Preset, options: argparse.Namespace) -> None:
    """Print minutes, memory, disk, expected sizes and the quoted figure; loads weights only where --model names them."""
    source = _load(job, options) if options.model else job.geometry
    print(estimate(source, job, options.device))
    print(f"\nblocks by the paper's counting: {job.sizes.full:.2f} -> {job.sizes.total:.2f} MiB", end=" ")
    print(f"(codes {job.sizes.codes:.2f}, codebooks {job.sizes.codebooks:.2f}, biases {job.sizes.biases:.2f})")
    if job.quoted:
        row = job.quoted
        print(f"quoted: FID {row['fid']} with {row['images']} images ({row['source']}; {row['mark']})")


def quantize_job(job: Preset, options: argparse.Namespace) -> None:
    """k-means only: every sub-vector with its nearest codeword."""
    nearest = job.vq.replace(assignment="nearest")
    packed_model(_load(job, options), nearest, None, options.out / "k-means", options.seed)
    print(f"packed: {options.out / 'k-means' / 'packed'}")


def calibrate_job(job: Preset, options: argparse.Namespace) -> None:
    """k-means, candidates, calibration, packing."""
    _calibrated(_load(job, options), job, options)
    print(f"packed: {options.out / 'packed'}")


def sample_job(job: Preset, options: argparse.Namespace) -> None:
    """Images of the packed model as uint8 [N, H, W, C] in an .npz, as ADM's evaluator reads them; classes in turn."""
    pipe = _load(job, options)
    require_fitting(pipe, job.sampling)
    packed = pipe.with_transformer(_calibrated(pipe, job, options))
    made_of = (
        fingerprint(packed.transformer),
        fingerprint(pipe.vae),
        pipe.identity(),
        job.sampling,
        device_label(pipe.device),
    )
    unfinished, path = options.out / "unfinished" / content_key(*made_of), options.out / "samples.npz"
    labels = class_labels(len(pipe.class_names), job.images)
    images = torch.cat([*sampled_batches(packed, labels, range(job.images), job.sampling, unfinished, progress=True)])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images[: job.images].permute(0, 2, 3, 1).numpy())  # [N, C, H, W] -> [N, H, W, C]
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"images: {path}")


def evaluate_job(job: Preset, options: argparse.Namespace) -> None:
    """Metrics of the packed model against the preset's reference."""
    pipe = _load(job, options)
    require_fitting(pipe, job.sampling)
    packed, folder = _calibrated(pipe, job, options), options.out / "metrics"
    metrics = measure(pipe, packed, job.images, folder, job.sampling, _reference(job), progress=True)
    row = metrics.to_row(preset=job.name, steps=job.sampling.steps, CFG=job.sampling.guidance_scale)
    print(pd.Series(row).to_string())
    if job.expected and not options.model:
        print(f"expected: {job.expected} (it depends on the number of images)")


def table_job(job: Preset, options: argparse.Namespace) -> None:
    """Full precision, k-means and the calibrated model, with --distill the distilled one, too, as CSV and LaTeX."""
    config, pipe = _table(job, options), _load(job, options)
    rows = make_table(config, options.out / "table", options.workers, pipe=pipe, on=options.on, store=options.store)
    save_table(rows, options.out / "table" / "table")
    print(markdown(rows), f"table: {options.out / 'table' / 'table'}.csv, .tex", sep="\n")


COMMANDS = {
    "estimate": estimate_job,
    "quantize": quantize_job,
    "calibrate": calibrate_job,
    "sample": sample_job,
    "evaluate": evaluate_job,
    "table": table_job,
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m vqlib", description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--model", help="a folder, hub id or .pt file in place of the preset's")
    parser.add_argument("--vae", default=models.ORIGINAL_VAE, help="folder or hub id of the VAE, for a .pt file")
    parser.add_argument("--prompts", help="a file that Prompts.save wrote, for a text-to-image model")
    parser.add_argument("--recipe", default="paper", choices=RECIPES)
    parser.add_argument("--distill", type=int, default=0, metavar="N", help=LAST)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for example vq.candidates=2")
    parser.add_argument("--out", type=Path, help="folder of the job; default: data/runs/<preset>")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 …")
    parser.add_argument("--on", default="local", choices=PLACES, help="where a table's rows are made")
    parser.add_argument(
        "--store", default="", help="URL that keeps a table's rows where a cluster shares no file system"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that make a table's rows on the CPU")
    parser.add_argument("--seed", type=int, default=0, help=SEED)
    return parser


def _job(options: argparse.Namespace) -> Preset:
    """The preset with the recipe and settings of the command line."""
    options.out = options.out or models.DATA / "runs" / options.preset
    settings = dict(_setting(text) for text in options.set)
    job = preset(options.preset)
    chosen = RECIPES[options.recipe]
    vq = chosen.codes(job.vq, **(HALF if options.distill else {}))
    job = dataclasses.replace(job, vq=vq, calibration=chosen.run(job.calibration, seed=options.seed))
    last = {name: value for name, value in settings.items() if name.startswith("distillation.")}
    job = job.with_settings({name: value for name, value in settings.items() if name not in last})
    return job.distilled(max(0, options.distill)).with_settings(
        last
    )  # the last stage has calibration's sizes as they are set


def _table(job: Preset, options: argparse.Namespace) -> TableConfig:
    """The job as a table of k-means, its recipe and, with --distill, its last stage at its bits."""
    methods = ("k-means", "VQ4DiT", *((DISTILLED,) if options.distill else ()))
    return TableConfig(
        model=options.model or job.model,
        reference=_reference(job),
        images=job.images,
        steps=job.sampling.steps,
        guidance_scale=job.sampling.guidance_scale,
        batch_size=job.sampling.batch_size,
        iterations=job.calibration.iterations,
        base=job.calibration,
        recipe=options.recipe,
        seed=options.seed,
        distillation=options.distill or TableConfig.distillation,
        methods=tuple((name, (job.vq.bits,)) for name in methods),
        longer=(),
    )


def _setting(text: str) -> tuple[str, object]:
    """NAME=VALUE with a JSON value, or text where it is none."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _load(job: Preset, options: argparse.Namespace) -> models.Pipeline:
    more = {"device": options.device, "family": job.family, "prompts": options.prompts}
    return models.load(options.model or job.model, vae=options.vae, **more)


def _calibrated(pipe: models.Pipeline, job: Preset, options: argparse.Namespace) -> nn.Module:
    """The packed model of the job, made or, where it is finished, loaded; progress is read from the run's records."""
    with _watching(options.out, job):
        return packed_model(pipe, job.vq, job.calibration, options.out, options.seed, distillation=job.distillation)


@contextmanager
def _watching(folder: Path, job: Preset):
    """Print the last record of a job's runs now and then, while they go on in this thread: each stage by its name."""
    stages = {"calibration": job.calibration, "distillation": job.distillation}
    done = threading.Event()

    def watch() -> None:
        shown = None
        while not done.wait(REPORT_EVERY):
            begun = [name for name in stages if stages[name] and (folder / name / "records.jsonl").exists()]
            records = read_records(folder / begun[-1]) if begun else []
            if records and (begun[-1], records[-1].iteration) != shown:
                shown = stage, iteration = begun[-1], records[-1].iteration
                record, total = records[-1], stages[stage].iterations
                left = (total - iteration) * record.seconds / 60
                loss = record.loss if record.output_loss is None else record.output_loss  # what is trained on
                print(f"{stage}, iteration {iteration} of {total}: loss {loss:.4g}, {record.seconds:.2f} s each, "
                      f"about {left:.1f} minutes left of it", flush=True)  # fmt: skip

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _reference(job: Preset) -> str:
    if job.reference is None:
        raise ValueError(f"{job.name} has no reference of its own: give --set reference=FILE, for ImageNet ADM's .npz")
    return job.reference


if __name__ == "__main__":
    main()
