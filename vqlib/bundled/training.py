"""One resumable training loop, shared by the classifiers, VAEs and transformers of the bundled models."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vqlib.system.files import write_tensors
from vqlib.system.fingerprint import fingerprint


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch and AdamW rates of one training; `lr` warms up linearly and decays with a cosine to zero."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 500
    weight_decay: float = 0.0
    ema: float = 0.999
    seed: int = 0
    checkpoint_every: int = 1000


@dataclass(frozen=True)
class Progress:
    """What the loop yields every `log_every` steps: the step, its mean loss, images seen and minutes of computing so far."""

    step: int
    loss: float
    images: int
    minutes: float


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    count: int,
    config: TrainConfig,
    folder: str | Path,
    log_every: int = 200,
) -> Iterator[Progress]:
    """Train in place, and finish with the moving-average weights in `model`.

    `loss(model, index, generator)` gets int64 indices [batch] into `count` images, on the CPU like the generator, wherever
    the model is: a seed means the same draws on every device. Every random draw of step s comes from
    a generator seeded with (seed, s), so a killed run goes on from `folder` exactly as if it had not been killed. ValueError where
    the run kept there has another configuration, or began with another loss: other weights to start from, data or options.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    begins = _begins(model, loss, count, config)
    start, minutes = _resume(model, optimizer, average, config, folder, begins)
    generator, total, summed, clock = torch.Generator(), 0.0, 0, time.monotonic()
    model.train()
    for step in range(start, config.steps):
        generator.manual_seed(config.seed * 1_000_003 + step)
        rate = min(1.0, (step + 1) / config.warmup) * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate
        index = torch.randint(count, (config.batch,), generator=generator)
        value = loss(model, index, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                average[name].lerp_(tensor, 1.0 - decay)
            else:
                average[name].copy_(tensor)
        total, summed = total + value.detach().double(), summed + 1  # no wait for the device but where the mean is said
        done = step + 1
        spent = minutes + (time.monotonic() - clock) / 60
        if done % config.checkpoint_every == 0 or done == config.steps:
            about = {"step": done, "minutes": spent, "begins": begins, "config": asdict(config)}
            _save(model, optimizer, average, folder / f"{config.name}.safetensors", about)
        if done % log_every == 0 or done == config.steps:
            yield Progress(done, float(total / summed), done * config.batch, spent)
            total, summed = 0.0, 0
    model.load_state_dict(average)
    model.eval()


def finished(folder: str | Path, config: TrainConfig) -> Progress:
    """How far the training in `folder` has come by its last checkpoint."""
    with safe_open(Path(folder) / f"{config.name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    return Progress(about["step"], math.nan, about["step"] * config.batch, about["minutes"])


@torch.no_grad()
def _begins(model, loss, count: int, config: TrainConfig) -> tuple[str, float]:
    """What tells a training's start: its weights' SHA-256, and the loss of its data and options where no weight is 0."""
    generator, probe = torch.Generator().manual_seed(config.seed * 1_000_003), copy.deepcopy(model).eval()
    for parameter in probe.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return fingerprint(model), float(loss(probe, torch.randint(count, (config.batch,), generator=generator), generator))


def _save(model, optimizer, average, path: Path, about: dict) -> None:
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in average.items()}
    for i, slot in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": v for k, v in slot.items()}
    write_tensors(path, state, {"about": json.dumps(about)})


def _resume(
    model, optimizer, average, config: TrainConfig, folder: Path, begins: tuple[str, float]
) -> tuple[int, float]:
    path = folder / f"{config.name}.safetensors"
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    if about["config"] != asdict(config):
        raise ValueError(f"{path} belongs to another configuration: {about['config']} (asked for {asdict(config)})")
    weights, value = about["begins"]
    if weights != begins[0] or not math.isclose(value, begins[1], rel_tol=1e-4):  # other threads move its last digits
        raise ValueError(f"{path} began with other weights, data or options of the loss; remove it to train anew")
    state = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for name in average:
        average[name].copy_(state[f"ema.{name}"])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["step"], about["minutes"]
