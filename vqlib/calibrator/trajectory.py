"""Zero-data calibration inputs: the full-precision model's own trajectory from Gaussian noise and random conditions.

No image is read. Every x_t met on the way is an input; the model output that calibration computes anyway takes the next
step of the model's process, so a trajectory costs no forward pass of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqlib.config import CalibrationConfig
from vqlib.models.pipeline import Pipeline
from vqlib.models.process import guide
from vqlib.system.memory import sent


class Inputs(NamedTuple):
    """One batch for the transformer: x_t [R, C, h, w], timesteps [R], labels int64 [R]; the last half is unconditional."""

    x: Tensor
    timestep: Tensor
    labels: Tensor
    guidance_scale: float = 1.0  # of a model whose guidance is an input


class Trajectory:
    """B images on their way from noise; `inputs()` is the batch to evaluate, `advance(output)` takes one step.

    Image b starts anew from fresh noise and a random condition when it arrives. All draws of move m come from a generator of
    the CPU's, seeded with (seed, m): a seed means the same inputs on every device, and `state()` needs no generator. (With seed 0 these are
    the generators from which the sampler draws images 0, 1, 2 …: image 0's first noise begins the first path, too; other
    draws stand in other places.) With `staggered` order image b is b/B of a trajectory ahead.
    """

    def __init__(self, pipe: Pipeline, config: CalibrationConfig) -> None:
        if pipe.transformer.training:
            raise ValueError(f"{pipe.name} is in training mode, which drops class labels at random; call .eval() first")
        self.config, self.device = config, pipe.device
        self.classes, self.null_class, self.shape = len(pipe.class_names), pipe.null_class, pipe.latent_shape
        self.guided = config.guided and pipe.denoiser.halves
        self.guided_channels = pipe.denoiser.guided_channels(self.shape[0])
        schedule = pipe.schedule.respace(config.steps).to(self.device)
        self.timesteps, self.reverse = schedule.timesteps, schedule.reverse()
        self.moves = 0
        batch = config.batch_size
        generator = self._generator()
        self.x = self.student_x = self._noise(generator)
        self.labels = self._integers(self.classes, generator)
        self.step = torch.full((batch,), config.steps - 1, device=self.device)
        if config.inputs == "noise":
            self.step = self._integers(config.steps, generator)

    def inputs(self) -> Inputs:
        """The current batch, with its unconditional half behind it when guidance is on."""
        return self._batch(self.x)

    def student_inputs(self) -> Inputs:
        """The same batch where the student's own outputs have led it; where it takes the teacher's path, `inputs()`."""
        return self._batch(self.student_x)

    def signal(self, output: Tensor, inputs: Inputs) -> Tensor:
        """What an output for `inputs` leaves of x_t when the noise it sees is taken away, see `Step.signal`.

        So two models that are at other places of the same path can be compared.
        """
        step = self.step.repeat(len(output) // len(self.step))  # both halves are at the same ones
        return self.reverse.signal(output, inputs.x, step)

    def matched(self, output: Tensor, inputs: Inputs) -> Tensor:
        """What of an output for `inputs` a student's is compared in: where that is on a path of its own the signal, else all.

        With loss_at="guided" both halves count as guidance joins them. It is linear and they are at the same x_t, so the
        guided signal is the signal of the guided output.
        """
        seen = self.signal(output, inputs) if self.config.path == "student" else output
        return self.guide(seen) if self.config.loss_at == "guided" else seen

    def guide(self, output: Tensor) -> Tensor:
        """What a step is taken by: of both halves' outputs [2B, …] the guided one [B, …]; without guidance, the same."""
        return guide(output, self.config.guidance_scale, self.guided_channels) if self.guided else output

    def _batch(self, x: Tensor) -> Inputs:
        timestep, labels = self.timesteps[self.step], self.labels
        if self.guided:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        return Inputs(x, timestep, labels, self.config.guidance_scale)

    @torch.no_grad()
    def advance(self, output: Tensor, student_output: Tensor | None = None) -> None:
        """Move every image one step along, given the full-precision output [R, C or 2C, h, w] for `inputs()`.

        The student's x_t goes with it or, given its output for `student_inputs()`, takes its own step by the same noise.
        """
        self.moves += 1
        generator = self._generator()
        noise, fresh = self._noise(generator), self._noise(generator)
        new_labels = self._integers(self.classes, generator)
        if self.config.inputs == "noise":
            self.x = self.student_x = fresh
            self.labels = new_labels
            self.step = self._integers(self.config.steps, generator)
            return
        done = self.step == 0
        arrived = done.view(-1, 1, 1, 1)
        led = None if student_output is None else self._moved(self.student_x, student_output, noise)
        self.x = torch.where(arrived, fresh, self._moved(self.x, output, noise))
        self.student_x = self.x if led is None else torch.where(arrived, fresh, led)
        self.labels = torch.where(done, new_labels, self.labels)
        self.step = torch.where(done, self.config.steps - 1, self.step - 1)

    def stagger(self, forward) -> None:
        """Bring image b to b/B of its trajectory: `forward(Inputs) -> output` is called `steps` times at most.

        Images ahead move while the others wait; afterwards every batch covers all timesteps.
        """
        if self.config.timestep_order != "staggered" or self.config.inputs == "noise":
            return
        batch, steps = self.config.batch_size, self.config.steps
        target = steps - 1 - torch.arange(batch, device=self.device) * steps // batch
        while True:
            waiting = self.step <= target
            if waiting.all():
                return
            x, step, labels = self.x, self.step, self.labels
            self.advance(forward(self.inputs()))
            self.x = self.student_x = torch.where(waiting.view(-1, 1, 1, 1), x, self.x)
            self.step, self.labels = torch.where(waiting, step, self.step), torch.where(waiting, labels, self.labels)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed trajectory needs, as named tensors."""
        kept = {"x": self.x, "step": self.step, "labels": self.labels, "moves": torch.tensor(self.moves)}
        return kept if self.student_x is self.x else kept | {"student_x": self.student_x}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.x, self.step, self.labels = (state[name].to(self.device) for name in ("x", "step", "labels"))
        self.student_x = state["student_x"].to(self.device) if "student_x" in state else self.x
        self.moves = int(state["moves"])

    def _moved(self, x: Tensor, output: Tensor, noise: Tensor) -> Tensor:
        """x_{t−1} from x_t by the output of a model for it."""
        return self.reverse.next(self.guide(output), x, self.step, noise)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.moves)

    def _noise(self, generator: torch.Generator) -> Tensor:
        return sent(torch.randn(self.config.batch_size, *self.shape, generator=generator), self.device)

    def _integers(self, below: int, generator: torch.Generator) -> Tensor:
        return sent(torch.randint(below, (self.config.batch_size,), generator=generator), self.device)
