"""One command that proves the workbench on a GPU: tests, DiT-XL/2's geometry, packed sampling, the bundled model's tour.

    make gpu        (or: python benchmarks/gpu.py, with the machine's own torch)

Takes about seven minutes on an H100 and needs no network. Every stage writes its table to benchmarks/results/gpu-<stage>-<device>.md
and its numbers to one JSON as soon as it has them; a stage that fails says so, and the next one goes on. Weights of
DiT-XL/2's size are seeded: times and memory are those of the real ones, losses are not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from machine import RESULTS, report, versions
from seeded import seeded_pipeline

import vqlib
from vqlib.calibrator.calibrate import Calibration
from vqlib.config import SamplingConfig
from vqlib.kernels.products import products_in
from vqlib.models import class_conditional, structure
from vqlib.models.geometry import Geometry
from vqlib.packed.timing import compare
from vqlib.quantizer.codebook import fit_codebook
from vqlib.quantizer.error_feedback import candidates_with_feedback, refit
from vqlib.quantizer.feedback import Columns
from vqlib.quantizer.quantize import codebooks
from vqlib.system.files import write_bytes
from vqlib.system.memory import forget_peak, peak_memory

STEPS = 500  # of a calibration that is projected from the measured ones
DEVICE = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]


def timed(work) -> tuple[object, float]:
    """What a call gives, and its seconds with all that it started on the device."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return found, time.perf_counter() - started


class Proof:
    """The stages in their order; what one makes the next ones use."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.xl = None

    def tests(self) -> tuple[pd.DataFrame, list[str]]:
        """Kernels and the whole chain, on CUDA."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/kernels/cuda",
            "tests/gpu/test_cuda.py",
        ]
        command += ["-n", "6"] if find_spec("xdist") else []  # most of the time kernels are compiled
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
        print("\n".join(lines) if lines else done.stdout[-2000:] * (done.returncode != 0) + done.stderr[-2000:])
        summary = [
            line for line in done.stdout.splitlines() if " in " in line and ("passed" in line or "failed" in line)
        ]
        return pd.DataFrame({"tests": summary or ["none ran"], "exit": done.returncode}), lines

    def codebooks(self) -> tuple[pd.DataFrame, list[str]]:
        """k-means and error feedback of every layer of DiT-XL/2."""
        self.xl, _ = timed(lambda: seeded_pipeline(Geometry(depth=self.options.blocks), DEVICE))
        settings = vqlib.recipe("best", timestep_order="sequential", products="tf32")
        vq, layers = vqlib.recipe_vq("best"), structure.quantizable(self.xl.transformer)
        warm = next(iter(layers.values())).weight[:256].reshape(-1, vq.d)
        fit_codebook(warm, vq.k)  # compiles
        forget_peak(DEVICE)
        books, passes, row = {}, 0, {"layers": len(layers)}

        def fit() -> None:
            for name, book in codebooks({name: {name: layer} for name, layer in layers.items()}, vq):
                books[name] = book.codewords, len(book.history)

        row["k-means s"] = timed(fit)[1]
        passes = sum(count for _, count in books.values()) / len(books)
        hessians, row["second moments s"] = timed(lambda: vqlib.input_hessians(self.xl, settings, batches=8))
        split = {"factors s": 0.0, "candidates s": 0.0, "refit s": 0.0}
        last, columns = None, None
        for name, layer in layers.items():
            if hessians[name] is not last:
                last = hessians[name]
                columns, seconds = timed(lambda: Columns.of(last, vq.d))
                split["factors s"] += seconds
            book = books[name][0]
            found, seconds = timed(lambda: candidates_with_feedback(layer.weight, columns, book, vq.candidates, vq.ratio_start))  # fmt: skip
            split["candidates s"] += seconds
            split["refit s"] += timed(lambda: refit(layer.weight, last, found.indices[:, 0].long(), book))[1]
        row |= split | {"error feedback s": sum(split.values()), "peak GiB": peak_memory(DEVICE) / 2**30}
        note = (
            f"2 bits: k = {vq.k}, d = {vq.d}, n = {vq.candidates}; {passes:.0f} passes a layer; moments of 8 batches."
        )
        return pd.DataFrame([row]), [note]

    def calibration(self) -> tuple[pd.DataFrame, list[str]]:
        """Steps of both recipes at batch 16, spread over a whole run's timetable; their floor; what remains, by kernel."""
        rows, notes = [], []
        for products in ("tf32", "bfloat16"):
            for name in ("paper", "best"):
                vq = vqlib.recipe_vq(name, kmeans_iterations=1, assignment="nearest")
                student = vqlib.quantize(self.xl.transformer, vq)
                changes = {"batch_size": 16, "products": products, "timestep_order": "sequential"}
                run = vqlib.calibrate(self.xl, student, vqlib.recipe(name, iterations=self.options.steps, **changes))
                next(run)  # compiles
                _, seconds = timed(lambda: [next(run) for _ in range(self.options.steps - 3)])
                profile = self._profile(run) if name == "best" else None
                low = min(self._floor(run) for _ in range(3))
                per_step, memory = seconds / (self.options.steps - 3), peak_memory(DEVICE) / 2**30
                row = {"recipe": name, "n": vq.candidates, "products": products, "step s": per_step, "floor s": low}
                row |= {"step / floor": per_step / low, f"{STEPS} steps s": STEPS * per_step, "peak GiB": memory}
                rows.append(row)
                print(row, flush=True)
                if profile is not None:
                    notes += [f"One step of `{name}` in {products}, device time by kernel (ms):", "", profile, ""]
                run.close()
        return pd.DataFrame(rows), notes

    def _floor(self, run: Calibration) -> float:
        """Seconds of the full-precision pass and, inside it, a plain forward and backward of every block with dense weights."""
        from bench_calibration import floor

        return floor(run)[0]

    def _profile(self, run: Calibration) -> str:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            next(run)
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for event in found.events():
            times.setdefault(event.name[:60], []).append(event.device_time_total / 1e3)
        top = sorted(times.items(), key=lambda item: -sum(item[1]))[:14]
        rows = [f"| {sum(ms):.1f} | {len(ms)} | `{kernel}` |" for kernel, ms in top]
        total = sum(sum(ms) for ms in times.values()), sum(len(ms) for ms in times.values())
        return "\n".join(
            ["| ms | launches | kernel |", "| ---: | ---: | --- |", *rows, f"| {total[0]:.1f} | {total[1]} | all |"]
        )

    def sampling(self) -> tuple[pd.DataFrame, list[str]]:
        """A guided forward of DiT-XL/2 in bfloat16: packed in both modes, beside the dense model."""
        dense = self.xl.transformer.to(torch.bfloat16)
        packed = vqlib.harden(vqlib.quantize(dense, vqlib.VQConfig(bits=2, candidates=1, kmeans_iterations=1)))
        rows = []
        for batch in (1, 4, 16):
            x = torch.randn(2 * batch, *self.xl.latent_shape, device=DEVICE, dtype=torch.bfloat16)
            where = torch.full((2 * batch,), 500, device=DEVICE), torch.arange(2 * batch, device=DEVICE)

            def call(model, x=x, where=where):
                with torch.inference_mode():
                    return class_conditional.forward(model, x, *where)

            for mode in ("memory", "speed"):
                vqlib.set_mode(packed, mode)
                calls = {"dense": lambda: call(dense), mode: lambda: call(packed)}
                table = compare(calls, rounds=10)
                rows.append({"batch": batch, "mode": mode, "dense ms": table.ms[0], "packed ms": table.ms[1], "ratio": table.ratio[1]})  # fmt: skip
        held = sum(t.numel() * t.element_size() for t in packed.state_dict().values()) / 2**20
        full = sum(t.numel() * t.element_size() for t in dense.state_dict().values()) / 2**20
        return pd.DataFrame(rows), [f"Tensors held: packed {held:.0f} MiB, dense {full:.0f} MiB."]

    def tour(self) -> tuple[pd.DataFrame, list[str]]:
        """The bundled model from weights to FD on CUDA, beside the CPU's figure and interval of the main table."""
        pipe, rows = vqlib.load(device=DEVICE), []
        labels = [i % len(pipe.class_names) for i in range(self.options.images)]
        sampling = SamplingConfig(batch_size=500)

        def fd(name: str, model, quoted: str, seconds: dict | None = None) -> None:
            images, spent = timed(
                lambda: vqlib.sample(pipe.with_transformer(model), labels, range(len(labels)), sampling)
            )
            metrics = vqlib.evaluate(images, "fashion-mnist-test", labels=labels, cache=None, device=DEVICE)
            row = {"model": name, "images": len(labels), "FD": metrics.fd, "accuracy": metrics.accuracy}
            rows.append(row | (seconds or {}) | {"sampling s": spent, "on a CPU, main table": quoted})

        fd("full precision", pipe.transformer, "0.41")
        settings = vqlib.recipe("best")
        hessians, moments = timed(lambda: vqlib.input_hessians(pipe, settings))
        student, quantizing = timed(
            lambda: vqlib.quantize(pipe.transformer, vqlib.recipe_vq("best"), hessians=hessians)
        )
        model, calibrating = timed(lambda: vqlib.calibrate(pipe, student, settings).finish())
        seconds = {"moments s": moments, "quantize s": quantizing, f"{STEPS} steps s": calibrating}
        fd("`best` at 2 bits", model, "0.66 (0.56 – 0.77)", seconds)
        return pd.DataFrame(rows), ["FD (fashion) at 50 steps, guidance 1.5; everything in float32."]

    def resume(self) -> tuple[pd.DataFrame, list[str]]:
        """A run killed in the middle of a step, taken up again."""
        code = """if True:
            import os, sys, threading, vqlib
            pipe = vqlib.load(device="cuda")
            student = vqlib.quantize(pipe.transformer, vqlib.recipe_vq("paper"))
            run = vqlib.calibrate(pipe, student, vqlib.recipe("paper", iterations=40, checkpoint_every=10), out=sys.argv[1])
            print("at", run.iteration)
            for record in run:
                if sys.argv[2] == "kill" and record.iteration == 25:
                    threading.Timer(0.01, os.kill, (os.getpid(), 9)).start()
            print("loss", record.loss)
        """
        with tempfile.TemporaryDirectory() as folder:
            said = []
            for name, how in (("whole", "go"), ("killed", "kill"), ("killed", "go")):
                command = [sys.executable, "-c", code, f"{folder}/{name}", how]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                said.append((done.returncode, *done.stdout.split(), done.stderr[-300:] * (done.returncode == 1)))
        rows = [{"run": n, "exit": s[0], "began at": s[2] if len(s) > 2 else "", "last loss": s[4] if len(s) > 5 else s[-1]}
                for n, s in zip(("in one go", "killed after step 25", "resumed"), said, strict=True)]  # fmt: skip
        return pd.DataFrame(rows), [
            "Checkpoints every 10 steps. Codebooks' gradients are added up in any order on a GPU."
        ]


STAGES = ("codebooks", "calibration", "tour", "resume", "tests", "sampling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages",
        nargs="*",
        default=STAGES,
        help=f"of {', '.join(STAGES)}; calibration and sampling need codebooks before them",
    )
    parser.add_argument("--steps", type=int, default=40, help="measured of a calibration")
    parser.add_argument("--images", type=int, default=5000, help="of the tour")
    parser.add_argument("--blocks", type=int, default=28, help="of DiT-XL/2's geometry")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, and torch sees none; everything else runs without")
    device = torch.cuda.get_device_name()
    label = device.lower().replace(" ", "-")
    proof, found, failed = Proof(options), {"device": device, "versions": versions("triton", "diffusers")}, []
    with products_in("float32", DEVICE):  # stages that ask for more say so
        for name in options.stages:
            print(f"## {name}", flush=True)
            started = time.perf_counter()
            try:
                table, notes = getattr(proof, name)()
            except Exception:
                failed.append(name)
                traceback.print_exc(file=sys.stdout)
                continue
            spent = time.perf_counter() - started
            heading = getattr(proof, name).__doc__
            report(heading, table, [f"{device}; {found['versions']}; {spent:.0f} s.", *notes], f"gpu-{name}-{label}")
            found[name] = {"seconds": spent, "rows": table.to_dict("records")}
            write_bytes(RESULTS / f"gpu-{label}.json", (json.dumps(found, indent=1, default=str) + "\n").encode())
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
