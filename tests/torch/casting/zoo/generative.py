"""Models that draw: a VAE with weight norm, a GAN with spectral norm and two optimizers, and a step of diffusion."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

WIDE, IMAGE = 24, 8
DIFFUSION_STEPS = 1000


class VAE(nn.Module):
    """An encoder to means and log-variances, a sample, a decoder under weight norm."""

    def __init__(self, width: int = 48, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDE, width), nn.SiLU())
        self.mean = nn.Linear(width, latent)
        self.log_variance = nn.Linear(width, latent)
        self.decoder = nn.Sequential(
            weight_norm(nn.Linear(latent, width)), nn.SiLU(), weight_norm(nn.Linear(width, WIDE))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        deviation = torch.exp(0.5 * log_variance)
        sample = mean + deviation * torch.randn_like(deviation)
        return self.decoder(sample), mean, log_variance


def generator_network() -> nn.Module:
    """Return a GAN's generator of points in the plane."""
    return nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 2))


class Discriminator(nn.Module):
    """Linear layers under spectral norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(2, width))
        self.second = spectral_norm(nn.Linear(width, width))
        self.head = spectral_norm(nn.Linear(width, 1))

    def forward(self, point: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(point), 0.2)
        return self.head(F.leaky_relu(self.second(x), 0.2)).squeeze(1)


class Denoiser(nn.Module):
    """Predicts the noise in an image at a time given by sines, between convolutions under GroupNorm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.before = nn.Conv2d(1, width, 3, padding=1)
        self.first_norm = nn.GroupNorm(4, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second_norm = nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.after = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
        angle = time.float()[:, None] * frequency[None]
        embedding = self.time(torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1).to(image.dtype))
        x = self.before(image)
        hidden = self.first(F.silu(self.first_norm(x))) + embedding[:, :, None, None]
        return self.after(x + self.second(F.silu(self.second_norm(hidden))))


def curves(generator: Generator) -> tuple[Tensor]:
    """Draw vectors that two numbers determine, all but for a little noise."""
    basis = torch.randn(2, WIDE, generator=Generator().manual_seed(1))
    x = torch.tanh(torch.randn(96, 2, generator=generator) @ basis)
    return (x + 0.05 * torch.randn(96, WIDE, generator=generator),)


def evidence(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Return the negative evidence lower bound, for a deviation of 0.25 in each dimension."""
    (x,) = batch
    out, mean, log_variance = model(x)
    divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp(), dim=1)
    return (8 * F.mse_loss(out, x, reduction="none").sum(1) + divergence).mean()


def plane(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw points around (2, -1), correlated, and what the generator starts from."""
    shape = torch.tensor([[0.6, 0.3], [0.0, 0.3]])
    points = torch.randn(96, 2, generator=generator) @ shape + torch.tensor([2.0, -1.0])
    return points, torch.randn(96, 4, generator=generator)


def deceive(generator: nn.Module, discriminator: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the generator's loss, the one that does not saturate."""
    return F.softplus(-discriminator(generator(batch[1]))).mean()


def discriminate(generator: nn.Module, discriminator: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the discriminator's loss."""
    real, noise = batch
    judged_real, judged_fake = discriminator(real), discriminator(generator(noise).detach())
    ones, zeros = torch.ones_like(judged_real), torch.zeros_like(judged_fake)
    return F.binary_cross_entropy_with_logits(judged_real, ones) + F.binary_cross_entropy_with_logits(
        judged_fake, zeros
    )


def energy_distance(generator: nn.Module, _: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return how far the generator's points are from the real ones (Szekely and Rizzo)."""
    real, noise = batch
    fake = generator(noise)
    return 2 * _mean_distance(real, fake) - _mean_distance(real, real) - _mean_distance(fake, fake)


def _mean_distance(first: Tensor, second: Tensor) -> Tensor:
    return (first[:, None] - second[None]).norm(dim=2).mean()


def bumps(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw smooth images, their times and their noise."""
    phase = 6.28 * torch.rand(32, 1, 1, generator=generator)
    down, right = torch.meshgrid(torch.arange(IMAGE), torch.arange(IMAGE), indexing="ij")
    image = torch.sin(0.8 * (down + right) + phase)[:, None]
    time = torch.randint(DIFFUSION_STEPS, (32,), generator=generator)
    return image, time, torch.randn(32, 1, IMAGE, IMAGE, generator=generator)


def predict_noise(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of the predicted noise (Ho et al., a linear schedule)."""
    image, time, noise = batch
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, DIFFUSION_STEPS), 0)[time][:, None, None, None]
    return F.mse_loss(model(kept.sqrt() * image + (1 - kept).sqrt() * noise, time), noise)
