"""One optimizer per transformer block, so that a block can be stepped and its gradients dropped before the next one runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.config import CalibrationConfig
from vqlib.quantizer.soft import CandidateLinear


class BlockOptimizers:
    """One optimizer per block, stepped as soon as the block is differentiated, and one for what several blocks share."""

    def __init__(self, blocks: list[nn.Module], config: CalibrationConfig) -> None:
        owners: dict[nn.Parameter, set[int]] = {}
        for index, block in enumerate(blocks):
            for parameter in block.parameters():
                if parameter.requires_grad:
                    owners.setdefault(parameter, set()).add(index)
        logits = {m.logits for b in blocks for m in b.modules() if isinstance(m, CandidateLinear)}
        self.config = config
        self.all = [_optimizer([p for p, o in owners.items() if o == {i}], logits, config) for i in range(len(blocks))]
        self.all.append(_optimizer([p for p, o in owners.items() if len(o) > 1], logits, config))

    def start(self, iteration: int) -> None:
        """Set this step's learning rates."""
        cosine = self.config.lr_decay == "cosine"
        factor = 0.5 * (1 + math.cos(math.pi * iteration / self.config.iterations)) if cosine else 1.0
        for optimizer in filter(None, self.all):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def step(self, index: int) -> None:
        """Step block `index`, whose gradients are complete, and drop them."""
        if self.all[index]:
            self.all[index].step()
            self.all[index].zero_grad(set_to_none=True)

    def step_shared(self) -> None:
        """Step what several blocks share, after the last of them."""
        self.step(-1)

    def forget(self, parameter: nn.Parameter) -> None:
        """Drop what is held for a parameter that is not trained any more."""
        for optimizer in filter(None, self.all):
            optimizer.state.pop(parameter, None)

    def state(self) -> dict[str, Tensor]:
        """Every optimizer's tensors under "optimizer.parameter.name"."""
        return {
            f"{i}.{p}.{key}": value
            for i, optimizer in enumerate(self.all)
            if optimizer
            for p, slot in optimizer.state_dict()["state"].items()
            for key, value in slot.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for i, optimizer in enumerate(self.all):
            if not optimizer:
                continue
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in with_prefix(tensors, f"{i}.").items():
                parameter, name = key.split(".", 1)
                slots.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer(parameters: list[nn.Parameter], logits: set, config: CalibrationConfig):
    """RMSprop or Adam over the given parameters, None where there are none."""
    groups = [
        {"params": [p for p in parameters if p in logits], "base_lr": config.lr_ratios, "lr": config.lr_ratios},
        {
            "params": [p for p in parameters if p not in logits],
            "base_lr": config.lr_codebooks,
            "lr": config.lr_codebooks,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return None
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, betas=(0.9, config.smoothing))
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    return (_RMSprop if on_cpu else torch.optim.RMSprop)(groups, alpha=config.smoothing)


class _RMSprop(torch.optim.RMSprop):
    """The same step and the same state in one pass over each tensor instead of five; on CUDA torch has its own."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.zeros(()), square_avg=torch.zeros_like(parameter))
                state["step"] += 1
                sizes = group["lr"], group["alpha"], group["eps"]
                kernels.rmsprop_step(parameter, parameter.grad, state["square_avg"], *sizes)


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
