"""What is counted and predicted: by hand for a layer, against PyTorch's counter for an update, toys for the rest."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svae_lib import costs, models
from svae_lib.costs import Machine, Operator
from svae_lib.errors import UserError
from svae_lib.experiment import Experiment
from svae_lib.methods import METHODS

TOY = Machine("toy", fp32=100.0, bf16=1_000.0, bandwidth=10.0, overhead=2.0)


def test_a_linear_layer_is_counted_as_by_hand():
    layer, x = nn.Linear(20, 30, bias=False), torch.zeros(5, 20)
    with torch.no_grad():
        (operator,) = costs.count(lambda: layer(x))
    assert operator.flops == 2 * 5 * 20 * 30
    assert operator.bytes == 4 * (5 * 20 + 20 * 30 + 5 * 30)
    assert not operator.half


def test_a_convolution_is_counted_as_by_hand_forward_and_backward():
    layer, x = nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False), torch.zeros(4, 1, 28, 28)
    forward = 2 * 4 * 14 * 14 * 32 * 9
    with torch.no_grad():
        assert sum(op.flops for op in costs.count(lambda: layer(x))) == forward == 4 * 112_896  # as the page says
    operators = costs.count(lambda: layer(x).sum().backward())  # of the weight alone: x needs no gradient
    assert sum(op.flops for op in operators) == 2 * forward
    half = costs.count(lambda: layer.bfloat16()(x.bfloat16()))
    assert [op.half for op in half if op.flops] == [True] and half[-1].bytes == operators[0].bytes // 2


def test_views_move_nothing_and_a_batch_reads_only_its_rows():
    x = torch.zeros(1_000, 10)
    assert costs.count(lambda: x.view(10_000).view(100, 100).t()) == []
    rows = torch.arange(3)
    (gather,) = costs.count(lambda: x[rows])
    assert gather.bytes == 2 * 3 * 10 * 4
    (filled,) = costs.count(lambda: torch.empty(7).zero_())
    assert filled.bytes == 2 * 7 * 4  # an upper bound: what is overwritten counts as read


def test_the_optimiser_is_counted_though_it_returns_nothing():
    weight = nn.Parameter(torch.zeros(100))
    weight.grad = torch.zeros(100)
    optimiser = torch.optim.Adam([weight], fused=True)
    optimiser.step()
    operators = costs.count(optimiser.step)
    (adam,) = [op for op in operators if op.name == "_fused_adam_"]
    assert adam.bytes >= 4 * 100 * (4 + 3)  # weight, gradient and both moments are read, all but the gradient written


@pytest.mark.parametrize("method", ["vae", "svae-r"])
def test_an_update_without_content_is_counted_like_a_real_one(method):
    experiment = Experiment.make("mnist", method, batch=8)
    cost = costs.cost(experiment, (1, 8, 8))
    model = models.build_model(experiment.nets, METHODS[method], (1, 8, 8), 0)
    split = costs.Split(torch.zeros(16, 1, 8, 8, dtype=torch.uint8), torch.zeros(16, dtype=torch.long))
    trainer = costs.Trainer(model, METHODS[method], experiment.training, split, split, 0)
    trainer.update()
    with FlopCounterMode(display=False) as counter:
        trainer.update()
    assert sum(op.flops for op in cost.update) == counter.get_total_flops() > 0
    assert cost.flops == counter.get_total_flops() / 8
    nets = (trainer.model.players, trainer.critics)
    assert cost.parameters == sum(parameter.numel() for net in nets for parameter in net.parameters())


def test_counting_needs_no_memory_and_leaves_the_random_stream_alone():
    before = torch.get_rng_state()
    large = costs.cost(Experiment.make("mnist", "vae", batch=10**7), (1, 28, 28))  # 31 GB of pixels
    small = costs.cost(Experiment.make("mnist", "vae", batch=10), (1, 28, 28))
    assert large.flops == small.flops and large.bytes < small.bytes
    assert torch.equal(before, torch.get_rng_state())


def test_the_average_costs_one_operator():
    plain, averaged = (costs.cost(Experiment.make("mnist", "vae", ema=ema), (1, 8, 8)) for ema in (0.0, 0.9))
    *same, average = averaged.update
    assert same == plain.update and average.name == "_foreach_lerp_"
    assert average.bytes >= 3 * 4 * plain.parameters  # both nets are read, one is written


@pytest.mark.parametrize("method", ["iaf-vae", "mix-wgan", "pixelcnn"])
def test_nets_of_all_kinds_are_counted(method):
    """Some look at numbers while they are made; a pixel model's image would be one pass for each pixel."""
    cost = costs.cost(Experiment.make("mnist", method, batch=2, hidden=16, depth=1), (1, 8, 8))
    assert cost.flops > 0 and bool(cost.image) is (method != "pixelcnn")


def test_nets_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="divisible by 4"):
        costs.cost(Experiment.make("mnist", "vae"), (1, 9, 9))


def test_every_architecture_has_its_costs(monkeypatch):
    """Of a method that all of them serve; those of the authors draw only, and have no VAE."""
    monkeypatch.setattr(costs, "SHAPES", {"mnist": (1, 8, 8), "cifar10": (3, 16, 16), "imagenet64": (3, 16, 16)})
    found = {(cost.experiment.nets.architecture, cost.dataset) for cost in costs.all_costs("svae-r")}
    assert {architecture for architecture, _ in found} == set(models.FAMILIES)
    assert ("a1", "mnist") in found and ("a1", "cifar10") not in found and ("dcgan", "imagenet64") in found


def test_the_time_of_a_toy_is_the_sum_of_what_bounds_each_operator():
    heavy, wide, tiny = Operator("a", 1_000, 10, False), Operator("b", 100, 70, False), Operator("c", 0, 1, False)
    predicted = costs.predict([heavy, wide, tiny], TOY)
    assert predicted.seconds == 10 + 7 + 2
    assert predicted.shares == {"arithmetic": 10 / 19, "memory": 7 / 19, "overhead": 2 / 19}
    assert predicted.limit == "arithmetic"
    half = heavy._replace(half=True)
    assert costs.predict([half], TOY).seconds == 2  # ten times the rate: the overhead binds
    assert costs.predict([half], Machine("old", 100.0, None, 10.0, 2.0)).seconds == 10
    assert costs.predict([], TOY).seconds == 0
