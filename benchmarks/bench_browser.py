"""From a key on a slider to the picture, in a real JupyterLab: the images' view of notebook 08 with its own parameters.

    python benchmarks/bench_browser.py --threads 2    # needs Chromium and playwright: `make browser` brings them

After Run All Cells (both calibrations cut to 5 steps: no time here depends on them) each round moves `first seed` one
on, which makes new images of both models, back to the picture that is known, and forth again. Times run from the key's
event to the image's `load` event, both taken in the page.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from machine import device_name, report, versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.browser.lab import ROOT, Explorer, Lab, browser, server, write_copy

NOTEBOOK = ROOT / "notebooks/08_explore.ipynb"
LIMITS = {"a picture seen before": 0.3, "new images: first preview": 2.0, "new images: final": 10.0}  # seconds


def times(explorer: Explorer, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by what was waited for."""
    found = {name: [] for name in LIMITS}
    explorer.watch()
    for seed in range(1, rounds + 1):
        new = until_shown(explorer, "ArrowRight", seed)
        found["new images: first preview"].append(new[0])
        found["new images: final"].append(new[-1])
        until_shown(explorer, "ArrowLeft", seed - 1)
        found["a picture seen before"].append(until_shown(explorer, "ArrowRight", seed)[-1])
    return found


def until_shown(explorer: Explorer, key: str, seed: int) -> list[float]:
    """Press a key and wait for the final picture; seconds from the key to every picture."""
    explorer.press("first seed", key)
    explorer.until(rf"mean difference .* seeds {seed} …")
    explorer.page.wait_for_timeout(300)  # the caption may come before the picture's own event
    (_, begin), *events = explorer.noted()
    return [(end - begin) / 1000 for what, end in events if what == "picture"]


def measure(rounds: int, wait: bool) -> tuple[pd.DataFrame, str]:
    """The table, and the browser's version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "lab"
        folder.mkdir()
        notebook = write_copy(NOTEBOOK, folder / NOTEBOOK.name, {"out": str(folder / "out"), "iterations": 5})
        with server(folder, Path(name) / "jupyterlab.log") as address, browser() as chromium:
            lab = Lab(chromium, address)
            lab.open(notebook.name)
            lab.run_all()
            if wait:
                input("ready; Enter starts the measurement ")
            found = times(Explorer(lab, "images"), rounds)
            lab.end_kernels()
            made_by = f"Chromium {chromium.version}"
    rows = [
        {"what": what, "median s": f"{statistics.median(s):.2f}", "worst s": f"{max(s):.2f}", "wanted s": LIMITS[what]}
        for what, s in found.items()
    ]
    return pd.DataFrame(rows), made_by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the kernel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wait", action="store_true", help="for Enter between Run All and the measurement")
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.md")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(options.threads)
    table, chromium = measure(options.rounds, options.wait)
    notes = [
        f"{device_name(threads=options.threads)}; {versions('jupyterlab', 'ipywidgets', 'ipykernel')}, {chromium}.",
        f"8 new images of each of two models, 20 steps, CFG 1.5; {options.rounds} rounds.",
    ]
    report("From a key on a slider to the picture", table, notes, options.save)


if __name__ == "__main__":
    main()
