"""What every benchmark states: the device, its versions, and where the table of results goes."""

import argparse
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from vqlib.figures.tables import markdown
from vqlib.system.files import write_bytes

RESULTS = Path(__file__).parent / "results"


def device_name(device: torch.device | str = "cpu", threads: int | None = None) -> str:
    """Name of the GPU, or of the processor with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {threads or torch.get_num_threads()} threads"


def processor() -> str:
    """Name of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*names: str) -> str:
    """Python, torch and the named packages, with their versions."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", *names):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def add_options(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Options of every benchmark: the device where it can be chosen, threads, and the name of the file in results/."""
    if device:
        parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.md")


def origin() -> str:
    """The commit and the command that a result comes from; a tree with changes is told apart."""
    here = Path(__file__).resolve().parents[1]
    described = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(here)), *sys.argv[1:]])
    return f"Commit {commit}: `{command}`"


def report(title: str, rows: pd.DataFrame, notes: list[str], name: str | None = None) -> None:
    """Print a table with what was measured on what; with a name also write it to results/<name>.md."""
    text = "\n".join([f"# {title}", "", *notes, "", markdown(rows, formats=None), origin()]) + "\n"
    print(text)
    if name:
        write_bytes(RESULTS / f"{name}.md", text.encode())
