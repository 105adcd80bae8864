"""Block-wise, zero-data calibration: one `Record` per step, interruptible, resumable, bit-equal on CPU after a resume.

While the full-precision model makes one forward pass, each block's student is evaluated on that block's inputs,
differentiated and stepped (`BlockStep`) before the next block runs: memory holds the graph of one block only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.calibrator.block import BlockRecord, Moment, Passed, block_steps, waiting_codebooks
from vqlib.calibrator.losses import block_loss, distance_weight
from vqlib.calibrator.optimizers import BlockOptimizer, prepare_parameters
from vqlib.calibrator.runs import Record, RunFolder
from vqlib.calibrator.teacher import (
    following,
    outputs_of,
    require_counterpart,
    require_finite,
    teacher_forward,
    teacher_output,
)
from vqlib.calibrator.trajectory import Inputs, Trajectory
from vqlib.config import CalibrationConfig
from vqlib.models import structure
from vqlib.models.denoiser import Output, handed_on
from vqlib.models.modulation import SharedEmbedder
from vqlib.models.pipeline import Pipeline
from vqlib.packed.harden import harden
from vqlib.quantizer.soft import soft_layers
from vqlib.system.fingerprint import fingerprint
from vqlib.system.interrupts import interrupt_after
from vqlib.system.memory import forget_peak, keep_freed_memory, peak_memory


def calibrate(
    pipe: Pipeline, model: nn.Module, config: CalibrationConfig | None = None, out: str | Path | None = None
) -> Calibration:
    """Calibrate `model` (from `quantize`) against `pipe.transformer`, in place; iterate for Records, then `.finish()`.

    With `out` the run is kept in that folder: a stopped run of the same settings, teacher and codes goes on from its last
    checkpoint, whatever machine it was started on; `checkpoint_every` may differ, and `iterations` where neither rates nor
    freezing follow the length (lr_decay="constant", freeze_rule="threshold"). Raises RuntimeError where the folder holds
    other settings or another process, ValueError where nothing is to be trained or the two models do not belong together,
    FloatingPointError at the first loss or output that is not finite.
    """
    return Calibration(pipe, model, config or CalibrationConfig(), out)


class Calibration(Iterator[Record]):
    """A run in progress: `iteration` steps are done, `next()` makes one more, `finish()` makes the rest and packs."""

    def __init__(self, pipe: Pipeline, model: nn.Module, config: CalibrationConfig, out: str | Path | None) -> None:
        keep_freed_memory()
        model = structure.unwrapped(model)
        self.pipe, self.student, self.config = pipe, model, config
        self.layers = soft_layers(model)
        if not self.layers:
            raise ValueError("the model has no CandidateLinear layer; make one with vqlib.quantize")
        require_counterpart(pipe.transformer, model)
        prepare_parameters(model, config)
        self.blocks, self.shared = block_steps(model, config)
        self.trajectory = Trajectory(pipe, config)
        self.embedder = SharedEmbedder(pipe.transformer, model)
        forget_peak(self.trajectory.device)
        self.iteration, self.ratio_minimum = 0, math.inf
        self.folder = RunFolder(out, self._settings()) if out is not None else None
        try:
            if not self._resume():
                with structure.precision(config.products, pipe.transformer):
                    self.trajectory.stagger(partial(teacher_output, pipe))
                if self.folder:  # the start itself: made again, on another processor, it may differ in its last bits
                    self.folder.save(self._state(), 0)
        except BaseException:
            self.close()
            raise

    @property
    def remaining(self) -> int:
        """Steps still to make; the length a progress bar needs."""
        return max(0, self.config.iterations - self.iteration)

    def __len__(self) -> int:
        return self.remaining

    def __next__(self) -> Record:
        """One optimizer step. An interrupt during it is raised after it, so the run can simply be continued.

        Any other error gives the run folder back; the run can be resumed from its last checkpoint.
        """
        if self.remaining == 0:
            raise StopIteration
        try:
            with interrupt_after():
                record = self._step()
                if self.folder:
                    self.folder.append(record)
                    every = self.config.checkpoint_every
                    if self.remaining == 0 or (every and self.iteration % every == 0):
                        self.folder.save(self._state(), self.iteration)
                    if self.remaining == 0:
                        self.folder.wait()
        except Exception:
            with suppress(Exception):  # the first error is the one to tell
                self.close()
            raise
        return record

    def checkpoint(self) -> None:
        """Keep the step made last in the run folder, if there is one, whatever `checkpoint_every` says."""
        if self.folder:
            self.folder.save(self._state(), self.iteration)
            self.folder.wait()

    def finish(self) -> nn.Module:
        """Make the remaining steps, give the folder back, and return the packed transformer."""
        for _ in self:
            pass
        self.close()
        return harden(self.student)

    def close(self) -> None:
        """Release the run folder; the run can be resumed from its last checkpoint."""
        folder, self.folder = self.folder, None
        if folder:
            folder.close()

    def _step(self) -> Record:
        started = time.perf_counter()
        inputs = self.trajectory.inputs()
        moment = Moment(self.iteration + 1, self._push_ratios(), waiting_codebooks(self.blocks, self.config))
        pass_through = self._end_to_end if self.config.block_inputs == "end-to-end" else self._streaming
        with structure.precision(self.config.products, self.pipe.transformer, self.student), self.embedder.working():
            passed = pass_through(inputs, moment)
        records, count = passed.records, len(passed.records)
        seen = [*(record.loss for record in records), *passed.distances]
        losses, rows, fine = read_back(seen, [record.rows for record in records], passed.output)
        losses, distances = losses[:count], losses[count:]
        for step, loss in zip(self.blocks, losses, strict=True):
            step.checked(loss, moment)
        if not all(map(math.isfinite, distances)):
            raise FloatingPointError(f"step {moment.iteration}: the loss of the output is {distances[0]}")
        require_finite(self.pipe, fine)
        self.trajectory.advance(passed.output, passed.led)
        self.iteration += 1
        layers = {n: f for step, own in zip(self.blocks, rows, strict=True) for n, f in step.conclude(own).items()}
        ratio_loss = sum(figures.pop("ratio_loss") for figures in layers.values())
        seconds, memory = time.perf_counter() - started, peak_memory(self.trajectory.device)
        return Record(self.iteration, losses, ratio_loss, layers, seconds, memory, *distances)

    def _streaming(self, inputs: Inputs, moment: Moment) -> Passed:
        """One teacher forward; every block's student follows inside it."""
        records: list[BlockRecord] = []

        def follow(index: int, args: tuple, kwargs: dict, output: Output) -> None:
            if self.config.block_inputs == "student" and records:
                args, kwargs = handed_on(records[-1].output, self.pipe.denoiser.streams, args, kwargs)
            records.append(self.blocks[index].step((args, kwargs), output, moment))

        with following(self.pipe.transformer, follow):
            output = teacher_forward(self.pipe, inputs)
        self.shared.step(moment.iteration, torch.stack([record.loss for record in records]).sum())
        return Passed(output, records, [])

    def _end_to_end(self, inputs: Inputs, moment: Moment) -> Passed:
        """The student on its own activations, one graph through all blocks; memory for all of it unless checkpointed."""
        with outputs_of(self.pipe.transformer) as targets:
            output = teacher_forward(self.pipe, inputs)
        with outputs_of(self.student, self.config.activation_checkpointing) as own:
            taken = self.trajectory.student_inputs()
            led = self.pipe.output(*taken, model=self.student)
        with torch.set_grad_enabled(not self.config.on_output):  # else only for the record: no graph is kept for it
            distances = [block_loss(a, b) for a, b in zip(own, targets, strict=True)]
        compared, at = distances, targets[0]
        if self.config.on_output:
            matched = self.trajectory.matched
            compared, at = [block_loss(matched(led, taken), matched(output, inputs))], output
        loss = distance_weight(self.config, at, len(compared)) * sum(compared)
        loss.backward()
        for step in self.blocks:
            step.add_gradients(moment)
        seen = [step.update(loss.detach(), moment) for step in self.blocks]
        self.shared.step(moment.iteration, loss.detach())
        records = [BlockRecord(d.detach(), a, row) for d, a, row in zip(distances, own, seen, strict=True)]
        trained_on = [] if compared is distances else [compared[0].detach()]
        return Passed(output, records, trained_on, led.detach() if self.config.path == "student" else None)

    def _push_ratios(self) -> bool:
        """Whether L_r takes part in this step."""
        logits = [layer.logits for layer in self.layers.values() if layer.logits is not None]
        if not logits or self.config.ratio_loss_when == "never":
            return False
        if self.config.ratio_loss_when == "always":
            return True
        with torch.no_grad():
            value = sum(torch.stack([kernels.ratio_loss(self.config.ratio_loss, z) for z in logits]).tolist())
        rising = value > self.ratio_minimum
        self.ratio_minimum = min(self.ratio_minimum, value)
        return rising

    def _settings(self) -> dict[str, Any]:
        """What a run folder belongs to: settings, teacher, pipeline, what codes were asked to be, never their bits."""
        name, layer = next(iter(self.layers.items()))
        codes = {"layers": len(self.layers), "first_layer": name}
        codes |= {"k": len(layer.codebook), "d": layer.codebook.shape[1], "candidates": layer.candidates.shape[1]}
        codes |= {"codebooks": len({id(layer.codebook) for layer in self.layers.values()})}
        codes |= {"quantized_with": getattr(self.student, "quantized_with", None)}
        codes |= {"teacher_sha256": fingerprint(self.pipe.transformer)}
        return {"calibration": self.config.to_dict(), "student": codes, "pipeline": self.pipe.identity()}

    def _state(self) -> dict[str, Tensor]:
        state = {f"student.{n}.{k}": v for n, m in self.layers.items() for k, v in m.state_dict().items()}
        state |= {f"trajectory.{k}": v for k, v in self.trajectory.state().items()}
        for i, optimizer in enumerate(self.optimizers()):
            state |= {f"optimizer.{i}.{k}": v for k, v in optimizer.state().items()}
        flags = torch.tensor([flag for step in self.blocks for flag in step.settled.values()])
        return state | {"settled": flags, "ratio_minimum": torch.tensor(self.ratio_minimum, dtype=torch.float64)}

    def optimizers(self) -> list[BlockOptimizer]:
        """One a block, and that of what blocks share."""
        return [*(step.optimizer for step in self.blocks), self.shared]

    def _resume(self) -> bool:
        """Take up the run of the folder where there is one."""
        found = self.folder.load(self.config.iterations) if self.folder else None
        if found is None:
            return False
        state, self.iteration = found
        for name, layer in self.layers.items():
            layer.load_state_dict({k: state[f"student.{name}.{k}"] for k in layer.state_dict()})
        self.trajectory.load_state(with_prefix(state, "trajectory."))
        for i, optimizer in enumerate(self.optimizers()):
            optimizer.load_state(with_prefix(state, f"optimizer.{i}."))
        flags = iter(state["settled"].tolist())
        for step in self.blocks:
            step.settled = {name: next(flags) for name in step.settled}
        self.ratio_minimum = state["ratio_minimum"].item()
        return True


def read_back(
    losses: list[Tensor], rows: list[list[Tensor]], output: Tensor
) -> tuple[list[float], list[list[list[float]]], bool]:
    """All that a step left on the device, in one copy: blocks' losses, their layers' rows, whether the output is finite.

    The only time that a step waits for its device.
    """
    parts = [torch.stack(losses).double(), output.isfinite().all().double()[None], *sum(rows, [])]
    numbers = iter(torch.cat(parts).tolist())
    found = [next(numbers) for _ in losses]
    fine = bool(next(numbers))
    return found, [[[next(numbers) for _ in range(len(row))] for row in own] for own in rows], fine


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
