"""FP32 inputs of a cast model keep their bits until a product takes them, and whatever is beside them takes them so."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt

POLICIES = ("bf16", "fp16")


class Denoiser(nn.Module):
    """Embeds a time step as diffusion models do, and takes targets as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)

    def forward(self, x: Tensor, step: Tensor, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        self.seen = step, targets[0]["boxes"]
        frequencies = torch.arange(1.0, 9.0)
        return self.embed(torch.sin(step[:, None] / frequencies)), F.l1_loss(x, targets[0]["boxes"])


@pytest.mark.parametrize("policy", POLICIES)
def test_time_steps_and_targets_keep_their_bits(policy):
    torch.manual_seed(0)
    model = dt.cast(Denoiser(), policy)
    boxes, target = torch.rand(3, 4) * 800, torch.rand(3, 4) * 800
    times = [torch.tensor([time]) for time in (713.0, 714.0)]
    results = [model(boxes, time, [{"boxes": target}]) for time in times]
    assert model.seen[0] is times[1]
    assert model.seen[1] is target
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], F.l1_loss(boxes, target))


def test_values_beyond_float16_reach_the_first_norm():
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)), "fp16")
    assert model(torch.rand(4, 8) * 1e5).isfinite().all()


class Weights(nn.Module):
    """Calls a function with its 16-bit weights."""

    def __init__(self, call, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList([torch.rand(shape) + 0.5 for shape in shapes])

    def forward(self, *args: Tensor) -> Tensor:
        return self.call(*args, *self.weights)


class Layer(nn.Module):
    """Calls a function with a layer."""

    def __init__(self, call, layer: nn.Module) -> None:
        super().__init__()
        self.call, self.layer = call, layer

    def forward(self, *args: Tensor) -> Tensor:
        return self.call(self.layer, *args)


X, STATE = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4, 16)
BESIDE_WEIGHTS = {
    "layer_norm": lambda: (Weights(lambda x, w, b: F.layer_norm(x, (16,), w, b), (16,), (16,)), X),
    "rms_norm": lambda: (Weights(lambda x, w: F.rms_norm(x, (16,), w), (16,)), X),
    "group_norm": lambda: (Weights(lambda x, w, b: F.group_norm(x, 2, w, b), (8,), (8,)), X),
    "native_layer_norm": lambda: (
        Weights(lambda x, w, b: torch.native_layer_norm(x, [16], w, b, 1e-5)[0], (16,), (16,)),
        X,
    ),
    "addmm": lambda: (Weights(lambda x, w, b: torch.addmm(b, x[0], w), (16, 4), (4,)), X),
    "where": lambda: (Weights(lambda x, w: torch.where(x > 0, x, w), (16,)), X),
    "in place": lambda: (Weights(lambda x, w: F.linear(x, w).add_(x), (16, 16)), X),
    "index_put": lambda: (Weights(lambda x, w: x.index_put((torch.tensor([0]),), w), (1, 8, 16)), X),
    "embedding_bag": lambda: (
        Weights(lambda i, by, w: F.embedding_bag(i, w, mode="sum", per_sample_weights=by), (9, 4)),
        torch.arange(8).view(2, 4),
        torch.rand(2, 4),
    ),
    "lstm": lambda: (Layer(lambda lstm, x, h: lstm(x, (h, h))[0], nn.LSTM(16, 16, batch_first=True)), X, STATE),
    "lstm_cell": lambda: (Layer(lambda cell, x, h: cell(x[:, 0], (h[0], h[0]))[0], nn.LSTMCell(16, 16)), X, STATE),
    "gru": lambda: (Layer(lambda gru, x, h: gru(x, h)[0], nn.GRU(16, 16, batch_first=True)), X, STATE),
    "checkpoint": lambda: (Weights(lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False), (4, 16)), X),
    "grid_sample": lambda: (Weights(lambda x, w: F.grid_sample(w, x[:, None, :, :2] / 4), (4, 3, 8, 8)), X),
}


@pytest.mark.filterwarnings("ignore:Default grid_sample")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", BESIDE_WEIGHTS)
def test_float32_inputs_meet_16_bit_weights(name, policy):
    torch.manual_seed(0)
    model, *args = BESIDE_WEIGHTS[name]()
    exact = model(*args)
    rough = dt.cast(model, policy)(*args)
    rough.sum().backward()
    assert (rough - exact).norm() <= (2**-6 if policy == "bf16" else 2**-9) * exact.norm()


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_self_attention_of_float32_casts_once_and_takes_any_mask(policy):
    torch.manual_seed(0)
    model = dt.cast(SelfAttention(), policy)
    mask = torch.zeros(8, 8)
    # a row that sees nothing, as that of a padded token
    mask[1] = torch.finfo(torch.float32).min
    assert model(X, mask).isfinite().all()
    casts = [each for each in dt.explain(model, X, mask).casts if each.operation == "multi_head_attention_forward"]
    # the data, and the mask
    assert sum(each.calls for each in casts if each.from_dtype == "float32" and each.by == "duotone") <= 2
