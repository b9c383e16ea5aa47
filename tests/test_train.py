"""The update loop: deterministic, resumable, one player at a time, honest about divergence."""

import pytest
import torch

from svae_lib import data, experiment, train
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
def test_interrupt_and_resume_gives_the_same_bits(digits, tmp_path, precision):
    whole = trainer(digits, precision=precision)
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


def test_each_step_moves_one_player_only(digits):
    t = trainer(digits)
    draws = t.draw(t.data)
    players, critic = t.model.players.state_dict(), t.critics.state_dict()
    before = {k: v.clone() for k, v in players.items() if "running" not in k and "num_batches" not in k}
    t.critic_step(draws)
    assert all(torch.equal(before[k], players[k]) for k in before)
    frozen = {k: v.clone() for k, v in critic.items()}
    t.player_step(draws)
    learned = {k for k in frozen if "running" not in k and "num_batches" not in k}
    assert all(torch.equal(frozen[k], critic[k]) for k in learned)
    assert not all(torch.equal(before[k], players[k]) for k in before)
    assert all(p.grad is not None for p in t.critics.parameters())


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
