"""One optimizer per block: what it steps, what it drops, and that it is torch's own by numbers and by state."""

import pytest
import tiny
import torch

from vqlib.calibrator.block import block_steps
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import structure
from vqlib.quantizer.quantize import quantize

LOSS = torch.tensor(0.5)  # what the gradients belong to; only whether it is finite counts


def prepared(scope="layer", **settings):
    """Student, its blocks' optimizers, and every trained parameter with a seeded gradient."""
    student = quantize(tiny.transformer(), VQConfig(k=16, d=4, candidates=3, codebook_scope=scope)).requires_grad_(
        False
    )
    trained = [p for n, p in student.named_parameters() if n.endswith(("logits", "codebook"))]
    generator = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return student, optimizers_of(student, CalibrationConfig(**settings)), trained


def optimizers_of(student, config):
    """One optimizer a block, and that of what blocks share."""
    steps, shared = block_steps(student, config)
    return [*(step.optimizer for step in steps), shared]


def test_a_block_is_stepped_alone_and_its_gradients_are_dropped():
    student, optimizers, trained = prepared()
    before = [p.detach().clone() for p in trained]
    own = set(structure.block_list(student)[1].parameters())
    optimizers[1].step(1, LOSS)
    for old, parameter in zip(before, trained, strict=True):
        assert torch.equal(old, parameter) is (parameter not in own)
        assert (parameter.grad is None) is (parameter in own)


def test_what_blocks_share_is_stepped_after_the_last_of_them():
    student, optimizers, _ = prepared(scope="model")
    codebook = next(m.codebook for m in student.modules() if hasattr(m, "logits"))
    before = codebook.detach().clone()
    for index in range(2):
        optimizers[index].step(1, LOSS)
    assert torch.equal(codebook, before) and codebook.grad is not None
    optimizers[-1].step(1, LOSS)
    assert not torch.equal(codebook, before) and codebook.grad is None


def test_rmsprop_is_torchs_by_numbers_and_by_state():
    """The kernel and torch round differently, so the numbers agree to 1e-5 and the state's names and shapes exactly."""
    _, optimizers, trained = prepared(smoothing=0.9)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in trained]
    rates = [0.05 if p.shape[1] == 3 else 1e-4 for p in trained]  # logits [N, 3], codebooks [k, 4]
    torchs = torch.optim.RMSprop([{"params": [t], "lr": r} for t, r in zip(twins, rates, strict=True)], alpha=0.9)
    for _ in range(2):
        for twin, parameter in zip(twins, trained, strict=True):
            parameter.grad = torch.sin(twin.detach() + 1.0)
            twin.grad = parameter.grad.clone()
        torchs.step()
        for index in range(2):
            optimizers[index].step(1, LOSS)
    slots = {p: slot for optimizer in optimizers[:2] for p, slot in optimizer.inner.state.items()}
    for twin, parameter in zip(twins, trained, strict=True):
        torch.testing.assert_close(parameter.data, twin.data, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dict(slots[parameter]), dict(torchs.state[twin]), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_loaded_state_goes_on_as_the_one_that_was_saved(optimizer):
    runs = []
    for stop in (False, True):
        student, optimizers, trained = prepared(optimizer=optimizer)
        for _ in range(2):
            if stop and optimizers[0].state():
                saved = [{name: value.clone() for name, value in one.state().items()} for one in optimizers]
                optimizers = optimizers_of(student, optimizers[0].config)
                for one, state in zip(optimizers, saved, strict=True):
                    one.load_state(state)
            for parameter in trained:
                parameter.grad = torch.sin(parameter.detach())
            for index in range(2):
                optimizers[index].step(1, LOSS)
        runs.append([p.detach().clone() for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_block_as_it_is(optimizer, loss):
    student, optimizers, trained = prepared(optimizer=optimizer)
    before = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, torch.nan)
    for index in range(2):
        optimizers[index].step(1, torch.tensor(loss))
    assert all(torch.equal(old, p) for old, p in zip(before, trained, strict=True))
