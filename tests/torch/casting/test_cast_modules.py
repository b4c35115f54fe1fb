"""Torch's own modules under every policy: they run, give FP32 at the border, and every weight gets its gradient."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

import duotone.torch as dt
from duotone.errors import PolicyError

POLICIES = ["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "bf16,grad=float32"]

torch.manual_seed(0)
X = torch.randn(4, 7, 16)
IMAGES = torch.randn(2, 3, 8, 8)
TOKENS = torch.randint(1, 10, (4, 7))
CAUSAL = torch.full((7, 7), float("-inf")).triu(1)

# a builder, and the inputs
MODULES = {
    "lazy linear": (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)), (X,)),
    "lazy convolution": (lambda: nn.Sequential(nn.LazyConv1d(8, 3), nn.LazyBatchNorm1d()), (X,)),
    "LSTM": (lambda: nn.LSTM(16, 8, 2, bidirectional=True, batch_first=True), (X,)),
    "LSTM with projection": (lambda: nn.LSTM(16, 8, proj_size=4), (X,)),
    "LSTM with a state": (lambda: nn.LSTM(16, 8), (X, (torch.zeros(1, 7, 8), torch.ones(1, 7, 8)))),
    "LSTM, packed": (lambda: nn.LSTM(16, 8), (rnn.pack_padded_sequence(X.transpose(0, 1), [7, 5, 3, 2]),)),
    "GRU": (lambda: nn.GRU(16, 8, 2), (X,)),
    "RNN": (lambda: nn.RNN(16, 8), (X,)),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), (X[0],)),
    "GRUCell": (lambda: nn.GRUCell(16, 8), (X[0],)),
    "attention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), (X, X, X)),
    "masked attention": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (X, X, X, torch.zeros(4, 7, dtype=torch.bool), True, CAUSAL),
    ),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2), (X,)),
    "transformer": (lambda: nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True), (X, X)),
    "embedding with padding": (lambda: nn.Embedding(10, 16, padding_idx=0), (TOKENS,)),
    "bag": (lambda: nn.EmbeddingBag(10, 16, mode="mean"), (TOKENS,)),
    "weighted bag": (lambda: nn.EmbeddingBag(10, 16, mode="sum"), (TOKENS, None, torch.rand(4, 7))),
    "BatchNorm": (lambda: nn.BatchNorm1d(7), (X,)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(7, affine=True, track_running_stats=True), (X,)),
    "LayerNorm": (lambda: nn.LayerNorm(16), (X,)),
    "RMSNorm": (lambda: nn.RMSNorm(16), (X,)),
    "GroupNorm": (lambda: nn.GroupNorm(7, 7), (X,)),
    "LocalResponseNorm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3)), (IMAGES,)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(), nn.ConvTranspose2d(8, 3, 3)),
        (IMAGES,),
    ),
    "bilinear": (lambda: nn.Bilinear(16, 16, 4), (X, X)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 8)), (X,)),
    "weight norm, by hooks": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 8))), (X,)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 8)), (X,)),
    "spectral norm, by hooks": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 8))), (X,)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(16, 8)), (X,)),
}


def first(result: object) -> Tensor:
    """Return the first tensor of a result."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def make(name: str, policy: str) -> nn.Module:
    torch.manual_seed(1)
    return dt.cast(MODULES[name][0](), policy)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODULES)
def test_it_runs_and_every_weight_gets_its_gradient(name, policy):
    model, inputs = make(name, policy), MODULES[name][1]
    result = first(model(*inputs))
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    for path, param in model.named_parameters():
        assert param.grad is not None, path
        assert param.grad.dtype == param.grad_dtype, path
        assert param.grad.isfinite().all(), path
    model.eval()
    with torch.no_grad():
        assert torch.equal(first(model(*inputs)), first(copy.deepcopy(model)(*inputs)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(("policy", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("name", MODULES)
def test_it_gives_what_float32_gives_but_for_rounding(name, policy, dtype):
    inputs = MODULES[name][1]
    exact, rough = make(name, "fp32").eval(), make(name, policy).eval()
    results = []
    for model in (exact, rough):
        # lazy weights are drawn in the first call
        torch.manual_seed(2)
        with torch.no_grad():
            results.append(first(model(*inputs)))
    want, got = results
    # some tens of roundings of the format, relative to the largest value
    assert (got - want).abs().max() <= 20 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-true,rounding=stochastic"])
def test_a_lazy_module_is_cast_when_it_has_a_shape(policy):
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()), policy)
    model(torch.ones(2, 5))
    linear, norm = model
    assert linear.weight.shape == (3, 5)
    assert linear.weight.dtype == dt.cast(nn.Linear(1, 1), policy).weight.dtype
    assert norm.weight.dtype == torch.float32
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    plain(torch.ones(2, 5))
    if policy in ("bf16", "fp16"):
        masters = dt.master_weights(model)
        assert torch.allclose(masters["0.weight"], plain[0].weight, rtol=0, atol=2.0**-40)
    # and what is an ordinary module now is cast again as one
    assert dt.cast(model, "fp32")[0].weight.dtype == torch.float32


def test_a_lazy_weight_too_large_for_float16_is_named():
    class Huge(nn.LazyLinear):
        def reset_parameters(self) -> None:
            if not self.has_uninitialized_params():
                nn.init.constant_(self.weight, 70000.0)

    model = dt.cast(nn.Sequential(Huge(2, bias=False)), "fp16")
    with pytest.raises(PolicyError, match=r'"0\.weight" holds 70000'):
        model(torch.ones(1, 2))
