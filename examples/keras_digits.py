"""An MLP and a ConvNet that read handwritten digits, and a GPT that learns Python's standard library, in Keras.

    KERAS_BACKEND=jax python examples/keras_digits.py --model mlp convnet --policy fp32 bf16 fp16

A policy is "fp32", "bf16" or "fp16", 16-bit weights with FP32 masters, "bf16-mixed" or "fp16-mixed", FP32 weights, or
any other policy's text. What Duotone does are the three lines with `dk.` in `train`: the same for every policy, model
and backend. Needs `pip install "duotone[keras,digits]"` and the backend that Keras is to have.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import duotone.keras as dk
from duotone.corpus import standard_library

POLICIES = ("fp32", "bf16", "bf16-mixed", "fp16", "fp16-mixed")


@dataclass(frozen=True)
class Task:
    """A model and what it learns.

    Attributes:
        build: makes the model, under whichever policy holds then.
        inputs, targets: to train on, by row; `held_out` are those to judge by.
        unit: of the loss on held-out rows, and how many nats it is.
    """

    build: Callable[[], Any]
    inputs: np.ndarray
    targets: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]
    unit: tuple[str, float] = ("nats", 1.0)
    learning_rate: float = 3e-3


class Batches(keras.utils.PyDataset):
    """So many batches of random rows, the same ones for every policy."""

    def __init__(self, task: Task, steps: int, seed: int, size: int = 32) -> None:
        super().__init__()
        self.task, self.rows = task, np.random.default_rng(seed).integers(len(task.inputs), size=(steps, size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.task.inputs[self.rows[index]], self.task.targets[self.rows[index]]


def mlp() -> Any:
    """Return a network of two hidden layers."""
    dense = [layers.Dense(64, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), *dense, layers.Dense(10)])


def convnet() -> Any:
    """Return a network of two convolutions with batch normalization."""
    blocks = []
    for width in (16, 32):
        blocks += [layers.Conv2D(width, 3, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
    head = [layers.MaxPooling2D(), layers.Flatten(), layers.Dense(10)]
    return keras.Sequential([keras.Input((8, 8, 1)), *blocks, *head])


class Positions(layers.Layer):
    """Adds a vector of its own to each position."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.vectors = self.add_weight(shape=input_shape[1:], initializer="random_normal", name="vectors")

    def call(self, x: Any) -> Any:
        return x + self.vectors


def gpt(context: int = 32, width: int = 64, blocks: int = 2) -> Any:
    """Return a decoder over bytes."""
    tokens = keras.Input((context,), dtype="int32")
    x = Positions()(layers.Embedding(256, width)(tokens))
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        # without dropout Keras calls JAX's attention, which takes no FP16 on CPUs
        x = x + layers.MultiHeadAttention(4, width // 4, dropout=0.1)(normal, normal, use_causal_mask=True)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x)))
    return keras.Model(tokens, layers.Dense(256)(layers.LayerNormalization()(x)))


def digits(build: Callable[[], Any]) -> Task:
    """Return the task of scikit-learn's digits; the last fifth of them is held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).reshape(-1, 8, 8, 1).astype("float32")
    begin = len(images) * 4 // 5
    return Task(build, images[:begin], labels[:begin], (images[begin:], labels[begin:]))


def text(windows: int = 20_000, context: int = 32) -> Task:
    """Return the task of the next byte in windows of the standard library's source."""
    corpus = standard_library()

    def pieces(source: np.ndarray, count: int) -> np.ndarray:
        starts = np.linspace(0, len(source) - context - 1, count).astype(int)
        return source[starts[:, None] + np.arange(context + 1)].astype("int32")

    train, held_out = pieces(corpus.train, windows), pieces(corpus.held_out, 512)
    rest = (held_out[:, :-1], held_out[:, 1:])
    return Task(gpt, train[:, :-1], train[:, 1:], rest, ("bits per byte", math.log(2)))


TASKS = {"mlp": lambda: digits(mlp), "convnet": lambda: digits(convnet), "gpt": text}


def train(task: Task, policy: str, steps: int, seed: int) -> tuple[Any, float]:
    """Return the trained model and its loss on held-out rows, in the task's unit."""
    keras.utils.set_random_seed(seed)
    start = task.build().get_weights()  # the same for every policy
    with dk.policy(policy):  # 16-bit layers, FP32 where it matters
        model = task.build()
    model.set_weights(start)
    rate: Any = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=task.learning_rate, warmup_steps=steps // 10
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0)
    # FP32 masters of 16-bit weights, and a loss scale where the policy has one
    optimizer = dk.LossScaleOptimizer(dk.Masters(optimizer), policy)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(Batches(task, steps, seed), verbose=0, shuffle=False, callbacks=[dk.ScaleReport()])
    return model, model.evaluate(*task.held_out, verbose=0) / task.unit[1]


def main() -> None:
    """Train every model that is asked for under every policy, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--policy", nargs="+", default=POLICIES, help="fp32, bf16, fp16, bf16-mixed, or any other")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    print(f"| Keras {keras.__version__} on {keras.backend.backend()} | policy | held-out loss | skipped | seconds |")
    print("|---|---|---|---|---|")
    for name in arguments.model:
        task = TASKS[name]()
        for policy in arguments.policy:
            begun = time.perf_counter()
            runs = [train(task, policy, arguments.steps, seed) for seed in arguments.seed]
            losses = ", ".join(f"{loss:.4f}" for _, loss in runs)
            skipped = ", ".join(f"{model.optimizer.report().skipped}" for model, _ in runs)
            took = time.perf_counter() - begun
            print(f"| {name} | `{policy}` | {losses} {task.unit[0]} | {skipped} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
