"""A calibration while it runs: losses, frozen share, time left, and buttons to pause, go on and stop."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from vqlib.calibrator.calibrate import Calibration
from vqlib.calibrator.runs import Record, read_records
from vqlib.explore.records import run_name
from vqlib.explore.view import Picture, Settings, Task, View
from vqlib.figures import loss_curves, records_frame
from vqlib.figures.records import LOSSES, trained_on
from vqlib.packed.harden import harden

REDRAW_EVERY = 1.0  # seconds
ETA_STEPS = 20  # steps whose mean time the estimate is made of


class RunView(View):
    """Makes the steps of a calibration on a thread of its own and redraws about once a second.

    `finish()` waits and returns the packed transformer; `await view.finished()` does the same and leaves the buttons alive
    while its cell waits. A stopped run keeps its last step in its folder: `vqlib.calibrate` with the same settings and
    folder goes on.
    """

    name = "run"

    def __init__(self, calibration: Calibration, out: str | Path = "figures") -> None:
        super().__init__([], out)
        self.calibration = calibration
        self.subject = run_name(calibration.folder.path) if calibration.folder else ""
        before = calibration.iteration and calibration.folder
        self.records: list[Record] = read_records(calibration.folder.path) if before else []
        self.state = "running"  # or paused, stopped, finished, failed
        self.actions = {"Pause": self.pause, "Resume": self.resume, "Stop": self.stop}
        self._go, self._first = threading.Event(), threading.Event()
        self._go.set()
        self._drawn = 0.0
        self._thread = threading.Thread(target=self._run, name="vqlib-calibration", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Hold after the step that is being made."""
        if self.state == "running":
            self.state = "paused"
            self._go.clear()
            if self.records:
                self.request()

    def resume(self) -> None:
        """Go on after a pause."""
        if self.state == "paused":
            self.state = "running"
            self._go.set()

    def stop(self) -> None:
        """End the run after the step that is being made, and keep that step in the run's folder."""
        if self.state in ("running", "paused"):
            self.state = "stopped"
            self._go.set()

    def end(self) -> None:
        """Stop the run after the step that is being made, and keep that step."""
        self.stop()
        self._thread.join()
        super().end()

    def wait(self, timeout: float | None = None) -> None:
        """Until the run has ended and its last picture is shown; an interrupt pauses it. Raises what went wrong."""
        try:
            self._drawing.wait(lambda: not self._thread.is_alive(), timeout)
        except KeyboardInterrupt:
            self.pause()
            raise
        super().wait(timeout)

    def finish(self) -> nn.Module:
        """Wait for the end or a stop, and return the packed transformer as far as it was calibrated."""
        self.wait()
        return harden(self.calibration.student)

    async def finished(self) -> nn.Module:
        """As `finish()`, in a cell as `await view.finished()`: buttons and sliders work while it waits.

        An interrupt pauses the run. ipykernel 7.4 delivers clicks to a cell that awaits; older ones may hold them back
        until it has ended.
        """
        try:
            while self._thread.is_alive():
                await asyncio.sleep(0.05)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.pause()
            raise
        return self.finish()

    def still(self) -> Picture:
        """The run as it is now; before its first step, wait for that."""
        self._first.wait()
        if self.error is not None:
            raise self.error
        self.shown = self.picture({}, None).rendered()
        return self.shown

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """Curves of all steps so far. ValueError where none was made and none is kept."""
        if not self.records:
            raise ValueError(f"{self.state}: no step was made here and no records of a run are kept; nothing to draw")
        frame = records_frame(list(self.records))
        if frame["frozen"].min() == 1.0:  # nothing to choose, nothing to freeze
            frame = frame.drop(columns=["ratio_loss", "frozen"])
        return Picture(partial(_draw, frame, self.calibration.config.iterations), self._caption(frame), frame)

    def _caption(self, frame: pd.DataFrame) -> str:
        done, total = int(frame["iteration"].iloc[-1]), self.calibration.config.iterations
        loss = trained_on(frame)
        parts = [f"{self.state}: iteration {done} of {total}", f"{LOSSES[loss]} {frame[loss].iloc[-1]:.4g}"]
        if "frozen" in frame:
            parts.append(f"frozen {frame['frozen'].iloc[-1]:.1%}")
        seconds = frame["seconds"].tail(ETA_STEPS).mean()
        parts.append(f"{seconds:.2g} s a step")
        if self.state in ("running", "paused"):
            parts.append(f"{_duration(seconds * (total - done))} left")
        return " · ".join(parts)

    def _key(self, settings: Settings) -> tuple:
        return len(self.records), self.state

    def _run(self) -> None:
        """The steps, one after another; the thread's whole life."""
        try:
            while self.state in ("running", "paused") and self.calibration.remaining:
                if not self._go.wait(0.1):
                    continue
                if self.state == "running":
                    self._step()
            if self.state in ("running", "paused"):
                self.state = "finished"
            else:
                self.calibration.checkpoint()
        except Exception as error:
            self.state = "failed"
            with self._lock:
                self._newest += 1  # a picture on its way is not wanted any more: it would stand for the error
                self._fail(error, Task(self, self._newest))
        finally:
            self._first.set()
            self.calibration.close()
        if self.state != "failed" and self.records:
            self.request()

    def _step(self) -> None:
        self.records.append(next(self.calibration))
        self._first.set()
        drawn = self._finished >= self._newest  # a machine that draws slowly must not overtake its own pictures
        if drawn and time.monotonic() - self._drawn >= REDRAW_EVERY:
            self._drawn = time.monotonic()
            self.request()


def _draw(frame: pd.DataFrame, iterations: int, titled: bool) -> Figure:
    done = int(frame["iteration"].iloc[-1])
    return loss_curves(frame, f"Step {done} of {iterations}" if titled else None)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
