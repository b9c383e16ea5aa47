"""What is logged, where the best critic and all densities are known: the linear-Gaussian world."""

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import softplus

from svae_lib import diagnostics
from svae_lib.draws import Draws, Model
from svae_lib.exact import World, cubature
from svae_lib.methods import METHODS

WORLD = World.random(2, 3, seed=0)


def draws(noise):
    x, _ = WORLD.encoder_pairs(noise)
    model = Model(WORLD.encoder(), WORLD.decoder(), [WORLD.log_ratio], 3)
    return Draws(model, x, noise[:, WORLD.z], noise_q=noise[:, WORLD.z], noise_p=noise[:, WORLD.x])


def slope(pairs):
    """Of log p − log q, two Gaussians over (x, z): the difference of two straight lines."""
    of_p, of_q = ((pairs - joint.mean) @ joint.precision_matrix for joint in (WORLD.p, WORLD.q))
    return of_q - of_p


def test_of_the_best_critic_all_numbers_are_those_of_the_log_ratio():
    noise = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = diagnostics.of_critics(METHODS["svae"], draws(noise))
    pairs = {"q": torch.cat(WORLD.encoder_pairs(noise), 1), "p": torch.cat(WORLD.decoder_pairs(noise), 1)}
    f = {joint: WORLD.p.log_prob(v) - WORLD.q.log_prob(v) for joint, v in pairs.items()}
    wanted = {"critic_loss": softplus(f["q"]).mean() + softplus(-f["p"]).mean()}
    right = [f["q"] < 0, f["p"] > 0]  # likelier under the joint that they come from
    wanted["accuracy"] = torch.cat(right).double().mean()
    for joint, v in pairs.items():
        wanted |= {f"f_{joint}_mean": f[joint].mean(), f"f_{joint}_std": f[joint].std()}
        for name, part in (("x", WORLD.x), ("z", WORLD.z)):
            wanted[f"slope_{joint}_{name}"] = slope(v)[:, part].norm(dim=1).square().mean().sqrt()
    assert row == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-6)  # a float32 share
    assert row["accuracy"] > 0.6 and row["f_q_mean"] < 0 < row["f_p_mean"]


def test_of_the_players_reconstruction_and_kl_are_the_exact_expectations():
    given = draws(cubature(5))  # a mean over these is an expectation
    row = diagnostics.of_players(METHODS["vae"], given)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    kl = kl_divergence(WORLD.q_z_given_x.at(given.x), prior).mean().item()
    reconstruction = WORLD.expected_log_decoder(WORLD.q).item()
    wanted = {"objective": WORLD.L_x().item(), "reconstruction": reconstruction, "kl": kl}
    assert row == pytest.approx(wanted, rel=1e-9)
