"""Casting a model: every weight keeps its bits, what must not change does not, and what cannot be is refused whole."""

import copy

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, PolicyError
from duotone.torch.casting.cast_forward import CastForward, cast_forward_of
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_of


class Mixed(nn.Module):
    """Parameters of every kind: tied, frozen, of a norm with statistics, FP64, complex, integer; and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.wide = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.turning = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("table", torch.randn(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.blocks(self.norm(self.embed(tokens)))))


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def snapshot(model: nn.Module) -> list[object]:
    """Return everything that a cast may change, so that two of them compare equal only if nothing did."""
    params = list(model.named_parameters(remove_duplicate=False))
    dtypes = [(name, p.dtype, p.grad_dtype, storage_of(p).rounding, id(storage_of(p).tail)) for name, p in params]
    forwards = [id(cast_forward_of(module)) for module in model.modules()]
    bits = [(name, value.cpu().numpy().tobytes()) for name, value in dt.master_weights(model).items()]
    return [dtypes, forwards, bits]


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_the_masters_are_the_weights_that_were_there(model, policy, same_bits):
    before = values(model)
    dt.cast(model, policy)
    for name, master in dt.master_weights(model).items():
        param, was = model.get_parameter(name), before[name]
        if not param.requires_grad or param.dtype == torch.float64:
            continue
        # FP16 keeps zeros and whatever is at least 2^-16 exactly, and nothing here is smaller
        assert same_bits(master, was), name
        assert torch.equal(param, was.to(param.dtype)), name


@pytest.mark.parametrize(("policy", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_who_is_cast_and_who_has_a_tail(model, policy, dtype):
    names, parameters, before = list(model.state_dict()), list(model.parameters()), values(model)
    dt.cast(model, policy)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.embed.weight
    for param in (model.embed.weight, *model.blocks.parameters()):
        assert (param.dtype, param.grad_dtype) == (dtype, dtype)
        assert storage_of(param).tail.dtype == torch.int16
    for param in model.frozen.parameters():
        assert param.dtype == dtype
        assert storage_of(param).tail is None
    untouched = ("wide", "turning", "counts", "table", "norm")
    for name, value in model.state_dict().items():
        if name.startswith(untouched):
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-mixed", "bf16-true,rounding=stochastic"])
def test_casting_twice_is_casting_once(model, policy):
    dt.cast(model, policy)
    with torch.no_grad():
        expected = model(torch.arange(7))
    before = snapshot(model)
    dt.cast(model, dt.policy_of(model))
    # the forwards are made anew, and not one in front of the other
    assert snapshot(model)[::2] == before[::2]
    forwards = [cast_forward_of(module) for module in model.modules()]
    assert not any(forward and isinstance(forward.__wrapped__, CastForward) for forward in forwards)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(7)), expected)


@pytest.mark.parametrize("way", [["fp32"], ["fp16", "fp32"], ["fp16", "bf16", "fp32"], ["bf16,grad=float32", "fp32"]])
def test_going_on_to_another_policy_starts_from_the_masters(way):
    # weights of at least 2^-16, which FP16 keeps exactly
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64).sign() * (torch.rand(64, 64) + 2.0**-16))
        model.bias.fill_(1 / 3)
    before = values(model)
    for policy in ["bf16", *way]:
        dt.cast(model, policy)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in before)
    assert all(storage_of(param).tail is None for param in model.parameters())


def test_a_policy_without_masters_gives_the_tails_up():
    model = dt.cast(nn.Linear(8, 8), "bf16")
    weight = model.weight.detach().clone()
    dt.cast(model, "bf16-true,rounding=stochastic")
    assert storage_of(model.weight).tail is None
    assert storage_of(model.weight).rounding == "stochastic"
    assert torch.equal(model.weight, weight)
    dt.cast(model, "bf16")
    assert storage_of(model.weight).rounding is None
    assert torch.equal(read_master(model.weight), weight.float())


def test_a_gradient_that_is_there_stays():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    dt.cast(model, "bf16,grad=float32")
    assert model.weight.grad.dtype == torch.float32
    dt.cast(model, "bf16")
    assert model.weight.grad.dtype == model.weight.grad_dtype == torch.bfloat16
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


def test_what_is_unfrozen_later_gets_its_tail():
    model = nn.Linear(2, 1).requires_grad_(False)
    dt.cast(model, "bf16").requires_grad_(True)
    dt.cast(model, "bf16")
    assert storage_of(model.weight).tail is not None


def test_rules_by_path(model):
    dt.cast(model, "bf16; blocks.1: param=float32,compute=float32; head: grad=float32; embed: grad=float32")
    assert model.blocks[0].weight.dtype == torch.bfloat16
    assert model.blocks[1].weight.dtype == torch.float32
    assert storage_of(model.blocks[1].weight).tail is None
    assert model.embed.weight.grad_dtype == torch.float32
    assert dt.policy_of(model.blocks[1]).name == "fp32"


def refusals():
    too_large = 'parameter "blocks.0.weight" holds 70000, beyond FP16\'s largest 65504; use policy "bf16", or keep'
    return [
        ("fp16", too_large),
        ("bf16; absent: compute=float32", r'rule "absent: .*" holds for no module of this Mixed, whose modules are em'),
        (
            "bf16; head: param=float32,compute=float32",
            '"embed.weight" and "head.weight" are one tied parameter, but it would be kept in',
        ),
        ("bf16,compute=float8_e4m3fn", "compute=float8_e4m3fn is not available in torch yet"),
        ("half-ish", "half-ish"),
    ]


@pytest.mark.parametrize(("policy", "message"), refusals())
@pytest.mark.parametrize("first", [None, "bf16"])
def test_what_cannot_be_is_refused_and_nothing_changes(model, policy, message, first):
    with torch.no_grad():
        model.blocks[0].weight[1, 2] = 70000.0
    if first:
        dt.cast(model, first)
    before = snapshot(model)
    with pytest.raises(PolicyError, match=message):
        dt.cast(model, policy)
    assert snapshot(model) == before
    assert (dt.policy_of(model) is None) == (first is None)


def test_infinite_and_nan_weights_are_not_too_large():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("inf"), float("nan")]]))
    dt.cast(model, "fp16")
    assert model.weight[0, 0].item() == float("inf")
    assert model.weight[0, 1].isnan()


def test_a_rule_may_keep_what_is_too_large(model):
    with torch.no_grad():
        model.blocks[0].weight[1, 2] = 70000.0
    dt.cast(model, "fp16; blocks.0: param=float32,compute=float32")
    assert model.blocks[0].weight[1, 2].item() == 70000.0
    assert model(torch.arange(7)).dtype == torch.float32


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "InstanceNorm": lambda: nn.InstanceNorm1d(4, affine=True),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_keep_float32_parameters(kind):
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), NORMS[kind]()), "bf16")
    linear, norm = model
    assert {param.dtype for param in linear.parameters()} == {torch.bfloat16}
    assert {(param.dtype, param.grad_dtype, storage_of(param).tail) for param in norm.parameters()} == {
        (torch.float32, torch.float32, None)
    }


@pytest.mark.parametrize("pattern", ["1", "type=LayerNorm"])
def test_a_rule_for_a_norm_itself_goes_before_that(pattern):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    dt.cast(model, f"bf16; {pattern}: param=bfloat16")
    assert model[1].weight.dtype == torch.bfloat16
    assert storage_of(model[1].weight).tail is not None
    # one for what is around it does not
    dt.cast(nn.Sequential(model), "bf16; 0: param=bfloat16")
    assert model[1].weight.dtype == torch.float32


def test_rules_by_type(model):
    dt.cast(model, "bf16; type=Linear: grad=float32; type=Sequential: output=float32; type=Embedding: grad=float32")
    assert model.embed.weight.grad_dtype == torch.float32
    assert model.blocks[0].weight.grad_dtype == torch.float32
    assert dt.policy_of(model.blocks).output == "float32"
    # base classes count, and everything inside
    model = dt.cast(nn.Sequential(nn.LSTM(2, 2), nn.Linear(2, 2)), "bf16; type=RNNBase: param=float32,compute=float32")
    assert model[0].weight_ih_l0.dtype == torch.float32
    assert model[1].weight.dtype == torch.bfloat16
    with pytest.raises(
        PolicyError, match=r'"type=GRU: .*" holds for no module .*, whose classes are Seq.*, LSTM, Linear;'
    ):
        dt.cast(model, "bf16; type=GRU: compute=float32,param=float32")


@pytest.mark.parametrize(
    "policy", ["fp32", "bf16", "fp16", "bf16-mixed", "bf16; head: grad=float32; embed: grad=float32"]
)
def test_uncast_gives_everything_back(model, policy):
    tokens, before = torch.arange(7), values(model)
    expected = model(tokens)
    dt.cast(model, policy)
    model(tokens).sum().backward()
    assert dt.uncast(model) is model
    for name, param in model.named_parameters():
        assert param.dtype == before[name].dtype, name
        if param.requires_grad or param.dtype != torch.float32:
            assert torch.equal(param, before[name]), name
        assert storage_of(param).tail is None
        assert param.grad is None or param.grad.dtype == param.dtype
    assert all("forward" not in vars(module) for module in model.modules())
    assert dt.policy_of(model) is None
    if policy in ("fp32", "bf16-mixed"):
        assert torch.equal(model(tokens), expected)


def test_uncast_leaves_what_was_not_cast_alone():
    model = nn.Linear(2, 1).bfloat16()
    assert dt.uncast(model).weight.dtype == torch.bfloat16


def test_recurrent_weights_are_still_the_modules_parameters():
    model = dt.cast(nn.LSTM(2, 3), "bf16")
    assert all(any(flat is param for param in model.parameters()) for flat in model._flat_weights)
    dt.uncast(model)
    assert {flat.dtype for flat in model._flat_weights} == {torch.float32}


def test_the_policy_of_a_model(model):
    assert dt.policy_of(model) is None
    dt.cast(model, "bf16")
    assert dt.policy_of(model) == dt.Policy.parse("bf16")
    assert dt.policy_of(copy.deepcopy(model)) == dt.Policy.parse("bf16")
    assert dt.policy_of(nn.Sequential(model)) == dt.Policy.parse("bf16")
    # one cast part of several is not the whole
    assert dt.policy_of(nn.Sequential(model, nn.ReLU())) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.ones(1), "got a Tensor to cast; give a torch.nn.Module"),
        ("bf16", "got a str to cast; give a torch.nn.Module, before anything else"),
        (nn.Linear, "got the class Linear to cast; give an instance of it"),
    ],
)
def test_what_is_no_module_is_named(model, message):
    with pytest.raises(PolicyError, match=message):
        dt.cast(model, "bf16")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_a_trace_of_a_cast_model_can_be_saved(policy, tmp_path):
    model = dt.cast(nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.LogSoftmax(-1)), policy)
    tokens, others = torch.tensor([[1, 1, 3]]), torch.tensor([[0, 4, 4]])
    torch.jit.save(torch.jit.trace(model, (tokens,)), tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    assert torch.equal(loaded(others), model(others))
    # tracing leaves gradients as they were
    model(others).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_a_cast_model_is_not_scripted():
    model = dt.cast(nn.Sequential(nn.Linear(2, 2)), "bf16")
    with pytest.raises(PolicyError, match=r"a cast Sequential cannot be given to torch\.jit\.script"):
        torch.jit.script(model)
    assert not hasattr(model.forward, "__globals__")
    assert torch.jit.script(dt.uncast(model))(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(PolicyError, match='module "1" of this Sequential is TorchScript'):
        dt.cast(model, "bf16")
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("Linear: grad=float32", "but Linear is a class there; write type=Linear"),
        ("type=nn.Linear: grad=float32", "but Linear is a class there; write type=Linear"),
        ("type=Liner: grad=float32", "whose classes include Linear; correct its pattern"),
        ("block.1: grad=float32", r"whose modules include blocks\.1 and blocks\.0 and blocks; correct its pattern"),
    ],
)
def test_a_rule_that_nearly_holds_is_told_what_there_is(model, rule, message):
    with pytest.raises(PolicyError, match=message):
        dt.cast(model, f"bf16; {rule}")


def test_a_model_in_float64_is_told_that_nothing_was_cast():
    with pytest.warns(DuotoneWarning, match="no parameter of this Linear was cast, for they are FP64"):
        dt.cast(nn.Linear(2, 2).double(), "bf16")


def test_what_is_frozen_after_the_cast_keeps_its_master():
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    dt.cast(model, "bf16").requires_grad_(False)
    dt.cast(model, "bf16").requires_grad_(True)
    assert torch.equal(dt.master_weights(dt.cast(model, "bf16"))["weight"], before)


def test_the_cost_of_a_cast_grows_slowly(calls_in):
    def cast(layers: int) -> int:
        model = nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(layers)))
        return calls_in(lambda: dt.cast(model, "bf16"))

    cast(1)
    # 10 modules, 12 parameters, 8 of them with a tail: 3,200 with torch 2.13; 7,500 when each module had its own policy
    assert cast(3) - cast(2) < 3600
