"""Methods without an encoder: the objectives are the stated ones, every row learns, stabilisers do what they say."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from svae_lib import augment, cli, data, experiment, gans, nets, train
from svae_lib.draws import Draws, Model, mean_squared_slope
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS
from svae_lib.models import Nets, build_model
from svae_lib.nets import Energy, MixtureGenerator, PointHead

CPU = torch.device("cpu")
NAMES = [row.name for row in gans.ROWS]
ON_POINTS = [row.name for row in gans.ROWS if "points" in row.data]

# Objectives: value and gradient of what is stated, written out afresh ----------------------------------------

RHO, MULTIPLIER = 0.6, 0.7


def softplus(f):
    return (1 + f.exp()).log()


def gan_value(f_q, f_p):
    return (-softplus(f_q)).mean() + (-softplus(-f_p)).mean()


def mmd_value(phi_q, phi_p):
    """Pair by pair; the biased estimate, with pairs of a draw and itself, is larger."""

    def kernel(a, b):
        return sum(math.e ** (-((a - b).square().sum()) / (2 * w * w)) for w in (1, 2, 4, 8, 16))

    n = len(phi_q)
    apart = [(i, j) for i in range(n) for j in range(n) if i != j]
    among = sum(kernel(phi[i], phi[j]) for phi in (phi_q, phi_p) for i, j in apart) / len(apart)
    return among - 2 * sum(kernel(a, b) for a in phi_q for b in phi_p) / n**2


def fisher_value(f_q, f_p):
    omega = (f_q.square().mean() + f_p.square().mean()) / 2
    return f_p.mean() - f_q.mean() + MULTIPLIER * (1 - omega) - RHO / 2 * (omega - 1) ** 2


def covariance_value(phi_q, phi_p):
    """The gap is symmetric, so its singular values are the sizes of its eigenvalues."""
    gap = sum(torch.outer(a, a) for a in phi_p) / len(phi_p) - sum(torch.outer(a, a) for a in phi_q) / len(phi_q)
    return torch.linalg.eigvalsh(gap).abs().sum()


def up(f_q, f_p):
    return f_p.mean() - f_q.mean()


def mean_value(phi_q, phi_p):
    return (phi_p.mean(0) - phi_q.mean(0)).square().sum().sqrt()


def minus(value):
    return lambda f_q, f_p: -value(f_q, f_p)


# (critic objective, player objective); the wrong ones stand in WRONG
STATED = {
    "gan": (gan_value, lambda f_q, f_p: -(softplus(-f_q) + softplus(f_p)).mean()),
    "gan-saturating": (gan_value, minus(gan_value)),
    "gan-symmetric": (gan_value, minus(up)),
    "dcgan": (gan_value, lambda f_q, f_p: -(softplus(-f_q) + softplus(f_p)).mean()),
    "wgan": (up, minus(up)),
    "mmd-gan": (mmd_value, minus(mmd_value)),
    "fisher-gan": (fisher_value, minus(up)),
    "mcgan-mean": (mean_value, minus(mean_value)),
    "mcgan-cov": (covariance_value, minus(covariance_value)),
    "eb-gan": (
        lambda f_q, f_p: -f_q.mean() - torch.where(f_p < RHO, RHO - f_p, 0.0).mean(),
        lambda f_q, f_p: -f_p.mean(),
    ),
}
WRONG = {
    "gan": (minus(gan_value), minus(gan_value)),
    "gan-saturating": (up, gan_value),
    "gan-symmetric": (up, minus(gan_value)),
    "dcgan": (minus(gan_value), minus(gan_value)),
    "wgan": (minus(up), up),
    "mmd-gan": (mean_value, mmd_value),
    "fisher-gan": (lambda f_q, f_p: fisher_value(f_q, f_p) + RHO * (f_q.square().mean() - 1), minus(fisher_value)),
    "mcgan-mean": (up, mean_value),
    "mcgan-cov": (mean_value, minus(mean_value)),
    "eb-gan": (lambda f_q, f_p: -f_q.mean() - RHO + f_p.mean(), lambda f_q, f_p: f_p.mean()),
}


def world(name, samples=6):
    """Small smooth nets in float64, and draws; parameters of the critic and of the player."""
    torch.manual_seed(0)
    row = METHODS[name]
    outputs = row.defaults.get("critic_outputs", 1)
    last = nn.Flatten(0) if outputs == 1 else nn.Tanh()
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs), last)
    if row.critics == ("energy",):
        critic = Energy(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), PointHead(8, 2)))
    generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), PointHead(8, 2))
    if "components" in row.defaults:
        generator = MixtureGenerator([generator, nn.Sequential(nn.Linear(3, 2), PointHead(2, 2))])
        nn.init.normal_(generator.logits)
    critic.register_buffer("multiplier", torch.tensor(MULTIPLIER))
    model = Model(None, generator.double(), [critic.double()], 3)
    x, z = torch.randn(samples, 2).double() + 1, torch.randn(samples, 3).double()
    return model, lambda: Draws(model, x, z, weight=RHO)


def slope_along(value, parameters, directions, step=1e-5):
    """d/dt value(parameters + t directions) at 0 by central differences."""
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
        sides.append(value().item())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= sign * step * direction
    return (sides[0] - sides[1]) / (2 * step)


def directional(objective, parameters, directions):
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    return float(sum((g * v).sum() for g, v in zip(grads, directions, strict=True) if g is not None))


def agrees(objective, stated, parameters):
    """Whether the gradient of `objective` along a random direction is the slope of `stated`."""
    parameters = list(parameters)
    directions = [torch.randn_like(p) for p in parameters]
    ours, other = directional(objective(), parameters, directions), slope_along(stated, parameters, directions)
    return math.isclose(ours, other, rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("name", STATED)
def test_gradients_are_those_of_the_stated_objective(name):
    model, draws = world(name)
    row = METHODS[name]
    sides = ((row.critic, model.critics[0].parameters()), (row.player, model.players.parameters()))
    for (objective, parameters), stated, wrong in zip(sides, STATED[name], WRONG[name], strict=True):
        parameters = list(parameters)

        def of_draws(value):
            d = draws()
            return lambda: value(d.score(d.x), d.score(Draws(model, d.x, d.z_p).x_p))

        assert_close(objective(draws()), of_draws(stated)())
        assert agrees(lambda: objective(draws()), of_draws(stated), parameters)  # noqa: B023
        assert not agrees(lambda: objective(draws()), of_draws(wrong), parameters)  # noqa: B023


def test_with_a_linear_critic_the_wasserstein_gradients_are_exact():
    """f = w·x: the critic climbs along the gap of the means, the mean of the draws moves along −w."""
    model, draws = world("wgan")
    critic = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    model.critics, d = [critic], draws()
    weight, bias = critic[0].parameters()
    to_weight, to_bias = torch.autograd.grad(METHODS["wgan"].critic(d), (weight, bias))
    assert_close(to_weight[0], (d.x_p - d.x).mean(0))
    assert_close(to_bias, torch.zeros_like(to_bias))
    shift = model.decoder[2].linear.bias
    (to_shift,) = torch.autograd.grad(METHODS["wgan"].player(d), shift)
    assert_close(to_shift, -weight[0])
    excess = weight.norm() - 1
    assert_close(METHODS["wgan-gp"].critic(d), METHODS["wgan"].critic(d) - RHO * excess**2)
    (ours,) = torch.autograd.grad(METHODS["wgan-gp"].critic(d), weight)
    assert_close(ours, to_weight - 2 * RHO * excess * weight / weight.norm())


def test_a_mixture_learns_components_and_weights():
    """∂/∂logit_i of −Σ w c + (λ/T) Σ log w is −w_i (c_i − Σ w c) + λ (1/T − w_i), c_i the mean score of component i."""
    model, draws = world("mix-wgan")
    mixture, d = model.decoder, draws()

    def stated():
        w = mixture.logits.exp() / mixture.logits.exp().sum()
        c = [model.critics[0](generator(d.z_p).mean).mean() for generator in mixture.generators]
        return model.critics[0](d.x).mean() - sum(a * b for a, b in zip(w, c, strict=True)) + RHO * w.log().sum() / 2

    objective = METHODS["mix-wgan"].player
    assert_close(objective(d), stated())
    assert agrees(lambda: objective(draws()), stated, mixture.parameters())
    w = mixture.logits.softmax(0)
    c = torch.stack([model.critics[0](g(d.z_p).mean).mean() for g in mixture.generators])
    (ours,) = torch.autograd.grad(objective(d), mixture.logits)
    assert_close(ours, -w * (c - (w * c).sum()) + RHO * (0.5 - w))
    sampled = torch.autograd.grad(METHODS["wgan"].player(draws()), mixture.logits, allow_unused=True)
    assert sampled == (None,), "draws alone say nothing about the weights"


def test_the_entropy_term_pulls_to_equal_weights():
    model, draws = world("mix-wgan")
    for parameter in model.critics[0].parameters():
        nn.init.zeros_(parameter)  # no payoff at all
    optimiser = torch.optim.Adam([model.decoder.logits], 0.1)
    assert (model.decoder.log_weights.exp() - 0.5).abs().max() > 0.05
    for _ in range(100):
        optimiser.zero_grad()
        (-METHODS["mix-wgan"].player(draws())).backward()
        optimiser.step()
    assert_close(model.decoder.log_weights.exp(), torch.full((2,), 0.5).double(), atol=1e-2, rtol=0)


def test_a_mixture_draws_a_component_by_its_weight():
    torch.manual_seed(0)
    places = [nn.Sequential(nn.Linear(1, 1), PointHead(1, 1)) for _ in range(3)]
    for k, place in enumerate(places):
        for parameter in place.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(place[1].linear.bias, k)
    mixture, w = MixtureGenerator(places), torch.tensor([0.2, 0.7, 0.1])
    mixture.logits.data = w.log()
    n = 20_000
    with torch.no_grad():
        share = torch.bincount(mixture(torch.zeros(n, 1)).rsample()[:, 0].long(), minlength=3) / n
    error = (w * (1 - w) / n).sqrt()
    assert ((share - w).abs() < 4 * error).all()
    assert ((share - 1 / 3).abs() > 4 * error).any()


def test_fisher_multiplier_climbs_where_the_constraint_is_broken():
    """λ ← λ − ρ ∂L/∂λ, and it is saved with the critic."""
    model, draws = world("fisher-gan")
    critic, d = model.critics[0], draws()
    critic.multiplier.requires_grad_()
    (slope,) = torch.autograd.grad(METHODS["fisher-gan"].critic(d), critic.multiplier)
    critic.multiplier.requires_grad_(False)
    before = critic.multiplier.clone()
    METHODS["fisher-gan"].after_critic(d)
    assert_close(critic.multiplier, before - RHO * slope)
    assert slope != 0


# The loop ---------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([1.0, -0.5]), torch.tensor([0.6, 0.3])
SMALL = {
    "hidden": 32, "critic_hidden": 32, "depth": 2, "batch": 64, "lr": 3e-3, "critic_lr": 3e-3, "ema": 0.95,
    "updates": 100, "log_every": 100, "norm": "none", "decay": False,
}  # fmt: skip
TAMED = {"penalty": 0.1, "beta1": 0.5, "updates": 200}  # without it small nets circle around the solution
CHANGES = {
    "gan": TAMED,
    "gan-saturating": TAMED,
    "gan-symmetric": TAMED,
    "mix-wgan": {"components": 2},
    "mmd-gan": {"batch": 32},
    "fisher-gan": {"beta1": 0.0, "updates": 250},
    "eb-gan": {"lr": 1e-3, "critic_lr": 1e-3, "updates": 250},
}


def one_gaussian():
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    split = data.Split(MEAN + STD * noise, torch.zeros(4096, dtype=torch.long))
    return data.Dataset("one", split, split, split)


def fitted(name, **changes):
    made = Experiment.make("ring8", name, **SMALL | CHANGES.get(name, {}) | changes)
    trainer = experiment.prepare(made, one_gaussian(), CPU)
    trainer.fit()
    with torch.no_grad():
        return trainer, trainer.evaluated_players()["decoder"](torch.randn(4000, 2)).rsample()


def misfit(x):
    """The largest error of the means, in the target's units of spread, and the largest |log ratio| of spreads."""
    return ((x.mean(0) - MEAN) / STD).abs().max().item(), (x.std(0) / STD).log().abs().max().item()


@pytest.mark.parametrize("name", ON_POINTS)
def test_every_row_fits_a_gaussian(name):
    _, x = fitted(name)
    place, spread = misfit(x)
    assert place < 0.5 and spread < math.log(2), f"mean off by {place:.2f} spreads, spread by e^{spread:.2f}"


def test_a_row_that_climbs_where_it_should_descend_does_not_fit(monkeypatch):
    row = METHODS["wgan"]
    monkeypatch.setitem(METHODS, "wgan", replace(row, player=gans.lowered(row.player)))
    _, x = fitted("wgan")
    assert misfit(x)[0] > 2


def test_dcgan_learns_a_picture():
    """Every image is the same cross."""
    cross = torch.zeros(1, 8, 8, dtype=torch.uint8)
    cross[:, 3:5], cross[:, :, 3:5] = 255, 255
    split = data.Split(cross.expand(64, 1, 8, 8).clone(), torch.zeros(64, dtype=torch.long))
    made = Experiment.make("digits", "dcgan", channels=8, batch=16, updates=150, log_every=150, lr=2e-3, critic_lr=2e-3)
    trainer = experiment.prepare(made, data.Dataset("cross", split, split, split), CPU)

    def distance():
        with torch.no_grad():
            x = trainer.evaluated_players()["decoder"](torch.randn(50, 100)).mean
        return (x - cross / 255).abs().mean().item()

    start = distance()
    trainer.fit()
    assert start > 0.4 and distance() < 0.15


@pytest.mark.parametrize("side, smallest", [(64, 4), (32, 4), (28, 7), (8, 4)])
def test_dcgan_halves_the_sides_down_to_seven_or_less(side, smallest):
    shape = (3, side, side)
    assert nets.dcgan_sides(shape)[-1] == (smallest, smallest)
    model = build_model(Nets(architecture="dcgan", channels=4), METHODS["svae"], shape, 0)
    x = model.decoder(torch.randn(2, 64)).mean
    assert x.shape == (2, *shape) and model.critics[0](x, torch.randn(2, 64)).shape == (2,)
    assert model.encoder(x).rsample().shape == (2, 64)
    weights = [m.weight for m in model.decoder.modules() if isinstance(m, nn.ConvTranspose2d | nn.Linear)]
    n = sum(w.numel() for w in weights)
    variance = sum(w.square().sum() for w in weights).item() / n
    assert abs(variance / 0.02**2 - 1) < 4 * math.sqrt(2 / n), "N(0, 0.02²)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ring8", "dcgan"], "dcgan needs images, and ring8 holds points"),
        (["ring8", "gan", "--set", "augment=true"], "augment needs images"),
        (["ring8", "gan", "--set", "architecture=dcgan"], "architecture=dcgan needs images"),
        (["digits", "gan", "--set", "architecture=resnet"], "must be one of a1, dcgan, a2, a3, authors, beyond"),
        (["ring8", "wgan", "--set", "components=0"], "components must be positive, not 0"),
        (["ring8", "vae", "--set", "components=2"], "set encoder=gaussian, decoder=gaussian and components=1"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["run", *arguments, "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("svae: ")
    assert not list(tmp_path.rglob("*.json"))


def test_images_that_do_not_halve_are_refused():
    for side in (30, 3):
        with pytest.raises(UserError, match="the DCGAN nets need image sides that halve"):
            nets.dcgan_sides((1, side, side))


def test_published_settings_and_those_of_points():
    def of(dataset, name):
        return Experiment.make(dataset, name).flat()

    for dataset, weight in (("digits", 10.0), ("ring8", 0.1)):
        made = of(dataset, "wgan-gp")
        assert (made["weight"], made["critic_steps"], made["beta1"], made["beta2"]) == (weight, 5, 0.5, 0.9)
        assert made["critic_norm"] == "none", "the penalty is on the slope at one sample"
    for name in ("wgan", "mix-wgan", "mmd-gan", "mcgan-mean", "mcgan-cov"):
        made = of("digits", name)
        assert (made["clip"], made["critic_steps"], made["beta1"]) == (0.01, 5, 0.0)
    made = of("digits", "dcgan")
    assert (made["lr"], made["critic_lr"], made["beta1"], made["z_dim"]) == (2e-4, 2e-4, 0.5, 100)
    assert (of("digits", "fisher-gan")["weight"], of("digits", "eb-gan")["weight"]) == (1e-6, 10.0)


def test_clipped_critics_stay_in_their_box():
    trainer, _ = fitted("wgan", updates=3, log_every=3)
    assert all(p.abs().max() <= 0.01 for p in trainer.critics.parameters())
    free, _ = fitted("wgan", updates=3, log_every=3, clip=0.0)
    assert any(p.abs().max() > 0.01 for p in free.critics.parameters())


def test_the_fisher_multiplier_is_saved_and_resumed(tmp_path):
    def made():
        changes = SMALL | {"updates": 6, "log_every": 3}
        return experiment.prepare(Experiment.make("ring8", "fisher-gan", **changes), one_gaussian(), CPU)

    whole, first, second = made(), made(), made()
    whole.fit()

    def stop(row):
        train.write_checkpoint(first.state(), tmp_path / "run.pt")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "run.pt", stop)
    second.load_state(train.read_checkpoint(tmp_path / "run.pt"))
    saved = second.critics[0].multiplier.item()
    assert saved == first.critics[0].multiplier.item() != 0
    second.fit(tmp_path / "run.pt")
    assert second.critics[0].multiplier == whole.critics[0].multiplier != saved


@pytest.mark.parametrize("name", NAMES)
def test_every_row_runs_on_images_with_every_stabiliser(name, monkeypatch):
    monkeypatch.setattr(experiment, "usable", lambda precision, device: precision)  # bf16 even where it is imitated
    digits = data.load("digits")
    changes = {"updates": 1, "batch": 4, "hidden": 8, "critic_hidden": 8, "channels": 4, "log_every": 1}
    stabilisers = {"augment": True, "spectral": True, "penalty": 0.1, "instance_noise": 0.1, "ema": 0.9}
    made = Experiment.make("digits", name, precision="bf16", **changes, **stabilisers)
    trainer = experiment.prepare(made, digits, CPU)
    assert trainer.training.precision == "bf16"
    before = [p.detach().clone() for p in trainer.model.decoder.parameters()]
    trainer.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.decoder.parameters(), strict=True))
    with torch.no_grad():
        x = trainer.evaluated_players()["decoder"](torch.randn(4, made.nets.z_dim)).mean
    assert x.shape == (4, *digits.shape) and 0 <= x.min() and x.max() <= 1


# Stabilisers ------------------------------------------------------------------------------------------


def pictures(count=5, channels=3, side=8):
    return torch.rand(count, channels, side, side, dtype=torch.float64)


def test_augmentations_by_hand():
    x, half, one = pictures(), torch.full((5,), 0.5), torch.ones(5)
    neutral = augment.contrast(augment.saturation(augment.brightness(x, half), half), half)
    assert_close(augment.translation(neutral, half, half), x)
    assert_close(augment.brightness(x, one), x + 0.25)
    assert_close(augment.saturation(x, 0 * one), x.mean(1, keepdim=True).expand_as(x))
    assert_close(augment.saturation(x[:, :1], one), x[:, :1])
    strong = augment.contrast(x, one)
    assert_close(strong.mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert_close(strong.flatten(1).std(1), 1.5 * x.flatten(1).std(1))
    moved = augment.translation(x, 0 * one, one, ratio=1 / 4)  # two pixels up and to the right
    assert_close(moved[:, :, :6, 2:], x[:, :, 2:, :6])
    assert moved[:, :, 6:].abs().max() == 0 == moved[:, :, :, :2].abs().max()
    cut = augment.cutout(x, half, 0 * one)  # rows 2 to 5, columns up to 1
    assert cut[:, :, 2:6, :2].abs().max() == 0
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:6, :2] = False
    assert_close(cut[..., outside], x[..., outside])


def test_translations_are_equally_likely():
    x = torch.zeros(1_000, 1, 16, 16)
    x[:, :, 8, 8] = 1
    u = (torch.arange(1_000) + 0.5) / 1_000
    moved = augment.translation(x, u, (5 * u).frac()).mean(0)[0]  # each fifth of u goes with all of (0, 1)
    expected = torch.zeros(16, 16)
    expected[6:11, 6:11] = 1 / 25
    assert_close(moved, expected)


def test_augmentation_passes_the_gradient():
    x, u = pictures(2, 2, 4).requires_grad_(), torch.rand(7, 2)
    assert torch.autograd.gradcheck(lambda x: augment.augment(x, u), x)
    (slope,) = torch.autograd.grad(augment.augment(x, u).sum(), x)
    assert slope.abs().sum() > 0


class Difference(nn.Module):
    def forward(self, x, y, z):
        return (x - y).flatten(1).abs().sum(1) + z.sum(1)


def test_images_of_a_sample_share_a_change_that_others_do_not():
    x, z = pictures(40), torch.randn(40, 2)
    assert_close(augment.Augmented(Difference())(x, x, z), z.sum(1).double())
    alike = x[:1].expand(40, -1, -1, -1)
    changed = augment.augment(alike, torch.rand(7, 40)).flatten(1)
    assert (changed[0] - changed[1:]).abs().amax(1).min() > 0


def test_augment_is_one_key_of_every_critic_of_images():
    for name in ("gan", "svae", "alice-a", "eb-gan"):
        on, off = (build_model(Nets(augment=a), METHODS[name], (1, 8, 8), 0).critics for a in (True, False))
        assert all(isinstance(critic, augment.Augmented) for critic in on)
        assert not any(isinstance(critic, augment.Augmented) for critic in off)


def layers(critic):
    return [m for m in critic.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]


def largest(layer):
    rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0  # which axis counts the outputs
    return torch.linalg.matrix_norm(layer.weight.detach().transpose(0, rows).flatten(1), 2).item()


@pytest.mark.parametrize(
    "name, shape", [("gan", (2,)), ("gan", (1, 8, 8)), ("eb-gan", (1, 8, 8)), ("dcgan", (1, 8, 8))]
)
def test_spectral_norm_bounds_every_layer_by_one(name, shape):
    row = METHODS[name]
    sizes = {"architecture": row.defaults.get("architecture", "a1"), "critic_hidden": 16, "channels": 8}
    models = [build_model(Nets(spectral=s, **sizes), row, shape, 0) for s in (True, False)]
    assert not any(nn.utils.parametrize.is_parametrized(layer) for layer in models[0].players.modules())
    bound, free = (model.critics[0] for model in models)
    with torch.no_grad():
        for critic in (bound, free):
            for layer in layers(critic):
                (layer.parametrizations.weight.original if critic is bound else layer.weight).mul_(50)
        for _ in range(100):  # the power iteration of each layer
            bound(torch.rand(4, *shape))
    norms = [largest(layer) for layer in layers(bound)]
    assert len(norms) == len(layers(free)) and max(norms) <= 1 + 1e-2
    assert min(largest(layer) for layer in layers(free)) > 1


def test_a_critic_of_points_with_spectral_norm_has_slope_at_most_one():
    sizes = {"critic_hidden": 16, "critic_norm": "none", "critic_dropout": 0.0}
    critic = build_model(Nets(spectral=True, **sizes), METHODS["gan"], (2,), 0).critics[0]
    x, y = 3 * torch.randn(2, 500, 2)
    with torch.no_grad():
        for _ in range(100):
            critic(x)
        rise = (critic(x) - critic(y)).abs() / (x - y).norm(dim=1)
    assert 0 < rise.max() <= 1 + 1e-2


def test_the_slope_penalty_of_features_is_the_squared_norm_of_the_jacobian():
    torch.manual_seed(0)
    matrix = torch.randn(3, 5, dtype=torch.float64)
    x = torch.randn(20_000, 3, dtype=torch.float64, requires_grad=True)
    estimate = mean_squared_slope(x @ matrix, (x,))
    gram = matrix.mT @ matrix  # Var vᵀGv = 2 tr G² for v ~ N(0, I)
    error = (2 * (gram @ gram).trace() / len(x)).sqrt()
    assert abs(estimate - matrix.square().sum()) < 4 * error
    assert abs(matrix.sum(1).square().sum() - matrix.square().sum()) > 4 * error, "the slope of the sum is another"


def test_constraints_that_stacking_would_lose_are_refused():
    def together(name, *changes, **common):
        made = [Experiment.make("ring8", name, **SMALL | common | change) for change in changes]
        return experiment.prepare_together(made, one_gaussian(), CPU)

    with pytest.raises(UserError, match="ParametrizedLinear cannot be trained together"):
        together("gan", {"seed": 0}, {"seed": 1}, spectral=True)
    with pytest.raises(UserError, match="clipped critics with different critic_lr"):
        together("wgan", {"critic_lr": 1e-3}, {"critic_lr": 1e-4})
    assert together("wgan", {"seed": 0}, {"seed": 1}).runs == 2
    for name in ("mix-wgan", "mmd-gan", "fisher-gan", "mcgan-mean", "mcgan-cov"):
        with pytest.raises(UserError, match="is no mean over samples"):
            together(name, {"seed": 0}, {"seed": 1})
