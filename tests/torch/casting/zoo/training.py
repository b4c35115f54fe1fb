"""Trains one family under one policy, as README says, and keeps what its tests ask about.

Products are seen by a dispatch mode: below every rule, inside torch's composite functions, and in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import duotone.torch as dt

from .family import Batch, Family

PRODUCTS = frozenset(
    {
        "addbmm",
        "addmm",
        "baddbmm",
        "bmm",
        "convolution",
        "convolution_backward",
        "linear",
        "matmul",
        "mkldnn_rnn_layer",
        "mkldnn_rnn_layer_backward",
        "mm",
        "_native_multi_head_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_transformer_encoder_layer_fwd",
    }
)
LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)


class Operand(NamedTuple):
    """What a product multiplied: the product's name in aten, the dtype, and whether FP16 holds every value."""

    product: str
    dtype: torch.dtype
    is_in_float16: bool


class SeeProducts(TorchDispatchMode):
    """Notes what products multiply: among the first four arguments, what has two dimensions.

    Biases have one; an attention's logarithms of sums, which are FP32, come later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Operand] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            for matrix in tensors_in(args[:4]):
                if matrix.is_floating_point() and matrix.dim() >= 2:
                    # torch's encoder nests tensors of several lengths, which nothing compares
                    fits = not matrix.is_nested and torch.equal(matrix.half().to(matrix.dtype), matrix)
                    self.seen.add(Operand(name, matrix.dtype, fits))
        return func(*args, **(kwargs or {}))


class SeeBorder:
    """Notes what a model is given, and what reaches its forward."""

    def __init__(self, model: nn.Module) -> None:
        self.given: list[Tensor] = []
        self.got: list[Tensor] = []
        forward = model.forward

        def note_and_go_on(*args: Any, **kwargs: Any) -> Any:
            self.got = tensors_in((args, kwargs))
            return forward(*args, **kwargs)

        model.forward = note_and_go_on
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.given = tensors_in((args, kwargs))


@dataclass(frozen=True)
class Run:
    """What came of training.

    Attributes:
        models: the models, cast to "fp32" in the end.
        start: the score of a fixed batch before training.
        final: the same after it.
        losses: of all steps.
        skipped: steps skipped.
        products: what products multiplied in the last step and the last score.
        outputs: dtypes that layers returned in the last step, by name.
        borders: what a model was given and what its forward got, tensor by tensor.
        gradients: of the last step, by name.
        weights: after training, by name.
        masters: of the same.
        recast: the weights once they are cast to "fp32".
    """

    models: tuple[nn.Module, ...]
    start: float
    final: float
    losses: list[float]
    skipped: int
    products: set[Operand]
    outputs: dict[str, set[torch.dtype]]
    borders: list[tuple[Tensor, Tensor]]
    gradients: dict[str, Tensor | None]
    weights: dict[str, Tensor]
    masters: dict[str, Tensor]
    recast: dict[str, Tensor]


def train(family: Family, policy: str) -> Run:
    """Build, cast and train a family, the same way each time."""
    torch.manual_seed(0)
    models = family.build()
    borders = [SeeBorder(model) for model in models]
    models = tuple(dt.cast(model, policy) for model in models)
    optimizers = [family.optimizer(model.parameters(), lr=family.learning_rate, **family.settings) for model in models]
    scaler, drawing = dt.LossScaler(policy), Generator().manual_seed(0)
    fixed, score = family.batch(Generator().manual_seed(1)), family.score or family.losses[0]
    start, losses = evaluate(score, models, fixed), []
    for _ in range(family.steps - 1):
        losses += take_step(family, models, optimizers, scaler, family.batch(drawing))[0]
    batch = family.batch(drawing)
    with SeeProducts() as products, outputs_of(models) as outputs:
        last, gradients = take_step(family, models, optimizers, scaler, batch)
    with products:
        final = evaluate(score, models, fixed)
    weights = named(models)
    masters = {}
    for place, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        masters |= {f"{place}.{name}": value for name, value in dt.master_weights(model, optimizer).items()}
    for model in models:
        dt.cast(model, "fp32")
    pairs = [pair for border in borders for pair in zip(border.given, border.got, strict=True)]
    skipped = int(scaler.skipped)
    return Run(
        models,
        start,
        final,
        losses + last,
        skipped,
        products.seen,
        outputs,
        pairs,
        gradients,
        weights,
        masters,
        named(models),
    )


def take_step(
    family: Family,
    models: tuple[nn.Module, ...],
    optimizers: list[torch.optim.Optimizer],
    scaler: dt.LossScaler,
    batch: Batch,
) -> tuple[list[float], dict[str, Tensor | None]]:
    """Update each model by its loss; return the losses and the models' gradients by name."""
    losses, gradients = [], {}
    for place, (model, loss_of, optimizer) in enumerate(zip(models, family.losses, optimizers, strict=True)):
        loss = loss_of(*models, batch)
        scaler.backward(loss)
        for name, param in model.named_parameters():
            gradients[f"{place}.{name}"] = None if param.grad is None else param.grad.clone()
        scaler.step(optimizer, clip_norm=1.0)
        for other in optimizers:
            other.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def evaluate(score: Callable[..., Tensor], models: tuple[nn.Module, ...], batch: Batch) -> float:
    """Return the score of a batch, without dropout or gradients."""
    for model in models:
        model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        value = score(*models, batch).item()
    for model in models:
        model.train()
    return value


@contextmanager
def outputs_of(models: tuple[nn.Module, ...]) -> Iterator[dict[str, set[torch.dtype]]]:
    """Collect the dtypes that layers return."""
    seen: dict[str, set[torch.dtype]] = {}
    handles = []
    for place, model in enumerate(models):
        for path, module in model.named_modules():
            if isinstance(module, LAYERS):

                def note(_: nn.Module, __: Any, output: Any, name: str = f"{place}.{path}") -> None:
                    seen.setdefault(name, set()).update(t.dtype for t in tensors_in(output) if t.is_floating_point())

                handles.append(module.register_forward_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a nested structure, packed sequences included."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def named(models: tuple[nn.Module, ...]) -> dict[str, Tensor]:
    """Return copies of all parameters by name, tied ones under each of theirs."""
    return {
        f"{place}.{name}": param.detach().clone()
        for place, model in enumerate(models)
        for name, param in model.named_parameters(remove_duplicate=False)
    }
