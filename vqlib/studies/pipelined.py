"""One calibration over several devices: a pipeline of stages, each an actor of a Ray cluster or an object of this process.

The trajectory is here and follows the last stage's output; it runs ahead of the students, so that every stage works
while a batch is on its way. P stages take 1/P of the time as long as one pass through the full-precision model is no
longer than a stage's share of the step; beyond that the trajectory, which is sequential, is what all wait for.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vqlib.calibrator.calibrate import with_prefix
from vqlib.calibrator.hessians import BATCHES, require_batches
from vqlib.calibrator.runs import Record, RunFolder
from vqlib.calibrator.stages import Stage, StageRecord, block_file, needs_moments, require_independent
from vqlib.calibrator.trajectory import Inputs, Trajectory
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline
from vqlib.packed.checkpoint import attach
from vqlib.quantizer.quantize import fitting_layers
from vqlib.studies.on_ray import PLACES, demands, join, ray_module
from vqlib.studies.sources import Source
from vqlib.studies.tasks import Needs
from vqlib.system.fingerprint import fingerprint

PATIENCE = 30.0  # seconds after which it is told that the cluster has no room


class Place(Protocol):
    """Where stages are. What `call` gives may be given to another call; `value` is what it stands for."""

    def call(self, stage: int, method: str, *args) -> Any: ...

    def value(self, reference: Any) -> Any: ...

    def close(self) -> None: ...


class StagesHere:
    """All stages in this process, one after the other."""

    def __init__(self, pipe: Pipeline, vq: VQConfig, config: CalibrationConfig, cuts: list[tuple], seed: int) -> None:
        own = [pipe.with_transformer(copy.deepcopy(pipe.transformer)) for _ in cuts]
        self.stages = [Stage(one, vq, config, cut, seed) for one, cut in zip(own, cuts, strict=True)]

    def call(self, stage: int, method: str, *args) -> Any:
        return getattr(self.stages[stage], method)(*args)

    def value(self, reference: Any) -> Any:
        return reference

    def close(self) -> None:
        self.stages = []


class StagesOnRay:
    """A stage an actor, all of them placed at once or none; each loads the pipeline by its name and keeps its own part."""

    def __init__(
        self,
        source: Source,
        device: str,
        vq: VQConfig,
        config: CalibrationConfig,
        cuts: list[tuple],
        seed: int,
        needs: Needs,
    ) -> None:
        self._ray, self._own = ray_module(), join()
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": needs.cpus} | ({"GPU": needs.gpus} if needs.gpus else {})
        bundle |= {"memory": needs.memory} if needs.memory else {}
        self._group, self._remove = placement_group([bundle] * len(cuts), strategy="SPREAD"), remove_placement_group
        if not self._group.wait(PATIENCE):
            warnings.warn(
                f"the cluster has no room yet for {len(cuts)} stages of {bundle}: waiting for it", stacklevel=3
            )
        actor, self.actors = self._ray.remote(_Actor), []
        for index, cut in enumerate(cuts):
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            options = demands(needs) | {"name": None, "scheduling_strategy": where}
            self.actors.append(actor.options(**options).remote(source, device, (vq, config, cut, seed), needs.cpus))

    def call(self, stage: int, method: str, *args) -> Any:
        return self.actors[stage].call.remote(method, *args)

    def value(self, reference: Any) -> Any:
        return self._ray.get(reference)

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []
        self._remove(self._group)
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()


class _Actor:
    """A stage in a process of its own."""

    def __init__(self, source: Source, device: str, stage: Sequence[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.stage = Stage(source.load(device), *stage)

    def call(self, method: str, *args):
        return getattr(self.stage, method)(*args)


class Pipelined(Iterator[Record]):
    """A calibration whose steps are made by stages; iterate for Records, then `finish()`. `out`: as in `calibrate`.

    Records come once all stages have made a step, two steps behind the trajectory. Where the run is resumed, after a stage
    was lost, too, it may be cut otherwise. Raises ValueError for settings under which blocks are not independent.
    """

    def __init__(
        self,
        pipe: Pipeline,
        vq: VQConfig,
        config: CalibrationConfig,
        place: Place,
        stages: int,
        seed: int = 0,
        out: str | Path | None = None,
        batches: int = BATCHES,
    ) -> None:
        require_independent(vq, config)
        self.pipe, self.config, self.place, self.stages = pipe, config, place, range(stages)
        self.trajectory = Trajectory(pipe, config)
        self.iteration, self.begun = 0, 0
        self.records: deque = deque()  # what the stages will have seen in the steps that are begun
        settings = {"calibration": config.to_dict(), "quantization": vq.to_dict(), "seed": seed}
        settings |= {"batches": batches} if needs_moments(vq) else {}
        settings |= {"teacher_sha256": fingerprint(pipe.transformer), "pipeline": pipe.identity()}
        self.folder: RunFolder | None = None
        try:
            self.folder = RunFolder(out, settings) if out is not None else None
            if needs_moments(vq):
                self._gather(batches)
            if not self._resume():
                self.trajectory.stagger(lambda inputs: self.place.value(self._forward(inputs)))
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Record:
        """One more step by all stages."""
        if self.iteration == self.config.iterations:
            raise StopIteration
        started = time.perf_counter()
        while self.begun < self.config.iterations and len(self.records) < 2 and not self._kept_soon():
            self._begin()
        seen: list[StageRecord] = [self.place.value(reference) for reference in self.records.popleft()]
        self.iteration += 1
        record = _joined(self.iteration, seen, time.perf_counter() - started)
        if self.folder:
            self.folder.append(record)
            every = self.config.checkpoint_every
            if self.iteration == self.config.iterations or (every and self.iteration % every == 0):
                self._keep()
        return record

    def finish(self) -> nn.Module:
        """Make the remaining steps and return the packed transformer."""
        for _ in self:
            pass
        found = [self.place.value(self.place.call(stage, "packed")) for stage in self.stages]
        layers = {name: layer for part in found for name, layer in part.items()}
        self.close()
        return _with_layers(self.pipe.transformer, layers)

    def close(self) -> None:
        """Give stages and folder back; the run can be resumed from its last checkpoint."""
        self.place.close()
        if self.folder:
            self.folder.close()
            self.folder = None

    def _begin(self) -> None:
        """Send the next batch through the stages; their students follow behind it."""
        self.begun += 1
        output = self._forward(self.trajectory.inputs())
        self.records.append([self.place.call(stage, "learn", self.begun) for stage in self.stages])
        self.trajectory.advance(self.place.value(output).to(self.trajectory.device))

    def _forward(self, inputs: Inputs, method: str = "forward") -> Any:
        given = None
        for stage in self.stages:
            given = self.place.call(stage, method, inputs, given)
        return given

    def _gather(self, batches: int) -> None:
        """Second moments as `input_hessians` has them, every stage those of its own layers; then all stages quantize."""
        require_batches(batches)
        trajectory = Trajectory(self.pipe, self.config)
        trajectory.stagger(lambda inputs: self.place.value(self._forward(inputs)))
        for _ in range(batches):
            output = self.place.value(self._forward(trajectory.inputs(), "gather"))
            trajectory.advance(output.to(trajectory.device))
        for quantized in [self.place.call(stage, "quantize") for stage in self.stages]:
            self.place.value(quantized)

    def _kept_soon(self) -> bool:
        """Whether the step begun last is one after which the run is kept: nothing may be ahead of it then."""
        every = self.config.checkpoint_every
        return bool(self.folder and self.records and every and self.begun % every == 0)

    def _keep(self) -> None:
        """First all blocks, then the trajectory, which makes them count, then away with the blocks kept before."""
        before = set(self.folder.path.glob("block-*.safetensors"))
        for saved in [self.place.call(stage, "save", self.folder.path, self.iteration) for stage in self.stages]:
            self.place.value(saved)
        self.folder.save({f"trajectory.{k}": v for k, v in self.trajectory.state().items()}, self.iteration)
        self.folder.wait()
        for path in before - {block_file(self.folder.path, b, self.iteration) for b in range(self._blocks())}:
            path.unlink(missing_ok=True)

    def _resume(self) -> bool:
        found = self.folder.load(self.config.iterations) if self.folder else None
        if found is None:
            return False
        state, self.iteration = found
        self.begun = self.iteration
        self.trajectory.load_state(with_prefix(state, "trajectory."))
        for loaded in [self.place.call(stage, "load", self.folder.path, self.iteration) for stage in self.stages]:
            self.place.value(loaded)
        return True

    def _blocks(self) -> int:
        return len(structure.block_list(self.pipe.transformer))


def cut(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Consecutive blocks of each stage, as equal as can be: [(first, last + 1)]."""
    if not 1 <= stages <= blocks:
        raise ValueError(f"stages={stages} is outside 1 … {blocks}, the model's blocks")
    borders = [blocks * stage // stages for stage in range(stages + 1)]
    return list(zip(borders, borders[1:], strict=False))


def calibrate_in_stages(
    pipe: Pipeline,
    vq: VQConfig,
    config: CalibrationConfig,
    stages: int,
    seed: int = 0,
    out: str | Path | None = None,
    on: str = "local",
    device: str = "cpu",
    needs: Needs | None = None,
    batches: int = BATCHES,
) -> Pipelined:
    """Quantize and calibrate `pipe` by that many stages; `on`: "ray", or "local" for all of them in this process.

    `device`, `needs`: of one stage on the cluster. batches: of second moments, where error feedback needs them (`input_hessians`).
    Raises ValueError for codes that do not fit the model, as `quantize` does, and for another place, before there is any stage.
    """
    if on not in PLACES:
        raise ValueError(f"on={on!r} is not one of {', '.join(PLACES)}")
    require_independent(vq, config)
    fitting_layers(pipe.transformer, vq)
    cuts = cut(len(structure.block_list(pipe.transformer)), stages)
    if on == "ray":
        place: Place = StagesOnRay(Source.of(pipe), device, vq, config, cuts, seed, needs or Needs())
    else:
        place = StagesHere(pipe, vq, config, cuts, seed)
    return Pipelined(pipe, vq, config, place, stages, seed, out, batches)


def _joined(iteration: int, seen: Sequence[StageRecord], seconds: float) -> Record:
    losses = [loss for one in seen for loss in one.losses]
    layers = {name: dict(figures) for one in seen for name, figures in one.layers.items()}
    ratio_loss = sum(figures.pop("ratio_loss") for figures in layers.values())
    return Record(iteration, losses, ratio_loss, layers, seconds, max(one.memory for one in seen))


def _with_layers(transformer: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """A packed transformer: the original's copy with these layers in place of its own."""
    replaced = [transformer.get_submodule(name) for name in layers]
    packed = copy.deepcopy(transformer, {id(layer): layer for layer in replaced})  # shared, not copied
    device = next(transformer.parameters()).device
    for name, layer in layers.items():
        structure.swap(packed, name, layer.to(device))
    return attach(packed.eval().requires_grad_(False))
