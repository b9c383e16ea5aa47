"""Early stopping: the loss is that of both cycles, training ends in time, and the best players are kept."""

import pytest
import torch
from torch.testing import assert_close

from svae_lib import data, experiment, stopping, train
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment

CPU = torch.device("cpu")
SMALL = {"batch": 8, "updates": 20, "log_every": 2, "hidden": 8}


def trainer(**changes):
    return experiment.prepare(Experiment.make("digits", "svae-r", **SMALL | changes), data.load("digits"), CPU)


def test_the_loss_is_the_average_of_both_reconstructions_for_each_number():
    t = trainer()
    t.model.players.eval()  # BatchNorm would see other batches
    d = t.draw(t.held_out)
    x = d.model.decoder(d.z_q).log_prob(d.x).mean() / 64
    z = d.model.encoder(d.model.decoder(d.z_p).rsample()).log_prob(d.z_p).mean() / t.model.z_dim
    assert stopping.cycle_loss(d) == pytest.approx(-0.5 * (x + z).item(), rel=1e-5)


@pytest.fixture
def losses(monkeypatch):
    """Losses that fall until the third log and then rise; each is asked for `BATCHES` times."""
    monkeypatch.setattr(stopping.EarlyStop, "BATCHES", 1)
    made = iter([5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 2.0, 1.0])
    monkeypatch.setattr(train, "cycle_loss", lambda draws: next(made))


def test_training_stops_and_the_best_players_are_evaluated(losses, tmp_path):
    t, seen = trainer(patience=3), []

    def keep(row):
        seen.append({name: value.clone() for name, value in t.evaluated_players().state_dict().items()})

    t.fit(tmp_path / "run.pt", keep)
    assert t.done == 12 and [row["cycle"] for row in t.history] == [5.0, 4.0, 3.0, 3.5, 3.4, 3.3]
    for name, value in t.evaluated_players().state_dict().items():
        assert_close(value, seen[2][name], rtol=0, atol=0)
    again = trainer(patience=3)
    again.fit(tmp_path / "run.pt")
    assert again.done == 12
    for name, value in again.evaluated_players().state_dict().items():
        assert torch.equal(value, seen[2][name])


def test_the_players_that_are_kept_are_the_ones_that_are_judged(monkeypatch):
    judged = []
    monkeypatch.setattr(train, "cycle_loss", lambda draws: judged.append(draws.model) or 1.0)
    t = trainer(patience=3, ema=0.9, updates=2)
    t.fit()
    assert all(model.decoder is t.average.module["decoder"] is not t.model.decoder for model in judged)


def test_a_run_without_patience_is_not_looked_at(losses):
    t = trainer()
    t.fit()
    assert t.done == 20 and "cycle" not in t.history[-1]


def test_patience_needs_codes_and_one_run():
    with pytest.raises(UserError, match="patience looks at the codes of one run"):
        experiment.prepare(Experiment.make("digits", "gan", patience=2, **SMALL), data.load("digits"), CPU)
    assert not experiment.stackable(Experiment.make("ring8", "vae", patience=2))
