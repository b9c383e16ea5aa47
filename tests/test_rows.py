"""Every row of the methods learns a known target, moves one player at a time, and is added in one place."""

from dataclasses import replace

import pytest
import torch

from svae_lib import data, experiment, methods, objectives
from svae_lib.data import Split
from svae_lib.densities import DiagonalGaussian
from svae_lib.draws import Draws, Method
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS
from svae_lib.models import Nets, build_model
from svae_lib.train import Trainer, Training

MEAN, STD = 1.0, 0.5
NAMES = [row.name for row in methods.ROWS if "points" in row.data]
every = pytest.mark.parametrize("name", NAMES)


def target(count):
    """Numbers with this mean and this standard deviation exactly: what N(1, ½²) looks like."""
    x = torch.randn(count, 1, generator=torch.Generator().manual_seed(count))
    return Split(MEAN + STD * (x - x.mean()) / x.std(), torch.zeros(count, dtype=torch.long))


def trainer(method, updates=400, **changes):
    """Nets of one hidden layer of 16, a code of one number, slopes hardly penalised."""
    nets = Nets(z_dim=1, hidden=16, depth=1, norm="none", critic_hidden=16, critic_norm="none", critic_dropout=0.0)
    nets = replace(nets, encoder=method.defaults.get("encoder", "gaussian"), flow_length=4)
    training = Training(
        updates=updates, batch=128, lr=1e-2, critic_lr=1e-2, beta1=0.0, weight=1.0, penalty=0.02, ema=0.98,
        log_every=updates,
    )  # fmt: skip
    training = replace(training, **changes)
    return Trainer(build_model(nets, method, (1,), seed=0), method, training, target(2_000), target(500), seed=0)


@torch.no_grad()
def misses(t):
    """How far mean and spread of the model are from the target's, by a sum over z, and the share of the variance of x
    that the reconstruction misses: 1 if the code says nothing of x."""
    players, x = t.evaluated_players(), t.held_out.images
    z = torch.linspace(-8, 8, 1_601)[:, None]
    p_x_given_z, share = players["decoder"](z), (-z.square() / 2).softmax(0)
    noise = p_x_given_z.log_var.exp() if isinstance(p_x_given_z, DiagonalGaussian) else 0.0
    mean = (share * p_x_given_z.mean).sum()
    std = (share * ((p_x_given_z.mean - mean).square() + noise)).sum().sqrt()
    torch.manual_seed(1)
    x_hat = players["decoder"](players["encoder"](x).rsample()).mean
    unexplained = ((x_hat - x).square().mean() / x.var()).item()
    return abs(mean.item() - MEAN), abs(std.item() - STD), unexplained


# How far mean and spread may be from the target's: about twice the worst of the seeds 0 to 4.
WITHIN = {
    0.02: ("vae", "nf-vae", "iaf-vae", "wake-sleep", "svae-exact", "svae-elbo", "alice"),
    0.04: ("alice-a",),
    0.1: ("avb-ac", "alice-l1"),
    0.2: ("svae", "avb", "ali", "ali-saturating"),
    0.3: ("svae-r", "as-vae", "as-vae-r"),
    0.7: ("as-vae-g",),  # ties the spread of x only loosely
}
BOUNDS = {name: bound for bound, names in WITHIN.items() for name in names}
CYCLES = {"as-vae-r", "as-vae-g", "alice", "alice-l1", "alice-a"}
SOME_CYCLE = {"svae-r", "as-vae"}


@every
def test_every_row_learns_a_gaussian(name):
    """Mean and spread within the row's bound; rows that reward cycles explain 60 % of the variance of x (the worst of
    those seeds 78 %). Those with a density for either side (S29, A10) also pay for certainty and need only do better
    than a code that says nothing."""
    bound = BOUNDS.get(name, 0.3)
    t = trainer(METHODS[name])
    mean, spread, unexplained = misses(t)
    assert max(mean, spread) > bound and unexplained > 1, "the untrained nets would fail"
    t.fit()
    mean, spread, unexplained = misses(t)
    assert max(mean, spread) < bound
    if name in CYCLES | SOME_CYCLE:
        assert unexplained < (0.4 if name in CYCLES else 0.8)


def test_a_row_with_its_players_reversed_does_not_learn():
    reversed_ = replace(METHODS["svae"], name="toy", player=lambda d: -methods.svae(d))
    t = trainer(reversed_, updates=100)
    t.fit()
    assert max(misses(t)[:2]) > 0.2


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def moved(net, before):
    """What was learned; the running statistics of a BatchNorm follow every batch."""
    learned = (k for k in before if "running" not in k and "num_batches" not in k)
    return {k for k in learned if not torch.equal(net.state_dict()[k], before[k])}


@pytest.mark.parametrize(
    "dataset, name, norm",
    [
        *(("ring8", name, "none") for name, row in METHODS.items() if "points" in row.data),
        ("digits", "svae-r", "batch"),
    ],
)
def test_a_step_of_one_side_gives_the_other_no_gradient_and_no_change(dataset, name, norm):
    row = METHODS[name]
    made = Experiment.make(dataset, name, batch=16, hidden=16, critic_hidden=16, depth=1, norm=norm)
    t = experiment.prepare(made, data.load(dataset), torch.device("cpu"))
    players, critics = t.model.players, t.critics
    draws = t.draw(t.data)
    before = snapshot(players), snapshot(critics)
    if row.critic is not None:
        t.critic_step(draws)
        assert all(p.grad is None for p in players.parameters()) and not moved(players, before[0])
        for critic in t.critics:
            assert any(p.grad.abs().max() > 0 for p in critic.parameters()), "each critic learns"
        assert moved(critics, before[1])
    grads = [p.grad.clone() for p in critics.parameters()]
    before = snapshot(players), snapshot(critics)
    t.player_step(draws)
    assert not moved(critics, before[1])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(critics.parameters(), grads, strict=True))
    for player in players.values():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in player.parameters()), "each player learns"


def test_draws_are_shared_but_scores_are_fresh():
    """The players are scored by the critic that has just moved, on the pairs that it has just seen."""
    t = trainer(METHODS["svae"], updates=1)
    draws = t.draw(t.data)
    before, pair = draws.f_q.detach(), draws.z_q
    t.critic_step(draws)
    assert draws.z_q is pair and not torch.equal(draws.f_q, before)


# One file ----------------------------------------------------------------------------------------------


def toy_critic(d: Draws) -> torch.Tensor:
    """Least squares: f = +1 on decoder pairs, −1 on encoder pairs."""
    return -(d.f_p - 1).square().mean() - (d.f_q + 1).square().mean()


def toy(d: Draws) -> torch.Tensor:
    return objectives.symmetric(d.f_q, d.f_p) - d.weight * (d.x - d.x_q).square().flatten(1).sum(1).mean()


@pytest.fixture
def registered():
    row = Method("toy", "least squares", "–", "–", toy, toy_critic, defaults={"weight": 2.0})
    methods.register(row)
    yield row
    del METHODS["toy"]


@pytest.mark.usefixtures("own_cache", "no_classifier", "registered")
@pytest.mark.parametrize("dataset, metric", [("ring8", "mode_kl"), ("digits", "elbo_grey")])
def test_a_method_is_added_in_one_place(dataset, metric, tmp_path):
    """A record with all numbers, from a row that no other file knows."""
    small = {"updates": 3, "batch": 8, "score_samples": 40, "iw_samples": 4, "iw_images": 2, "critic_steps": 2}
    made = Experiment.make(dataset, "toy", **small)
    assert made.training.weight == 2.0
    record = experiment.run(made, "cpu", tmp_path)
    assert record["status"] == "done" and record["experiment"]["method"] == "toy"
    assert metric in record["metrics"] and "score" in record["metrics"]
    assert {"objective", "critic_loss", "accuracy"} <= set(record["history"][-1])


def test_the_first_critic_is_the_one_that_is_logged():
    """Scores of the second are shifted far away, and f, its spread and its sign do not notice."""
    t = trainer(METHODS["alice-a"], updates=1)
    before = t.diagnose()
    with torch.no_grad():
        t.critics[1].joint[-1].bias.add_(100.0)
    after = t.diagnose()
    assert after["critic_loss"] > before["critic_loss"] + 10
    assert {k: v for k, v in after.items() if k.startswith(("f_", "acc"))} == {
        k: v for k, v in before.items() if k.startswith(("f_", "acc"))
    }
