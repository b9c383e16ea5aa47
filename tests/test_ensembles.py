"""Stacked runs: each is what it would have been alone."""

from dataclasses import replace

import pytest
import torch
from shared_worker import doubles
from torch.testing import assert_close

from svae_lib import experiment
from svae_lib.draws import Draws
from svae_lib.ensembles import alone, stack
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS
from svae_lib.nets import GaussianHead, ImplicitEncoder, mlp

CPU = torch.device("cpu")
SEPARABLE = [name for name, m in METHODS.items() if m.separable]


def nets(count, norm):
    made = [torch.nn.Sequential(mlp(3, 8, 2, norm), GaussianHead(8, 2)) for _ in range(count)]
    for net in made:
        for parameter in net.parameters():  # also the gains and biases of a normalisation
            torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_stacked_net_is_its_parts_side_by_side(norm):
    parts, x = nets(4, norm), torch.randn(20, 3)
    together = stack(parts, torch.tensor([1.0, 0.1, 10.0, 3.0]))(x)
    for run, part in enumerate(parts):
        mine = slice(5 * run, 5 * run + 5)
        assert_close(together.mean[mine], part(x[mine]).mean)
        assert_close(together.log_var[mine], part(x[mine]).log_var)
    with pytest.raises(AssertionError):  # the rows of one run do not pass through the layer of another
        assert_close(together.mean[:5], parts[1](x[:5]).mean)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_run_comes_out_as_it_went_in(norm):
    parts, x = nets(3, norm), torch.randn(9, 3)
    stacked = stack(parts, torch.tensor([1.0, 0.3, 2.0]))
    stacked(x)  # one batch each, three rows a run, for the running statistics
    for run, part in enumerate(parts):
        part(x[3 * run : 3 * run + 3])
        part.eval()
    stacked.eval()
    for run, part in enumerate(parts):
        assert_close(alone(stacked, run)(x).mean, part(x).mean)


def test_a_stacked_implicit_encoder_estimates_moments_for_each_run_alone(monkeypatch):
    parts, u = [ImplicitEncoder(torch.nn.Linear(4, 16), 16, 2, others=7) for _ in range(2)], torch.randn(6, 4)
    noise = torch.randn(8, 2 * (3 + 7), 2)
    monkeypatch.setattr(torch, "randn", lambda *size, device: noise)
    stacked = stack(parts)
    together = stacked(u)
    for run, part in enumerate(parts):
        monkeypatch.setattr(torch, "randn", lambda *size, device, run=run: noise[:, 10 * run : 10 * run + 10])
        rows = slice(3 * run, 3 * run + 3)
        for lone in (part(u[rows]), alone(stacked, run)(u[rows])):
            assert_close(together.mean[rows], lone.mean)
            assert_close(together.moments.mean[rows], lone.moments.mean)
            assert_close(together.moments.log_var[rows], lone.moments.log_var)


class Shared:
    """Batches that a run sees alone or together: the same numbers for the same run."""

    def __init__(self, trainer, x, z, noise):
        self.trainer, self.x, self.z, self.noise = trainer, x, z, noise

    def draw(self, _):
        t = self.trainer
        return Draws(t.model, self.x, self.z, t.training.weight, *self.noise, runs=t.runs)


@torch.no_grad()
def computed(players, x, z, noise):
    """Not the weights: a bias before BatchNorm has no slope but rounding, which Adam enlarges and nobody sees."""
    found = [players["decoder"](z).rsample(noise)]
    return found + [players["encoder"](x).rsample(noise)] if "encoder" in players else found


@pytest.mark.parametrize("name", ["vae", "nf-vae", "svae-r", "svae-elbo", "as-vae", "ali", "gan"])
@pytest.mark.parametrize("pace", [1.0, 0.1])
def test_runs_trained_together_are_those_trained_alone(ring, name, pace):
    changes = {"batch": 6, "penalty": 0.01, "ema": 0.0, "flow_length": 3}
    made = [Experiment.make("ring8", name, seed=s, **changes) for s in range(3)]
    own = made[1].training
    made[1] = replace(made[1], training=replace(own, lr=pace * own.lr, critic_lr=own.critic_lr / pace))
    x, z, *noise = torch.randn(4, 18, 2, dtype=torch.float64)

    def trained(experiments, rows):
        t = experiment.prepare_together(experiments, ring, CPU)
        for optimiser in filter(None, (t.player_optimiser, t.critic_optimiser)):
            optimiser.param_groups[0]["eps"] = 1e-30  # it would be felt at another pace
        t.draw = Shared(t, x[rows], z[rows], [n[rows] for n in noise]).draw
        for _ in range(5):
            t.update()
        return t

    with doubles():
        together, seen = trained(made, slice(None)), torch.randn(3, 20, 2)
        for run, e in enumerate(made):
            lone, mine = trained([e], slice(6 * run, 6 * run + 6)), alone(together.model.players, run)
            assert_close(computed(mine, *seen), computed(lone.model.players, *seen), rtol=1e-6, atol=1e-8)


def test_what_cannot_be_stacked_is_refused(ring):
    first, other = Experiment.make("ring8", "vae"), Experiment.make("ring8", "vae", hidden=16)
    with pytest.raises(UserError, match="differ in more than seed and step sizes"):
        experiment.prepare_together([first, other], ring, CPU)
    normed = [Experiment.make("ring8", "vae", seed=s, norm="group") for s in (0, 1)]
    with pytest.raises(UserError, match="a layer of type LayerNorm cannot be trained together"):
        experiment.prepare_together(normed, ring, CPU)
