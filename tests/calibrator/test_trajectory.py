import pytest
import tiny
import torch

from vqlib.calibrator.trajectory import Trajectory
from vqlib.config import CalibrationConfig
from vqlib.models.class_conditional import forward
from vqlib.models.sampling import SamplingConfig, sample

CONFIG = CalibrationConfig(batch_size=4, steps=8, timestep_order="sequential")


def walk(trajectory, pipe, moves):
    for _ in range(moves):
        inputs = trajectory.inputs()
        trajectory.advance(forward(pipe.transformer, inputs.x, inputs.timestep, inputs.labels))


def test_the_batch_holds_a_conditional_and_an_unconditional_half():
    pipe = tiny.pipeline()
    inputs = Trajectory(pipe, CONFIG).inputs()
    assert inputs.x.shape == (8, 4, 8, 8)
    assert torch.equal(inputs.x[:4], inputs.x[4:])
    assert (inputs.labels[:4] < 10).all() and (inputs.labels[4:] == 10).all()
    unguided = Trajectory(pipe, CONFIG.replace(guidance_scale=1.0)).inputs()
    assert unguided.x.shape == (4, 4, 8, 8)


def test_sequential_order_visits_every_timestep_once_then_starts_anew():
    pipe = tiny.pipeline()
    trajectory, seen = Trajectory(pipe, CONFIG), []
    first = trajectory.x.clone()
    for _ in range(9):
        seen.append(trajectory.inputs().timestep.unique().tolist())
        walk(trajectory, pipe, 1)
    expected = [[t] for t in pipe.schedule.respace(8).timesteps.flip(0).tolist()]
    assert seen == expected + expected[:1]
    assert not torch.equal(trajectory.x, first)


def test_staggered_order_spreads_one_batch_over_all_timesteps():
    pipe = tiny.pipeline()
    trajectory = Trajectory(pipe, CONFIG.replace(timestep_order="staggered"))
    trajectory.stagger(lambda i: forward(pipe.transformer, i.x, i.timestep, i.labels))
    assert trajectory.step.tolist() == [7, 5, 3, 1]


def test_a_move_is_guided_on_three_channels_and_draws_its_own_noise():
    pipe, scale = tiny.pipeline(), 2.5
    trajectory = Trajectory(pipe, CONFIG.replace(guidance_scale=scale))
    x, step = trajectory.x.clone(), trajectory.step.clone()
    output = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    trajectory.advance(output)
    expected = output[:4].clone()  # v and the fourth channel of ε stay conditional
    expected[:, :3] = output[4:, :3] + scale * (output[:4, :3] - output[4:, :3])
    mean, log_variance = trajectory.reverse.posterior.predict(expected, x, step)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(CONFIG.seed * 1_000_003 + 1))
    torch.testing.assert_close(trajectory.x, mean + (0.5 * log_variance).exp() * noise)


def test_a_trajectory_ends_in_latents_of_the_samplers_distribution():
    pipe = tiny.pipeline()
    trajectory = Trajectory(pipe, CONFIG.replace(batch_size=64))
    walk(trajectory, pipe, 7)
    inputs = trajectory.inputs()
    assert inputs.timestep.unique().tolist() == [0]
    ends = []
    labels = [0] * 64
    sample(
        pipe, labels, range(64), SamplingConfig(steps=8, batch_size=64), preview=lambda done, x: ends.append(x.clone())
    )
    assert trajectory.x.std().item() == pytest.approx(ends[-2].std().item(), rel=0.1)


def test_state_brings_a_trajectory_back_exactly():
    pipe = tiny.pipeline()
    one = Trajectory(pipe, CONFIG)
    walk(one, pipe, 5)
    state = {key: value.clone() for key, value in one.state().items()}
    other = Trajectory(pipe, CONFIG)
    other.load_state(state)
    walk(one, pipe, 6)
    walk(other, pipe, 6)
    assert torch.equal(one.x, other.x) and torch.equal(one.labels, other.labels)


def test_noise_inputs_are_gaussian_at_random_timesteps():
    pipe = tiny.pipeline()
    trajectory = Trajectory(pipe, CONFIG.replace(inputs="noise", batch_size=64))
    walk(trajectory, pipe, 1)
    assert trajectory.x.std().item() == pytest.approx(1.0, abs=0.05)
    assert len(trajectory.step.unique()) > 4


def test_a_model_in_training_mode_is_refused():
    pipe = tiny.pipeline()
    pipe.transformer.train()
    with pytest.raises(ValueError, match="tiny is in training mode, which drops class labels"):
        Trajectory(pipe, CalibrationConfig())
