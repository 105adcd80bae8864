"""A packed DiT beside the full-precision one: bytes on disk, time to load, peak memory of a step, time of a forward.

    python benchmarks/bench_inference.py file            # DiT-XL/2's geometry at 2 bits: size and load time
    python benchmarks/bench_inference.py memory          # peak memory of one sampling step, one process each
    python benchmarks/bench_inference.py speed --threads 2   # two blocks of XL's width, and the bundled model

Weights are random where no model is bundled: none of these figures depends on their values. Times of one table come
from one run in which the methods take turns; compare the ratios. Memory is Linux's (`/proc`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

import vqlib  # first: diffusers beside a CPU build of torch

# isort: split
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import nn

from vqlib.models import structure
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.geometry import Geometry
from vqlib.models.modulation import cached_modulation
from vqlib.models.process import guide
from vqlib.packed.diffusers_backend import packed_layers
from vqlib.packed.modes import set_mode
from vqlib.packed.timing import compare, products

XL = Geometry()
K, D = 256, 4  # 2 bits a weight
NOTES = {
    "file": "A packed DiT-XL/2 of random weights at 2 bits; ideal: codes, codebooks in float32, all else once in float16.",
    "memory": "One guided step of one image, DiT-XL/2's geometry at 2 bits; peaks of whole processes, imports included.",
    "speed": "Guided forwards that take turns; ratio: median by round to full precision, with quartiles low and high.",
}


def random_dit(blocks: int, packed: bool, seed: int = 0) -> DiTTransformer2DModel:
    """A DiT of XL's width with random tensors of a trained model's size; its embedders are one, if packed."""
    generator = torch.Generator().manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        model = DiTTransformer2DModel(**XL.config(blocks)).eval().requires_grad_(False)
    if packed:
        for name, layer in structure.quantizable(model).items():
            hard = vqlib.VQLinear(layer.in_features, layer.out_features, True, D, K)
            hard.codes.random_(generator=generator)
            hard.codebook.normal_(std=0.02, generator=generator)
            hard.bias.normal_(std=0.02, generator=generator)
            structure.swap(model, name, hard)
    first = model.transformer_blocks[0].norm1.emb
    for parent in model.modules():
        for name, parameter in parent._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape).normal_(std=0.02, generator=generator)
                parent._parameters[name] = nn.Parameter(value, requires_grad=False)
    for block in model.transformer_blocks[1:]:
        if packed:
            block.norm1.emb = first
        else:
            block.norm1.emb.load_state_dict(first.state_dict())
    return model


def inputs(rows: int, side: int, classes: int) -> dict[str, torch.Tensor]:
    """One guided forward: noise, a timestep, classes of the first half, the null class in the second."""
    x = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.arange(rows // 2) % classes, torch.full((rows - rows // 2,), classes)])
    return {"hidden_states": x, "timestep": torch.full((rows,), 500), "class_labels": labels}


def ideal_bytes(model: nn.Module) -> int:
    """Codes, codebooks in float32, and every other tensor once in float16."""
    layers, seen = packed_layers(model), set()
    total = sum(layer.codes.numel() + 4 * layer.codebook.numel() for layer in layers.values())
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] not in ("codes", "codebook", "scale") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += 2 * tensor.numel()
    return total


def file(folder: Path, blocks: int, repeats: int = 3) -> pd.DataFrame:
    """Write a packed model of XL's geometry, load it `repeats` times."""
    model = random_dit(blocks, packed=True)
    begin = time.perf_counter()
    vqlib.save(model, folder, {"source": "random weights"})
    saved, ideal = time.perf_counter() - begin, ideal_bytes(model)
    size = sum(path.stat().st_size for path in folder.iterdir())
    loads = []
    for _ in range(repeats):
        begin = time.perf_counter()
        loaded = vqlib.load_transformer(folder)
        loads.append(time.perf_counter() - begin)
    own, read = model.state_dict(), loaded.state_dict()
    same = own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    row = {"blocks": blocks, "file bytes": size, "ideal bytes": ideal, "over": f"{size / ideal - 1:.3%}"}
    row |= {"save s": saved, "load s, best": min(loads), "load s, worst": max(loads), "load == saved": str(same)}
    return pd.DataFrame([row])


def peak_of_a_step(kind: str, folder: Path, blocks: int) -> None:
    """In a process of its own: hold one model, make a guided step of one image, print bytes as JSON."""
    start = _resident("VmRSS")
    if kind == "full precision":
        model = random_dit(blocks, packed=False)
    else:
        model = vqlib.load_transformer(folder)
        set_mode(model, kind)
    held = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of the step alone
    given = inputs(2, 32, 1000)
    posterior = NoiseSchedule.linear().respace(50).posterior()
    with torch.inference_mode():
        output = guide(model(**given).sample, 4.0, 3)
        posterior.predict(output, given["hidden_states"][:1], torch.tensor([25]))
    print(json.dumps({"imports": start, "held": held, "peak": _resident("VmHWM")}))


def memory(folder: Path, blocks: int) -> pd.DataFrame:
    """Peak memory of a step in each mode and of the full-precision model, with and without Python and its imports."""
    vqlib.save(random_dit(blocks, packed=True), folder)
    rows = []
    for kind in ("full precision", "memory", "speed"):
        command = [sys.executable, __file__, "step", "--kind", kind, "--folder", str(folder), "--blocks", str(blocks)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        base = rows[0] if rows else None
        row = {"model": kind, **{f"{name} MiB": found[name] / 2**20 for name in ("imports", "held", "peak")}}
        row["peak / fp32"] = 1.0 if base is None else row["peak MiB"] / base["peak MiB"]
        own = row["peak MiB"] - row["imports MiB"]
        row["without imports"] = 1.0 if base is None else own / (base["peak MiB"] - base["imports MiB"])
        rows.append(row)
    return pd.DataFrame(rows)


def forwards(packed: nn.Module, folder: Path, batches: list[int], classes: int, rounds: int) -> pd.DataFrame:
    """Guided forwards in every mode against the same weights in dense layers; a batch of b images is 2b rows."""
    vqlib.save(packed, folder)
    dense, rebuilt, kept, cached = (vqlib.load_transformer(folder) for _ in range(4))
    dense = structure.with_fast_products(dense.dequantize().requires_grad_(False))
    set_mode(kept, "speed")
    results = []
    for batch in batches:
        given = inputs(2 * batch, packed.config.sample_size, classes)
        calls = {
            "full precision": lambda given=given: dense(**given),
            "speed mode": lambda given=given: kept(**given),
            "memory mode": lambda given=given: rebuilt(**given),
            "memory mode, adaLN cached": lambda given=given: cached(**given),
        }
        with torch.inference_mode(), cached_modulation(cached):
            calls["matrix products alone"] = products(dense, calls["full precision"])
            table = compare(calls, rounds)
        table.insert(0, "batch", batch)
        results.append(table)
    return pd.concat(results, ignore_index=True)


def speed(folder: Path, batches: list[int], rounds: int) -> pd.DataFrame:
    """Two blocks of XL's width, and the bundled model after one pass of k-means, at 2 and at 3 bits."""
    found = {"2 blocks of XL's width": forwards(random_dit(2, True), folder / "xl", batches, XL.classes, rounds)}
    pipe = vqlib.load()
    for bits in (2, 3):
        config = vqlib.VQConfig(bits=bits, candidates=1, kmeans_iterations=1)
        small = vqlib.harden(vqlib.quantize(pipe.transformer, config))
        name = f"{pipe.name}, {bits} bits"
        found[name] = forwards(small, folder / f"{bits}bit", batches, len(pipe.class_names), 4 * rounds)
    return pd.concat([table.assign(model=name) for name, table in found.items()], ignore_index=True)


def _resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("file", "memory", "speed", "step"), help="step is what memory starts")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    add_options(parser, device=False)
    parser.add_argument("--kind", help="of a step: 'full precision', 'memory' or 'speed'")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "step":
        return peak_of_a_step(options.kind, options.folder, options.blocks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "packed"
        if options.part == "speed":
            table = speed(folder, options.batches, options.rounds)
        else:
            table = {"file": file, "memory": memory}[options.part](folder, options.blocks)
    notes = [f"{device_name(threads=options.threads)}; {versions('diffusers', 'numba')}.", NOTES[options.part]]
    report(f"Inference: {options.part}", table, notes, options.save)


if __name__ == "__main__":
    main()
