"""Convolutions: a plain net and a residual one with BatchNorm that tell stripes apart, a UNet that finds a disk."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

SIZE = 12


class ConvNet(nn.Module):
    """Convolution, BatchNorm, ReLU and pooling, twice."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(2 * width * (SIZE // 4) ** 2, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image)
        return self.head(x.view(x.size(0), -1))


class ResidualBlock(nn.Module):
    """He et al.'s basic block, with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """A stem, two residual blocks, global pooling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(width, width, 1), ResidualBlock(width, 2 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(image))), 1))


def convolve(inputs: int, outputs: int) -> nn.Sequential:
    """Return a convolution, GroupNorm and SiLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())


class UNet(nn.Module):
    """One level down, one up by a transposed convolution, and a skip that is concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.before = convolve(1, width)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.middle = convolve(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.after = convolve(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.before(image)
        x = self.up(self.middle(self.down(skip)))
        return self.head(self.after(torch.cat([skip, x], dim=1)))


def stripes(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw noisy images of stripes, SIZE by SIZE, in one of four directions."""
    label = torch.randint(4, (48,), generator=generator)
    phase = 6.28 * torch.rand(48, 1, 1, generator=generator)
    down, right = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = torch.stack([down, right, 0.7 * (down + right), 0.7 * (down - right)])[label]
    image = torch.sin(1.5 * along + phase) + 0.5 * torch.randn(48, SIZE, SIZE, generator=generator)
    return image[:, None], label


def disks(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw noisy images of one brighter disk, and the mask of it."""
    centre = 2 + (SIZE - 4) * torch.rand(24, 2, 1, 1, generator=generator)
    down, right = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    mask = ((down - centre[:, 0]) ** 2 + (right - centre[:, 1]) ** 2 < 9).float()
    return (mask + 0.5 * torch.randn(24, SIZE, SIZE, generator=generator))[:, None], mask[:, None]


def segment(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of a mask's logits and its soft Dice loss."""
    image, mask = batch
    logits = model(image)
    found = torch.sigmoid(logits)
    dice = 1 - (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + dice
