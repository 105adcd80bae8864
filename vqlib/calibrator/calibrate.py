"""Block-wise, zero-data calibration: one `Record` per step, interruptible, resumable, bit-equal on CPU after a resume.

While the full-precision model makes one forward pass, each block's student is evaluated on that block's inputs,
differentiated and stepped before the next block runs: memory holds the graph of one block only.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.calibrator.losses import RATIO_LOSSES, block_loss
from vqlib.calibrator.optimizers import BlockOptimizers, with_prefix
from vqlib.calibrator.runs import Record, RunFolder
from vqlib.calibrator.trajectory import Inputs, Trajectory, teacher_output
from vqlib.config import CalibrationConfig
from vqlib.kernels.products import products_in
from vqlib.models import dit, pipeline
from vqlib.packed.harden import harden
from vqlib.quantizer.soft import CandidateLinear, soft_layers
from vqlib.system.fingerprint import fingerprint
from vqlib.system.memory import keep_freed_memory, peak_memory

SETTLED = 0.99  # share of frozen sub-vectors from which a layer's codebook trains, with train_codebooks="frozen"


def calibrate(
    pipe: pipeline.Pipeline, model: nn.Module, config: CalibrationConfig | None = None, out: str | Path | None = None
) -> Calibration:
    """Calibrate `model` (from `quantize`) against `pipe.transformer`, in place; iterate for Records, then `.finish()`.

    With `out` the run is kept in that folder: an unfinished run of the same settings goes on from its last checkpoint.
    Raises RuntimeError where the folder holds other settings or another process, ValueError where nothing is to be trained.
    """
    return Calibration(pipe, model, config or CalibrationConfig(), out)


class Calibration(Iterator[Record]):
    """A run in progress: `iteration` steps are done, `next()` makes one more, `finish()` makes the rest and packs."""

    def __init__(
        self, pipe: pipeline.Pipeline, model: nn.Module, config: CalibrationConfig, out: str | Path | None
    ) -> None:
        if not any(isinstance(m, CandidateLinear) for m in model.modules()):
            raise ValueError("the model has no CandidateLinear layer; make one with vqlib.quantize")
        keep_freed_memory()
        self.pipe, self.student, self.config = pipe, model, config
        self.layers = soft_layers(model)
        self.blocks = dit.block_list(model)
        names = {layer: name for name, layer in self.layers.items()}
        self.parts = {p: {names[m]: m for m in soft_layers(p).values()} for p in (*self.blocks, model)}
        self._prepare_parameters()
        self.optimizers = BlockOptimizers(self.blocks, config)
        self.trajectory = Trajectory(pipe, config)
        self.iteration, self.ratio_minimum = 0, math.inf
        self.settled = {name: layer.logits is None for name, layer in self.layers.items()}
        self.final: dict[str, dict] = {}  # the record's figures of layers in which nothing is left to choose
        self.folder = RunFolder(out, self._settings()) if out is not None else None
        try:
            if not self._resume():
                self.trajectory.stagger(partial(teacher_output, pipe))
        except BaseException:
            self.close()
            raise

    @property
    def remaining(self) -> int:
        """Steps still to make; the length a progress bar needs."""
        return self.config.iterations - self.iteration

    def __len__(self) -> int:
        return self.remaining

    def __next__(self) -> Record:
        """One optimizer step. An interrupt during it is raised after it, so the run can simply be continued."""
        if self.remaining <= 0:
            raise StopIteration
        with _interrupt_after():
            record = self._step()
            if self.folder:
                self.folder.append(record)
                if self.remaining == 0:
                    self.checkpoint()
                elif self.config.checkpoint_every and self.iteration % self.config.checkpoint_every == 0:
                    self.folder.save(self._state(), self.iteration)
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
        self.optimizers.start(self.iteration)
        push = self._push_ratios()
        pass_through = self._end_to_end if self.config.block_inputs == "end-to-end" else self._streaming
        with products_in(getattr(torch, self.config.products)):
            output, losses = pass_through(inputs, push)
        self.trajectory.advance(output)
        self.iteration += 1
        layers = {name: self._settle(name, layer) for name, layer in self.layers.items()}
        ratio_loss = sum(layer.pop("ratio_loss") for layer in layers.values())
        return Record(
            self.iteration,
            losses,
            ratio_loss,
            layers,
            time.perf_counter() - started,
            peak_memory(self.trajectory.device),
        )

    def _streaming(self, inputs: Inputs, push: bool) -> tuple[Tensor, list[float]]:
        """One teacher forward; every block's student follows inside it. Returns the teacher's output and L_d per block."""
        losses: list[float] = []
        carried: list[Tensor] = []  # the student's own activations, with block_inputs="student"

        def follow(index: int):
            def hook(block, args, kwargs, output):
                hidden = carried.pop() if carried else args[0]
                with torch.enable_grad():
                    own = self.blocks[index](hidden, *args[1:], **kwargs)
                    loss = block_loss(own, output)
                    self._backward(self._lambda_d(output) * loss, self.blocks[index], push)
                losses.append(loss.item())
                self.optimizers.step(index)
                if self.config.block_inputs == "student":
                    carried.append(own.detach())

            return hook

        with ExitStack() as hooks:
            for index, block in enumerate(dit.block_list(self.pipe.transformer)):
                hooks.callback(block.register_forward_hook(follow(index), with_kwargs=True).remove)
            output = teacher_output(self.pipe, inputs)
        self.optimizers.step_shared()
        return output, losses

    def _end_to_end(self, inputs: Inputs, push: bool) -> tuple[Tensor, list[float]]:
        """The student on its own activations, one graph through all blocks, as the release; needs memory for all of it."""
        targets, own = [], []
        with ExitStack() as hooks:
            for block in dit.block_list(self.pipe.transformer):
                hooks.callback(block.register_forward_hook(lambda b, a, out: targets.append(out)).remove)
            for block in self.blocks:
                hooks.callback(block.register_forward_hook(lambda b, a, out: own.append(out)).remove)
            output = teacher_output(self.pipe, inputs)
            student_output = dit.forward(self.student, inputs.x, inputs.timestep, inputs.labels)
        losses = [block_loss(a, b) for a, b in zip(own, targets, strict=True)]
        loss = self._lambda_d(targets[0], len(losses)) * sum(losses)
        if self.config.loss_at == "output":
            loss = self._lambda_d(output) * block_loss(student_output, output)
        self._backward(loss, self.student, push)
        for index in range(len(self.blocks)):
            self.optimizers.step(index)
        self.optimizers.step_shared()
        return output, [loss.item() for loss in losses]

    def _lambda_d(self, output: Tensor, blocks: int = 1) -> float:
        """What a sum of `blocks` means is weighed by: as Eq. 8's sum over tokens, channels and blocks, or as one mean."""
        return self.config.lambda_d * (output[0].numel() if self.config.block_loss == "sum" else 1 / blocks)

    def _backward(self, loss: Tensor, part: nn.Module, push: bool) -> None:
        """Gradients of λ_d L_d + λ_r L_r (Eq. 10) for the layers of `part`; L_r needs no graph, it sees the logits alone."""
        loss.backward()
        if push:
            for z in (layer.logits for layer in self.parts[part].values() if layer.logits is not None):
                if z.grad is not None:
                    kernels.add_ratio_gradient(self.config.ratio_loss, z, z.grad, self.config.lambda_r)
        if self.config.train_codebooks == "frozen":
            waiting = {id(layer.codebook) for name, layer in self.layers.items() if not self.settled[name]}
            for layer in self.parts[part].values():
                if id(layer.codebook) in waiting:  # a shared codebook waits for the last of its layers
                    layer.codebook.grad = None
                    if layer.scale is not None:
                        layer.scale.grad = None

    def _push_ratios(self) -> bool:
        """Whether L_r takes part in this step."""
        logits = [layer.logits for layer in self.layers.values() if layer.logits is not None]
        if not logits or self.config.ratio_loss_when == "never":
            return False
        if self.config.ratio_loss_when == "always":
            return True
        with torch.no_grad():
            value = sum(RATIO_LOSSES[self.config.ratio_loss](z).item() for z in logits)
        rising = value > self.ratio_minimum
        self.ratio_minimum = min(self.ratio_minimum, value)
        return rising

    def _settle(self, name: str, layer: CandidateLinear) -> dict:
        """Freeze what has passed the threshold; the layer's figures for the record."""
        if name in self.final:
            return dict(self.final[name])
        figures = {"count": len(layer.candidates), "frozen": 1.0, "moved": 0.0, "entropy": 0.0, "ratio_loss": 0.0}
        winners = torch.zeros(len(layer.candidates), dtype=torch.uint8, device=layer.candidates.device)
        if layer.logits is not None:
            ratios = kernels.settle_ratios(layer.logits.data, self._threshold(layer.logits.data), freeze=True)
            figures |= {"frozen": ratios.frozen, "moved": ratios.winners_not_first, "entropy": ratios.entropy}
            figures |= {"histogram": ratios.histogram.tolist(), "ratio_loss": getattr(ratios, self.config.ratio_loss)}
            self.settled[name] = ratios.frozen > SETTLED
            winners = ratios.winners
        k = len(layer.codebook)
        figures["unused"] = k - kernels.used_codewords(layer.candidates, winners, k)
        if figures["frozen"] == 1.0 and figures["entropy"] == 0.0:
            self.final[name] = dict(figures)
            if layer.logits is not None:
                layer.settle()
                self.optimizers.forget(layer.logits)
        return figures

    def _threshold(self, logits: Tensor) -> float:
        """The largest ratio above which sub-vectors of a layer are frozen in this step."""
        if self.config.freeze_rule == "threshold":
            return self.config.freeze_above
        start, stop = self.config.freeze_from, self.config.freeze_until
        share = (self.iteration / self.config.iterations - start) / (stop - start)
        if not 0.0 < share < 1.0:
            return 1.0 if share <= 0.0 else 0.0
        largest = kernels.largest_ratios(logits)
        return largest.kthvalue(max(1, round(len(largest) * (1.0 - share)))).values.item()

    def _prepare_parameters(self) -> None:
        """Only logits, codebooks, layer scales and biases of the quantized layers are trained."""
        self.student.eval().requires_grad_(False)
        for layer in self.layers.values():
            if layer.logits is not None:
                layer.logits.requires_grad_(True)
            layer.codebook.requires_grad_(self.config.train_codebooks != "never")
            if layer.scale is not None:
                layer.scale.requires_grad_(self.config.train_codebooks != "never")
            if layer.bias is not None:
                layer.bias.requires_grad_(self.config.train_biases)
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ValueError("nothing to train: candidates=1, train_codebooks='never', train_biases=False")

    def _settings(self) -> dict:
        name, layer = next(iter(self.layers.items()))
        geometry = {"layers": len(self.layers), "first_layer": name}
        geometry |= {"k": len(layer.codebook), "d": layer.codebook.shape[1], "candidates": layer.candidates.shape[1]}
        geometry |= {"codebooks": len({id(layer.codebook) for layer in self.layers.values()})}
        geometry |= {"sha256": fingerprint(self.student), "teacher_sha256": fingerprint(self.pipe.transformer)}
        return {"calibration": self.config.to_dict(), "student": geometry}

    def _state(self) -> dict[str, Tensor]:
        state = {f"student.{n}.{k}": v for n, m in self.layers.items() for k, v in m.state_dict().items()}
        state |= {f"trajectory.{k}": v for k, v in self.trajectory.state().items()}
        state |= {f"optimizer.{k}": v for k, v in self.optimizers.state().items()}
        flags = torch.tensor([self.settled[name] for name in self.layers])
        return state | {"settled": flags, "ratio_minimum": torch.tensor(self.ratio_minimum, dtype=torch.float64)}

    def _resume(self) -> bool:
        found = self.folder.load() if self.folder else None
        if found is None:
            return False
        state, self.iteration = found
        for name, layer in self.layers.items():
            layer.load_state_dict({k: state[f"student.{name}.{k}"] for k in layer.state_dict()})
        self.trajectory.load_state(with_prefix(state, "trajectory."))
        self.optimizers.load_state(with_prefix(state, "optimizer."))
        self.settled = dict(zip(self.layers, state["settled"].tolist(), strict=True))
        self.ratio_minimum = state["ratio_minimum"].item()
        return True


@contextmanager
def _interrupt_after() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, so that a step is made wholly or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt
