"""What studies cost beside their work, and that they end the same whatever is killed: two one-core nodes of one machine.

    python benchmarks/bench_studies.py paper overhead plan table kills memory

overhead: 1,000 tasks that do nothing, on Ray and as Ray's own tasks. plan: 100,000 rows counted. table: a small table by two
processes and by two nodes. kills: the same with a worker killed ten times and a node removed. memory: two actors' peaks
against the estimate. paper: hours and cost of the paper's table on more and more GPUs. Each is a table of its own in benchmarks/results.
"""

import argparse
import gc
import heapq
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import ray
import torch
from diffusers import DiTTransformer2DModel
from machine import device_name, report, versions

sys.path.append(str(Path(__file__).parents[1] / "tests" / "cluster"))
from nodes import node, two_nodes

from vqlib.calibrator.stages import Stage
from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import pipeline
from vqlib.models.geometry import MIB, Geometry
from vqlib.studies.ablation_settings import sweep_settings
from vqlib.studies.ablations import Ablation
from vqlib.studies.engines import complete, run
from vqlib.studies.main_table import TableConfig, make_table
from vqlib.studies.on_ray import OnRay
from vqlib.studies.pipelined import calibrate_in_stages, cut
from vqlib.studies.stage_memory import dit_stage_bytes
from vqlib.studies.tasks import Needs, under_way

TABLE = TableConfig(
    images=1000, steps=10, iterations=10, hessian_batches=2, bootstrap=0, longer=(), shard=500,
    methods=(("RTN", (2,)), ("k-means", (2,)), ("VQ4DiT", (2,))),
)  # fmt: skip
STAGES = VQConfig(candidates=3, kmeans_iterations=3), CalibrationConfig(iterations=3, batch_size=4, steps=4)


@dataclass(frozen=True)
class Nothing:
    """A task without work."""

    n: int
    needs: Needs = Needs()
    cost: float = 1.0

    def made_of(self):
        return "nothing", self.n

    def after(self):
        return ()

    def leaves(self):
        return ()

    def run(self, folder, unfinished):
        return {}


def overhead(cluster, folder: Path) -> list[dict]:
    """1,000 tasks that do nothing, as Ray's own tasks and as a study's, whose rows are files."""
    count, nothing = 1000, ray.remote(lambda: None)
    ray.get([nothing.remote() for _ in range(20)])
    complete(run(folder / "warm", [Nothing(n) for n in range(4)], OnRay()))
    start = time.perf_counter()
    ray.get([nothing.remote() for _ in range(count)])
    own = time.perf_counter() - start
    start = time.perf_counter()
    complete(run(folder / "tiny", [Nothing(n) for n in range(count)], OnRay()))
    ours = time.perf_counter() - start
    found = {"tasks": count, "ms a task": 1e3 * ours / count, "Ray's own": 1e3 * own / count}
    return [found | {"beyond Ray's": 1e3 * (ours - own) / count}]


def plan(cluster, folder: Path) -> list[dict]:
    """A study of 100,000 rows up to its first task: hashed, looked for, counted."""
    study = Ablation(pipeline.load(), folder / "plan", images=500)
    tasks = study.tasks(sweep_settings((2, 3, 4), (1, 2, 3, 4, 5)), range(6667))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    first = next(run(study.folder, tasks, OnRay()))
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [{"rows": first.wanted, "seconds": seconds, "MiB beyond the model": grown}]


def table(cluster, folder: Path) -> list[dict]:
    """Three models of 1,000 images, 10 steps, 10 calibration steps, made by two processes and by two nodes; starting included."""
    found, made = [], {}
    for place in ("processes", "ray"):
        for turn in ("first", "second"):
            start, out = time.perf_counter(), folder / f"{place}-{turn}"
            made[place] = make_table(TABLE, out, 2, on="ray" if place == "ray" else "local", report=lambda _: None)
            found.append({"made by": place, "turn": turn, "seconds": time.perf_counter() - start})
    same = made["processes"].drop(columns="minutes").equals(made["ray"].drop(columns="minutes"))
    return [row | {"same table": same} for row in found]


def kills(cluster, folder: Path) -> list[dict]:
    """The same table while a worker is killed ten times and a third node is removed."""
    wanted = make_table(TABLE, folder / "undisturbed", 2, report=lambda _: None).drop(columns="minutes")
    draw, times, done, third = random.Random(0), [], threading.Event(), cluster.add_node(**node())

    def kill() -> None:
        while len(times) < 10 and not done.wait(draw.uniform(0.5, 6.0)):
            workers = under_way(folder / "disturbed")
            if len(times) == 5 and third in cluster.list_all_nodes():
                cluster.remove_node(third)
            if workers:
                os.kill(int(draw.choice(workers)["where"].split(":")[-1]), signal.SIGKILL)
                times.append(time.perf_counter())

    killer, start = threading.Thread(target=kill), time.perf_counter()
    killer.start()
    found = make_table(TABLE, folder / "disturbed", on="ray", report=lambda _: None).drop(columns="minutes")
    seconds = time.perf_counter() - start
    done.set()
    killer.join()
    removed = third not in cluster.list_all_nodes()
    return [{"kills": len(times), "node removed": removed, "seconds": seconds, "same table": found.equals(wanted)}]


def _idle() -> int:
    """Bytes of a process that has made a step of a very small stage."""
    torch.manual_seed(0)
    small = Geometry(64, 2, 1, sample_size=16, classes=10).build().eval().requires_grad_(False)
    pipe, (vq, config) = pipeline.load().with_transformer(small), STAGES
    stage = Stage(pipe, vq.replace(bits=None, k=16, d=4), config, (0, 1))
    stage.forward(Trajectory(pipe, config).inputs())
    stage.learn(1)
    del stage, pipe, small
    gc.collect()
    return psutil.Process().memory_info().rss


def memory(cluster, folder: Path) -> list[dict]:
    """A seeded DiT of 4 blocks of width 768 calibrated by two actors; what they hold beyond a process that has compiled its kernels."""
    geometry, (vq, config), source = Geometry(768, 12, 4, sample_size=16, classes=10), STAGES, folder / "model"
    shutil.copytree(pipeline.DATA / pipeline.BUNDLED, source)
    torch.manual_seed(0)
    DiTTransformer2DModel(**geometry.config()).eval().save_pretrained(source / "transformer")
    for other in (source / "transformer").glob("*.fp16.*"):
        other.unlink()
    idle = ray.get(ray.remote(max_calls=1)(_idle).remote())
    pipe = pipeline.load(str(source))
    calibration = calibrate_in_stages(pipe, vq, config, 2, on="ray")
    pids = [ray.get(actor.__ray_call__.remote(lambda self: os.getpid())) for actor in calibration.place.actors]
    peaks, done = [0] * len(pids), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peaks[:] = [max(p, psutil.Process(pid).memory_info().rss) for p, pid in zip(peaks, pids, strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    list(calibration)
    done.set()
    watcher.join()
    calibration.close()
    rows = []
    for (first, last), peak in zip(cut(geometry.depth, 2), peaks, strict=True):
        expected = dit_stage_bytes(geometry, (first, last), vq, config)
        row = {"blocks": f"{first}–{last - 1}", "peak MiB": peak / MIB, "process MiB": idle / MIB}
        rows.append(row | {"measured MiB": (peak - idle) / MIB, "estimate MiB": expected / MIB})
    return rows


def paper(cluster, folder: Path) -> list[dict]:
    """On paper: DiT-XL/2 at 256 and 512, full precision and 2, 3, 4 bits with 3 seeds, 50, 100 and 250 steps, 10,000 images a row.

    Seconds of one H100 from results/gpu-*.md: codebooks 16, 500 steps of recipe `paper` 184, an image's guided step 33.85 / 16 ms
    in bfloat16; at 512 all but codebooks × 4.4, the ratio of operations. Assumed, not measured: 10 s a task to load and warm up,
    90 s to evaluate a row, 2.50 a GPU hour. A free GPU takes the first task whose predecessors are made.
    """
    step, slower, load, judged, images = 33.85e-3 / 16, {256: 1.0, 512: 4.4}, 10.0, 90.0, 10_000
    models = [(size, bits) for size in (512, 256) for bits in (16, *[b for b in (2, 3, 4) for _ in range(3)])]
    found = []
    for gpus, shard in (
        (1, 1000),
        (8, 10_000),
        (8, 1000),
        (64, 10_000),
        (64, 1000),
        (64, 250),
        (256, 1000),
        (256, 250),
    ):
        ready = deque((load + (bits < 16) * (16 + 184 * slower[size]), (size,)) for size, bits in models)
        running, now, work, number = [], 0.0, 0.0, itertools.count()
        while ready or running:
            while ready and len(running) < gpus:
                seconds, then = ready.popleft()
                work += seconds
                heapq.heappush(running, (now + seconds, next(number), then))
            now, _, then = heapq.heappop(running)
            if len(then) == 1:  # a model: its shards, the longest first
                for steps in (250, 100, 50):
                    left, one = [images // shard], load + shard * steps * step * slower[then[0]]
                    ready.extend([(one, (left, "shard"))] * left[0])
            elif len(then) == 2:
                then[0][0] -= 1
                if not then[0][0]:
                    ready.appendleft((judged, ()))
        longest = load + shard * 250 * step * slower[512]
        row = {"GPUs": gpus, "images a shard": shard, "GPU hours": work / 3600, "hours": now / 3600}
        row |= {"busy": work / now / gpus, "longest shard, minutes": longest / 60, "cost": 2.5 * gpus * now / 3600}
        found.append(row)
    return found


PARTS = {"paper": paper, "overhead": overhead, "plan": plan, "table": table, "kills": kills, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--beside", default="nothing else", help="what else the machine was doing, for the notes")
    parser.add_argument("--save", action="store_true", help="also write results/studies-<part>.md")
    options = parser.parse_args()
    with two_nodes() as cluster:
        for part in options.parts:
            with tempfile.TemporaryDirectory() as folder:
                rows = pd.DataFrame(PARTS[part](cluster, Path(folder)))
            where = f"{device_name(threads=1)}; {versions('ray')}; two one-core nodes; beside it: {options.beside}."
            report(f"Studies: {part}", rows, [where, PARTS[part].__doc__], f"studies-{part}" if options.save else None)


if __name__ == "__main__":
    main()
