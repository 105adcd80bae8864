"""A calibration run on disk: settings, records as they happen, checkpoints, and a lock.

    <run>/run.json            settings and where they came from
    <run>/records.jsonl       one JSON object per step
    <run>/state.safetensors   the last checkpoint

Files are replaced as a whole; records are appended, and a line that a kill has torn is dropped on the next start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vqlib.system.files import copies, remove_remains, write_bytes, write_tensors

CHANGE_NO_STEP = ("calibration.checkpoint_every", "calibration.activation_checkpointing")
MAY_DIFFER = ("calibration.iterations", *CHANGE_NO_STEP)
TIMELESS = {"lr_decay": "constant", "freeze_rule": "threshold"}  # else a step depends on how many the run will have


@dataclass(frozen=True)
class Record:
    """What one calibration step saw. Lists run over blocks or, in `layers`, over quantized layers in forward order."""

    iteration: int  # 1 after the first step
    block_losses: list[float]  # L_d of every block
    ratio_loss: float  # Σ over layers of L_r, a mean over all sub-vectors, frozen ones too; 0.0 with nothing to choose
    layers: dict[str, dict[str, Any]]  # name -> frozen, moved, entropy (nats), unused codewords, histogram of max r
    seconds: float  # of this step
    memory: int  # peak bytes so far
    output_loss: float | None = None  # mean squared difference of what `Trajectory.matched` compares

    @property
    def loss(self) -> float:
        """Σ_l L_d over the blocks."""
        return sum(self.block_losses)

    def mean(self, key: str) -> float:
        """A per-layer figure (`frozen`, `moved`, `entropy`) averaged over sub-vectors."""
        total = sum(layer["count"] for layer in self.layers.values())
        return sum(layer[key] * layer["count"] for layer in self.layers.values()) / max(total, 1)


class RunFolder:
    """One holder's grip on `<run>`. Raises RuntimeError where somebody else has it or the settings differ."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(folder).expanduser()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", thread_local=False)  # whichever thread closes it
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = "another process, or a run of this one that was not closed"
            raise RuntimeError(f"{self.path} is in use by {holder}; close it, or give `out` another folder") from None
        self._records = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        try:
            for name in ("run.json", "records.jsonl", "state.safetensors"):
                remove_remains(self.path / name)
            self._check_settings(settings)
        except BaseException:  # whatever it is, the folder is free again
            self.close()
            raise

    def close(self) -> None:
        """Give the folder back, once the last checkpoint is written."""
        try:
            self.wait()
        finally:
            try:
                self._writer.shutdown()
            finally:  # even where a second interrupt does not wait
                records, self._records = self._records, None
                try:
                    if records:
                        records.close()  # which writes what could not be written before
                finally:
                    self._lock.release()

    def append(self, record: Record) -> None:
        """Add one line to records.jsonl."""
        if self._records is None:
            self._records = open(self.path / "records.jsonl", "a", encoding="utf-8")
        self._records.write(json.dumps(asdict(record)) + "\n")
        self._records.flush()

    def save(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Write the checkpoint of `iteration` in place of the last one.

        On a GPU it is copied to the host now and written while the run goes on; what went wrong there is raised by the
        next `save`, by `wait`, or by `close`. A run on the CPU waits: it could spare neither the cores nor the memory.
        """
        if not on_accelerator(tensors):
            return self._write(tensors, iteration)
        try:
            self.wait()
        finally:  # whatever became of the one before
            self._writing = self._writer.submit(self._write, copies(tensors), iteration)

    def wait(self) -> None:
        """Until the checkpoint saved last is on the disk."""
        if self._writing:
            wait([self._writing])  # an interrupt here leaves it to be waited for again
            written, self._writing = self._writing, None
            written.result()

    def _write(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """A method, so that in the writer's thread the folder's lock lives as long as its writing."""
        write_tensors(self.path / "state.safetensors", tensors, {"iteration": str(iteration)})

    def load(self, iterations: int) -> tuple[dict[str, Tensor], int] | None:
        """Tensors and iteration of the last checkpoint, or None; records after it are dropped from records.jsonl.

        RuntimeError where the checkpoint is damaged, or of more iterations than the run is to have.
        """
        path = self.path / "state.safetensors"
        if not path.exists():
            self._keep_records(0)
            return None
        try:
            with safe_open(path, "pt") as file:
                iteration = int(file.metadata()["iteration"])
            tensors = load_file(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"{path} is damaged ({error}); remove it to start the run anew") from None
        if iteration > iterations:
            raise RuntimeError(f"{self.path} has {iteration} iterations done, more than iterations={iterations}")
        self._keep_records(iteration)
        return tensors, iteration

    def _keep_records(self, iteration: int) -> None:
        path = self.path / "records.jsonl"
        if path.exists():
            kept = [asdict(r) for r in read_records(self.path) if r.iteration <= iteration]
            write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Keep the settings of a new run, compare those of an old one; what changes no step may differ, and is kept as it is now."""
        path = self.path / "run.json"
        settings = json.loads(json.dumps(settings))
        old = read_settings(path) if path.exists() else settings
        given = settings.get("calibration", {})
        timed = [f"{name}={given[name]!r}" for name in TIMELESS if given.get(name, TIMELESS[name]) != TIMELESS[name]]
        for key, before, now in differences(old, settings):
            follows = f", which {timed[0]} follows" if timed and key == "calibration.iterations" else ""
            if key not in MAY_DIFFER or follows:
                found = f"{self.path} holds a run with {key}={before}, now {key}={now}"
                raise RuntimeError(f"{found}{follows}; give `out` another folder")
        if old != settings or not path.exists():
            write_bytes(path, (json.dumps(settings, indent=2) + "\n").encode())


def read_settings(path: Path) -> dict[str, Any]:
    """What a run.json says. Raises OSError where it cannot be read, RuntimeError where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"{path} is damaged ({error}); remove its folder to start the run anew") from None


def on_accelerator(tensors: dict[str, Tensor]) -> bool:
    """Whether some of the tensors are not on the CPU."""
    return any(tensor.device.type != "cpu" for tensor in tensors.values())


def read_records(folder: str | Path) -> list[Record]:
    """The records of a run, finished or going on; a last line that is still being written is left out.

    Raises RuntimeError naming a line before it that is damaged.
    """
    path = Path(folder).expanduser() / "records.jsonl"
    records, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number < len(lines):
                raise RuntimeError(f"{path}: line {number} of {len(lines)} is damaged ({error})") from None
    return records


def differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings in which two runs differ: dotted name, value of the one, of the other."""
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
