r"""What the engine is measured against: loops written by hand, the layers alone, and the trainers of others.

Every function returns a callable that does the same work as `Trainer.update` or as an epoch of it: the same nets, batch
and number of images, with Adam at the same rate. Packages that are not installed raise UserError.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, TensorDataset

from svae_lib.costs import Recorder
from svae_lib.draws import Model
from svae_lib.engine import Graph
from svae_lib.errors import UserError
from svae_lib.timing import Seconds, Step, clock
from svae_lib.train import Trainer

# By hand -------------------------------------------------------------------------------------------


def by_hand(trainer: Trainer) -> Step:
    r"""The update of `vae` or `svae-r` as a good engineer writes it for one run: no classes, nothing optional.

    Data on the device, fused Adam, nets in channels-last layout, no synchronisation: what costs nothing to write.
    """
    return {"vae": _vae_by_hand, "svae-r": _svae_r_by_hand}[trainer.method.name](trainer)


def _adam(trainer: Trainer, nets: list[nn.Module], lr: float) -> torch.optim.Adam:
    parameters = [parameter for net in nets for parameter in net.parameters()]
    return torch.optim.Adam(parameters, lr, fused=trainer.device.type != "mps")


def _batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    images, size = trainer.data.images, trainer.training.batch
    x = trainer.model.axis.draw(images[torch.randint(len(images), (size,), device=trainer.device)])
    return x, torch.randn(size, trainer.model.z_dim, device=trainer.device)


def _autocast(trainer: Trainer):
    half = trainer.training.precision == "bf16"
    return torch.autocast(trainer.device.type, torch.bfloat16) if half else nullcontext()


def _vae_by_hand(trainer: Trainer) -> Step:
    encoder, decoder = trainer.model.encoder, trainer.model.decoder
    optimiser = _adam(trainer, [encoder, decoder], trainer.training.lr)

    def step() -> None:
        x, noise = _batch(trainer)
        with _autocast(trainer):
            mean, log_var = encoder(x)
            z = mean + (0.5 * log_var).exp() * noise
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
            loss = (kl - decoder(z).log_prob(x)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def _svae_r_by_hand(trainer: Trainer) -> Step:
    encoder, decoder, critic = trainer.model.encoder, trainer.model.decoder, trainer.model.critics[0]
    players = [*encoder.parameters(), *decoder.parameters()]
    optimiser = _adam(trainer, [encoder, decoder], trainer.training.lr)
    critic_optimiser = _adam(trainer, [critic], trainer.training.critic_lr)
    weight = trainer.training.weight

    def step() -> None:
        x, z_p = _batch(trainer)
        with _autocast(trainer):
            z_q, x_p = encoder(x).rsample(), decoder(z_p).rsample()
            f_q, f_p = critic(x, z_q.detach()), critic(x_p.detach(), z_p)
            loss = -logsigmoid(-f_q).mean() - logsigmoid(f_p).mean()
        critic_optimiser.zero_grad()
        loss.backward()
        critic_optimiser.step()
        with _autocast(trainer):
            reconstruction = decoder(z_q).log_prob(x) + encoder(x_p).log_prob(z_p)
            loss = (critic(x_p, z_p) - critic(x, z_q) - weight * reconstruction).mean()
        optimiser.zero_grad()
        loss.backward(inputs=players)
        optimiser.step()

    return step


# The layers alone ----------------------------------------------------------------------------------

LAYERS = ("convolution", "addmm", "mm", "bmm", "baddbmm", "batch_norm", "group_norm", "layer_norm")
LAYERS += ("relu", "threshold", "_adaptive_avg_pool", "native_dropout", "bernoulli_")  # the last draws dropout's masks


def layers_alone(update: Step, device: torch.device) -> Step:
    r"""The operators of the layers in one eager `update`, forward and backward, on the same tensors, and nothing else.

    No batch is drawn, no loss is computed, no graph is built, no weight moves: it is what remains when all else costs
    nothing. On CUDA they are captured in a graph, so that it is the device that is timed. All tensors of an update are
    kept, so that less of them is in the caches than while training; on small nets the ratio may fall below one.
    """
    calls: list[tuple] = []

    def keep(function, args: tuple, kwargs: dict) -> None:
        if any(layer in function._schema.name for layer in LAYERS):
            calls.append((function, args, kwargs))

    with Recorder(keep):
        update()

    @torch.no_grad()
    def replay() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return Graph(replay, device) if device.type == "cuda" else replay


# Trainers of others --------------------------------------------------------------------------------


def pythae_epoch(model: Model, images: Tensor, batch: int, device: torch.device) -> Step:
    r"""An epoch of pythae's own trainer over float images, with our nets in its VAE; its progress bar is off.

    What its `train` does besides, copying the best model and saving the last, is not counted.
    """
    try:
        from pythae.data.datasets import BaseDataset
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
        from pythae.trainers import BaseTrainer, BaseTrainerConfig
        from pythae.trainers.training_callbacks import CallbackHandler
    except ImportError:
        raise UserError("pip install pythae") from None
    logging.getLogger(BaseTrainer.__module__).setLevel(logging.ERROR)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_var = self.net(x)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z).mean)

    shape = tuple(images.shape[1:])
    config = VAEConfig(input_dim=shape, latent_dim=model.z_dim, reconstruction_loss="bce")
    data = BaseDataset(images, torch.zeros(len(images)))
    with tempfile.TemporaryDirectory() as folder:
        options = BaseTrainerConfig(
            output_dir=folder, num_epochs=1, per_device_train_batch_size=batch, learning_rate=1e-4,
            no_cuda=device.type != "cuda",
        )  # fmt: skip
        trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), data, training_config=options)
        with torch.random.fork_rng():
            trainer.prepare_training()
    trainer.callback_handler = CallbackHandler([], trainer.model)

    def epoch() -> None:
        trainer.train_step(1)

    return epoch


def lightning_epoch(model: Model, images: Tensor, batch: int, device: torch.device) -> Callable[[], Seconds]:
    r"""An epoch of Lightning's Trainer over float images, `barebones`: no logger, bar, checkpoint or sanity check.

    The callable returns the seconds between its own hooks at start and end of the epoch, without setup.
    """
    import svae_lib._torchvision  # noqa: F401  (torchmetrics imports torchvision)

    try:
        import lightning
    except ImportError:
        raise UserError("pip install lightning") from None

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = model.encoder, model.decoder

        def training_step(self, rows: list[Tensor], _: int) -> Tensor:
            (x,) = rows
            q = self.encoder(x)
            nll = -self.decoder(q.rsample()).log_prob(x)
            return (nll + q.kl_to_standard()).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-4)

        def on_train_epoch_start(self) -> None:
            self.start = clock(device)

        def on_train_epoch_end(self) -> None:
            self.seconds = clock(device) - self.start

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, data = Module(), DataLoader(TensorDataset(images), batch, shuffle=True)

    def epoch() -> Seconds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it advises more workers, which are slower for tensors in memory
            kind = "gpu" if device.type == "cuda" else device.type
            trainer = lightning.Trainer(max_epochs=1, accelerator=kind, devices=1, barebones=True)
            trainer.fit(module, data)
        return Seconds(module.seconds)

    return epoch


def torchvision_batches(images: Tensor, labels: Tensor, batch: int, workers: int = 0) -> Step:
    r"""An epoch of batches as torchvision's MNIST and torch's DataLoader make them from the same bytes."""
    from svae_lib._torchvision import torchvision

    class InMemory(torchvision.datasets.MNIST):
        def _check_exists(self) -> bool:
            return True

        def _load_data(self) -> tuple[Tensor, Tensor]:
            return images[:, 0], labels

    with tempfile.TemporaryDirectory() as folder:
        data = InMemory(folder, transform=torchvision.transforms.ToTensor())
    loader = DataLoader(data, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch
