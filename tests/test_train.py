"""The update loop: deterministic, resumable, one player at a time, honest about divergence."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from svae_lib import data, experiment, train
from svae_lib.draws import mean_squared_slope
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def trainer(digits, method="svae-r", **changes):
    changes = {"updates": 12, "batch": 16, "log_every": 4, "ema": 0.9, "penalty": 0.1} | changes
    return experiment.prepare(Experiment.make("digits", method, **changes), digits, CPU)


def weights(t):
    return [p.detach().clone() for p in (*t.model.players.state_dict().values(), *t.critics.state_dict().values())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_same_seed_same_bits_and_other_seed_other_bits(digits):
    runs = [trainer(digits), trainer(digits)]
    for run in runs:
        run.fit()
    assert same(weights(runs[0]), weights(runs[1]))
    other = experiment.prepare(Experiment.make("digits", "svae-r", seed=1, updates=12, batch=16), digits, CPU)
    other.fit()
    assert not same(weights(runs[0]), weights(other))


def test_logging_does_not_change_training(digits):
    often, rarely = trainer(digits, log_every=1), trainer(digits, log_every=12)
    often.fit()
    rarely.fit()
    assert same(weights(often), weights(rarely))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupt_and_resume_gives_the_same_bits(digits, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(experiment, "usable", lambda precision, device: precision)  # bf16 even where it is imitated
    whole = trainer(digits, precision=precision)
    assert whole.training.precision == precision
    whole.fit()
    first = trainer(digits, precision=precision)

    def stop_at_8(row):
        if row["update"] == 8:
            train.write_checkpoint(first.state(), tmp_path / "run.pt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "run.pt", stop_at_8)
    second = trainer(digits, precision=precision)
    torch.manual_seed(99)  # whatever the process did in between
    second.fit(tmp_path / "run.pt")
    assert second.done == 12 and len(second.history) == 3
    assert same(weights(whole), weights(second))
    assert same(list(whole.average.state_dict().values()), list(second.average.state_dict().values()))


@pytest.mark.parametrize("steps", [1, 3])
def test_each_critic_step_has_draws_of_its_own_and_the_players_have_the_last(digits, monkeypatch, steps):
    t, critic, player = trainer(digits, critic_steps=steps), [], []
    monkeypatch.setattr(t, "critic_step", critic.append)
    monkeypatch.setattr(t, "player_step", player.append)
    t.update()
    assert len(critic) == steps and len(player) == 1 and player[0] is critic[-1]
    assert len({(draws.x.sum().item(), draws.z_p.sum().item()) for draws in critic}) == steps


class Straight(nn.Module):
    """f(x, z) = a·x + b·z."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(numbers).double()) for numbers in ([3.0, -1.0], [0.5, 2.0]))

    def forward(self, x, z):
        return x.double() @ self.a + z.double() @ self.b


def test_the_critic_descends_the_penalty_on_its_slopes(ring):
    """That of a straight critic is |a|² + |b|² on each of the two kinds of pairs, wherever they are."""
    t = experiment.prepare(Experiment.make("ring8", "svae", batch=16), ring, CPU)
    draws, ends = t.draw(t.data), []
    for penalty in (0.0, 0.7):
        t.training = replace(t.training, penalty=penalty)
        t.model.critics[0] = Straight()
        t.critic_optimiser = torch.optim.SGD(t.model.critics[0].parameters(), lr=1.0)
        t.critic_step(draws)
        ends.append(t.model.critics[0])
    free, held = ends
    start = Straight()
    assert_close(held.a - free.a, -0.7 * 2 * 2 * start.a)
    assert_close(held.b - free.b, -0.7 * 2 * 2 * start.b)


def test_the_slope_that_is_penalised_is_a_mean_of_squares_over_samples():
    x, z = (torch.randn(50, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a = torch.tensor([3.0, -1.0]).double()
    found = mean_squared_slope(x @ a + 0.5 * z.square().sum(1), (x, z))
    assert_close(found, a.square().sum() + z.square().sum(1).mean())


def test_step_sizes_fall_linearly_and_the_average_forgets_its_first_weights(digits):
    t = trainer(digits, updates=4, decay=True, lr=1e-3, critic_lr=1e-2, ema=0.2)
    paces, shares = [], []
    for _ in range(4):
        t.update()
        paces.append([optimiser.param_groups[0]["lr"] for optimiser in (t.player_optimiser, t.critic_optimiser)])
        shares.append(t.share)
        if t.done == 1:
            assert same(t.average.module.state_dict().values(), t.players.state_dict().values())
    assert_close(torch.tensor(paces), torch.tensor([1, 0.75, 0.5, 0.25])[:, None] * torch.tensor([1e-3, 1e-2]))
    assert shares == pytest.approx([1, 1 - 2 / 11, 1 - 0.2, 1 - 0.2])  # (1 + n)/(10 + n) of the past, at most 0.2


@pytest.mark.parametrize("method", ["vae", "svae", "svae-r", "svae-exact", "svae-elbo"])
def test_every_player_parameter_gets_a_gradient(digits, method):
    t = trainer(digits, method)
    t.update()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in t.model.players.parameters())


def test_a_vae_learns_a_small_set(digits):
    few = data.Dataset("few", *(data.Split(digits.train.images[:16], digits.train.labels[:16]),) * 3)
    made = Experiment.make("digits", "vae", updates=300, batch=16, dropout=0.0, lr=2e-3, log_every=300)
    t = experiment.prepare(made, few, CPU)
    start = t.diagnose()["reconstruction"]
    t.fit()
    assert t.history[-1]["reconstruction"] > 0.75 * start, "cross-entropy must fall by a quarter"


def test_divergence_stops_with_one_sentence(digits):
    with pytest.raises(train.Diverged, match="diverged at update"):
        trainer(digits, lr=1e30, updates=8, ema=0.0).fit()


def test_a_foreign_or_damaged_checkpoint_is_refused(digits, tmp_path):
    t = trainer(digits)
    t.fit(tmp_path / "run.pt")
    with pytest.raises(UserError, match="another experiment"):
        trainer(digits, lr=1e-3).fit(tmp_path / "run.pt")
    content = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        trainer(digits).fit(tmp_path / "run.pt")


def test_unknown_precision_is_refused(digits):
    with pytest.raises(UserError, match="precision must be one of fp32, tf32, bf16"):
        trainer(digits, precision="fp8")
