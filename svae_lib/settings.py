r"""What the names of profiles and settings stand for: the budgets, and the choices that the papers leave open."""

from __future__ import annotations

from typing import Any

PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "quick": {"updates": 400, "log_every": 40, "score_samples": 300, "iw_samples": 500, "iw_images": 20},
        "cpu": {"updates": 2_500, "precision": "bf16", "iw_images": 50},
        "paper": {"updates": 200_000, "log_every": 1_000, "precision": "bf16", "score_samples": 50_000},
    },
    "points": {
        "quick": {"updates": 400, "log_every": 100, "score_samples": 2_500},
        "cpu": {"updates": 8_000, "log_every": 2_000, "score_samples": 2_500},
        "paper": {"updates": 200_000, "log_every": 20_000, "score_samples": 2_500},
    },
}
PROFILES["natural"] = {
    "quick": PROFILES["images"]["quick"] | {"updates": 100, "log_every": 10, "iw_samples": 50, "iw_images": 5},
    "cpu": PROFILES["images"]["cpu"] | {"updates": 1_250, "iw_samples": 1_000, "iw_images": 20},
    "paper": PROFILES["images"]["paper"],
}
PROFILES["large"] = PROFILES["natural"] | {  # an update of A.3 costs ten times as much as one of A.2, or more
    "cpu": PROFILES["natural"]["cpu"] | {"updates": 150, "log_every": 25, "iw_samples": 200}
}

# The appendix that fits the size; the critic's MLPs are as wide as its last convolution.
A2 = {"architecture": "a2", "z_dim": 100, "critic_hidden": 64}
A3 = {"architecture": "a3", "z_dim": 2_048, "critic_hidden": 256}
APPENDIX = {"cifar10": A2, "patches32": A2, "tiny_imagenet": A3, "imagenet64": A3, "patches64": A3}  # others: A.1

# "literal" is what the appendix prints. "stabilised" keeps the players and bounds the slope of the critic,
# which then no longer reads the quantisation of x, and sees where in the image a stroke is.
# For points, of which the papers say nothing, it is one plain setting for all methods. λ is small there because a
# density of narrow clusters is large: log p_θ(x|z) weighs a squared error by 1/2σ².
PLAIN_MLPS = {
    "z_dim": 2, "depth": 4, "hidden": 64, "critic_hidden": 64, "norm": "batch", "critic_norm": "none",
    "critic_dropout": 0.0, "batch": 128, "lr": 3e-3, "critic_lr": 1e-3, "beta1": 0.5, "decay": True, "ema": 0.999,
    "weight": 0.1,
}  # fmt: skip
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "literal": {},
        "stabilised": {
            "critic_dropout": 0.0, "critic_norm": "none", "critic_pool": "none",
            "instance_noise": 0.1, "penalty": 0.01, "lr": 3e-4, "critic_lr": 3e-4, "beta1": 0.5, "ema": 0.995,
        },
    },
    "points": {
        "literal": PLAIN_MLPS,
        "stabilised": PLAIN_MLPS | {"penalty": 0.001},
    },
}  # fmt: skip
SETTINGS["natural"] = SETTINGS["images"] | {
    "beyond": SETTINGS["images"]["stabilised"] | {"architecture": "beyond", "z_dim": 1_024, "norm": "group"},
    # the program that the authors of paper S published
    "authors": {"architecture": "authors", "z_dim": 256, "critic_dropout": 0.0, "beta1": 0.5, "weight": 1.0},
}
