"""What is trained of a student; the optimizer of one block's parameters, and its state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.config import CalibrationConfig
from vqlib.quantizer.latent import LatentLinear
from vqlib.quantizer.soft import soft_layers


def prepare_parameters(student: nn.Module, config: CalibrationConfig) -> None:
    """Only logits, codebooks, layer scales and biases of the quantized layers are trained, in eval mode.

    Raises ValueError where that leaves nothing of layers that there are.
    """
    student.eval().requires_grad_(False)
    layers = soft_layers(student).values()
    for layer in layers:
        if layer.logits is not None:
            layer.logits.requires_grad_(True)
        layer.codebook.requires_grad_(config.train_codebooks != "never")
        if layer.scale is not None:
            layer.scale.requires_grad_(config.train_codebooks != "never")
        if layer.bias is not None:
            layer.bias.requires_grad_(config.train_biases)
        if isinstance(layer, LatentLinear):
            layer.latents.requires_grad_(True)
        elif config.lr_latents:
            raise ValueError(f"lr_latents={config.lr_latents} moves assignments in vqlib.distill only")
    if layers and not any(p.requires_grad for p in student.parameters()):
        raise ValueError("nothing to train: candidates=1, train_codebooks='never', train_biases=False")


class BlockOptimizer:
    """RMSprop or Adam over `parameters`, `logits` and `latents` among them at rates of their own; nothing where there are none."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        logits: set[nn.Parameter],
        config: CalibrationConfig,
        latents: set[nn.Parameter] = frozenset(),
    ) -> None:
        self.config = config
        others = [p for p in parameters if p not in logits and p not in latents]
        parts = [p for p in parameters if p in logits], others, [p for p in parameters if p in latents]
        rates = config.lr_ratios, config.lr_codebooks, config.lr_latents
        groups = [{"params": p, "base_lr": lr, "lr": lr} for p, lr in zip(parts, rates, strict=True) if p]
        self.inner = _made(groups, config) if groups else None

    def step(self, iteration: int, loss: Tensor) -> None:
        """One update at the rates of step `iteration` (1 the first); gradients are dropped.

        loss [] is what they belong to; where it is not finite they count as 0.
        """
        if self.inner is None:
            return
        cosine = self.config.lr_decay == "cosine"
        factor = 0.5 * (1 + math.cos(math.pi * (iteration - 1) / self.config.iterations)) if cosine else 1.0
        for group in self.inner.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.inner.step(loss)
        self.inner.zero_grad(set_to_none=True)

    def forget(self, parameter: nn.Parameter) -> None:
        """Drop what is held for a parameter that is not trained any more."""
        if self.inner is not None:
            self.inner.state.pop(parameter, None)

    def state(self) -> dict[str, Tensor]:
        """Its tensors under "parameter.name"."""
        slots = {} if self.inner is None else self.inner.state_dict()["state"]
        return {f"{p}.{key}": value for p, slot in slots.items() for key, value in slot.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        if self.inner is None:
            return
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            parameter, name = key.split(".", 1)
            slots.setdefault(int(parameter), {})[name] = value
        self.inner.load_state_dict({"state": slots, "param_groups": self.inner.state_dict()["param_groups"]})


def _made(groups: list[dict], config: CalibrationConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return _Adam(groups, betas=(0.9, config.smoothing))
    return _RMSprop(groups, alpha=config.smoothing)


class _Adam(torch.optim.Adam):
    """torch's, on gradients that are finite."""

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        finite = loss.isfinite()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = torch.where(finite, parameter.grad, 0.0)
        super().step()


class _RMSprop(torch.optim.RMSprop):
    """torch's step and state in one pass over each tensor instead of five."""

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.zeros(()), square_avg=torch.zeros_like(parameter))
                state["step"] += 1
                sizes = group["lr"], group["alpha"], group["eps"]
                kernels.rmsprop_step(parameter, parameter.grad, state["square_avg"], *sizes, loss)
