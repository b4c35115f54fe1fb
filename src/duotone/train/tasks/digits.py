"""Handwritten digits of 8x8 pixels: the classifier that trains in seconds, bundled with scikit-learn.

    loss = mean of -ln p(digit | image);  nll is the same on held-out images, beside their accuracy

1797 images (Alpaydin and Kaynak 1998), of which 30 % are held out, the same share of each digit. `mlp` and `convnet`,
with convolution and BatchNorm, train well. `sgd` and `small-gradients` show what each mechanism of mixed precision is
for: small updates for long, and the same with gradients below FP16's range. Left out: augmentation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from duotone.errors import TaskError, nearest_names
from duotone.train.task import Task, evaluating

BATCH = 32

# what `small-gradients` multiplies its loss by. A mean over 32 images passes less than 2^-5 to a logit, so less than
# 2^-27 remains, and FP16 rounds everything up to 2^-25 to 0
SHRINK = 2.0**-22


def mlp() -> nn.Module:
    """Return the 64-64-10 network: pixels (B, 64) to logits (B, 10)."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def he_mlp() -> nn.Module:
    """Return the same network with the initial weights of He et al. (1502.01852), and biases of 0.

    Their variance, 2 / inputs, is six times that of torch's default, so plain SGD gets on from the first step.
    """
    network = mlp()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def convnet() -> nn.Module:
    """Return two convolutions with BatchNorm, a pool and a linear head: pixels (B, 64) to logits (B, 10)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def classification_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy, in nats, computed in FP32, of pixels (B, 64) in FP32 and labels (B,) in int64."""
    pixels, labels = batch
    return F.cross_entropy(model(pixels).float(), labels)


def small_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`classification_loss` times `SHRINK`, a power of two, so that nothing is rounded in FP32."""
    return classification_loss(model, batch) * SHRINK


MODELS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"mlp": mlp, "convnet": convnet, "sgd": he_mlp, "small-gradients": he_mlp}
)
_ADAMW = {"optimizer": "adamw", "steps": 1000, "learning_rate": 1e-2, "warmup_steps": 50, "weight_decay": 0.01}
# updates so small beside their weights that 16-bit weights without masters lose most of them
_SGD = {
    "optimizer": "sgd",
    "steps": 12_000,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "final_lr_fraction": 1.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "clip_norm": None,
}
SETTINGS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "mlp": MappingProxyType(_ADAMW),
        "convnet": MappingProxyType({**_ADAMW, "steps": 300}),
        "sgd": MappingProxyType(_SGD),
        "small-gradients": MappingProxyType({**_SGD, "learning_rate": 2e-3 / SHRINK}),
    }
)


def digits(variant: str = "mlp") -> Task:
    """Build the task with a fresh model.

    Args:
        variant: `"mlp"`, 64-64-10 with AdamW; `"convnet"`; `"sgd"`, 64-64-10 with plain SGD at a small, constant
            learning rate; or `"small-gradients"`, that with its loss times `SHRINK` and its learning rate divided by
            it. Both are powers of two, so FP32 takes the very same updates, but for gradients that were below 2^-104
            to begin with. Its figures are of the loss as it was.

    Raises:
        TaskError: if there is no such variant, or scikit-learn is not installed.

    >>> task = digits("convnet")
    >>> pixels, labels = next(iter(task.batches(torch.Generator())))
    >>> pixels.shape, labels.dtype
    (torch.Size([32, 64]), torch.int64)
    """
    if variant not in MODELS:
        raise TaskError(f"digits has no variant {variant!r}; {nearest_names(variant, MODELS)}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss
        from sklearn.model_selection import train_test_split
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise TaskError('task "digits" needs scikit-learn; run pip install "duotone[digits]"') from error
    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.float32) / 16
    split = train_test_split(pixels, labels, test_size=0.3, stratify=labels, random_state=0)
    train_pixels, held_out_pixels, train_labels, held_out_labels = (torch.tensor(part) for part in split)
    # its many tiny matrix products take milliseconds on one thread, and seconds on several that others use too
    with threadpool_limits(1):
        logistic = LogisticRegression().fit(train_pixels, train_labels)

    def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(train_pixels), generator=generator)
        # the last, smaller batch is left out: every batch of every epoch has one shape
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield train_pixels[chosen], train_labels[chosen]

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        device = next(model.parameters()).device
        with evaluating(model):
            logits = model(held_out_pixels.to(device)).float().cpu()
        return {
            "nll": F.cross_entropy(logits, held_out_labels).item(),
            "accuracy": (logits.argmax(1) == held_out_labels).float().mean().item(),
        }

    return Task(
        name=f"digits:{variant}",
        model=MODELS[variant](),
        loss=small_loss if variant == "small-gradients" else classification_loss,
        batches=batches,
        evaluate=evaluate,
        quality="nll",
        settings=SETTINGS[variant],
        baselines={
            "one in ten": math.log(10),
            "logistic regression": float(log_loss(held_out_labels, logistic.predict_proba(held_out_pixels))),
        },
        facts={"images": f"{len(train_labels)} to train on, {len(held_out_labels)} held out"},
    )
