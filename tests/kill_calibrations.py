"""Kill calibrations at random moments and go on with them, with one thread, two threads, and both in turn; a script.

    python tests/kill_calibrations.py --kills 200

Every run must go on and end. With an unchanged number of threads it must end bit-equal to the run that nobody killed.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import vqlib  # first: diffusers beside a CPU build of torch

# isort: split
import tiny

from vqlib.calibrator.hessians import input_hessians

RECIPES = ("paper", "release", "best")
THREADS = {"one thread": (1,), "two threads": (2,), "one and two in turn": (1, 2)}


def calibrate(name, folder, threads):
    """A small run of a recipe in `folder`, to its end, with its packed model beside it."""
    torch.set_num_threads(threads)
    pipe = tiny.pipeline()
    settings = vqlib.recipe(name, iterations=12, batch_size=2, steps=4, checkpoint_every=2)
    codes = vqlib.recipe_vq(name, k=16, d=4, bits=None, kmeans_iterations=4)
    hessians = input_hessians(pipe, settings, 1) if codes.assignment == "error-feedback" else None
    student = vqlib.quantize(pipe.transformer, codes, hessians=hessians)
    vqlib.save(vqlib.calibrate(pipe, student, settings, out=folder / "run").finish(), folder / "packed")


def start(*job):
    """`calibrate(*job)` in a child process; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            calibrate(*job)
            status = 0
        finally:
            os._exit(status)
    return child


def run(*job):
    """`calibrate(*job)` in a child that nobody kills; its seconds. Raises RuntimeError where it fails."""
    begin = time.monotonic()
    status = os.waitpid(start(*job), 0)[1]
    if status:
        raise RuntimeError(f"{job}: ended with status {status}")
    return time.monotonic() - begin


def torture(name, folder, threads, kills, rng, seconds):
    """Kill runs of one recipe `kills` times, each somewhere in its first start or a later one; the folders of ended runs."""
    ended, given, attempt = [], 0, 0
    place = folder / f"killed-{len(ended)}"
    while given < kills:
        child = start(name, place, threads[attempt % len(threads)])
        attempt += 1
        time.sleep(rng.uniform(0.0, 1.1 * seconds))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        given += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):  # it had ended by itself
            if status:
                raise RuntimeError(f"{place}: ended with status {status}")
            ended.append(place)
            place = folder / f"killed-{len(ended)}"
    run(name, place, threads[attempt % len(threads)])
    return [*ended, place]


def same(a, b):
    """Whether two packed models hold the same bits."""
    a, b = (load_file(folder / "packed" / "diffusion_pytorch_model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    jobs = [(recipe, kind) for recipe in RECIPES for kind in THREADS]
    with tempfile.TemporaryDirectory() as temporary:
        for place, (name, kind) in enumerate(jobs):
            folder, threads = Path(temporary) / str(place), THREADS[kind]
            run(name, folder / "warm", threads[-1])  # kernels compiled, files in memory
            seconds = run(name, folder / "whole", threads[0])
            kills = arguments.kills * (place + 1) // len(jobs) - arguments.kills * place // len(jobs)
            ended = torture(name, folder, threads, kills, rng, seconds)
            equal = [same(folder / "whole", one) for one in ended]
            if len(threads) == 1 and not all(equal):
                raise AssertionError(f"{name}, {kind}: {equal.count(False)} of {len(equal)} runs ended with other bits")
            print(f"{name}, {kind}: {kills} kills, {len(ended)} runs ended, {sum(equal)} bit-equal", flush=True)


if __name__ == "__main__":
    main()
