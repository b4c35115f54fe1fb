"""Checkpointed modules run again in the backward pass, and find what they found before: the same bits."""

import copy
import inspect
import io
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import duotone.torch as dt
from duotone.errors import DuotoneWarning
from duotone.torch.casting import activation_checkpointing
from duotone.torch.casting.activation_checkpointing import (
    CheckpointedForward,
    checkpoint_activations,
    checkpointed_forward_of,
)
from duotone.torch.casting.cast_forward import CastForward
from duotone.torch.parameters.masters import read_master

SLOW = pytest.mark.slow
POLICIES = [None, "fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "bf16; blocks.1: param=fp32,compute=fp32"]
TOKENS = torch.arange(26).view(2, 13) % 13
WIDTH = 16


class Block(nn.Module):
    """A pre-norm transformer block that counts how often it runs."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.runs = 0

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the stream, `[batch, tokens, WIDTH]`."""
        if not torch.compiler.is_compiling():
            self.runs += 1
        query, key, value = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.dropout(self.mix(mixed.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.mlp(self.norms[1](x)).softmax(-1))


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, blocks: int = 2, dropout: float = 0.25) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, WIDTH)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, 13)

    def forward(self, tokens: Tensor, *, causal: bool = True) -> Tensor:
        """Return logits."""
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril() if causal else None
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(x)


def make(policy: str | None = None, **options) -> Model:
    torch.manual_seed(0)
    model = Model(**options)
    return model if policy is None else dt.cast(model, policy)


def gradients(model: nn.Module, around: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with around or nullcontext():
        logits = model(TOKENS)
    nn.functional.cross_entropy(logits.float().flatten(0, 1), TOKENS.flatten()).backward()
    found = {name.removeprefix("_orig_mod."): param.grad for name, param in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def runs(model: Model) -> list[int]:
    """Return how often each block ran since the last call, and start anew."""
    counts = [block.runs for block in model.blocks]
    for block in model.blocks:
        block.runs = 0
    return counts


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def checkpointed(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if checkpointed_forward_of(module) is not None]


# what it computes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", ["cast first", "checkpoint first"])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_the_same_bits(policy, order, offload):
    model = make(policy)
    expected = gradients(model)
    assert runs(model) == [1, 1]
    if order == "checkpoint first":
        model = checkpoint_activations(make(), "blocks.*", offload=offload)
        model = model if policy is None else dt.cast(model, policy)
    else:
        assert checkpoint_activations(model, "blocks.*", offload=offload) is model
    assert_same(gradients(model), expected)
    assert runs(model) == [2, 2]
    for block in model.blocks:
        assert isinstance(vars(block)["forward"], CheckpointedForward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_the_same_bits(dtype):
    model = make()
    expected = gradients(model, torch.autocast("cpu", dtype))
    assert_same(gradients(checkpoint_activations(model, "blocks.*"), torch.autocast("cpu", dtype)), expected)
    assert runs(model) == [3, 3]


def test_another_policy_and_none_keep_the_checkpoints():
    model = checkpoint_activations(make("bf16"), "blocks.*")
    dt.cast(model, "fp16; blocks.0: compute=fp32,param=fp32")
    assert checkpointed(model) == ["blocks.0", "blocks.1"]
    assert all(isinstance(block.forward.inner, CastForward) for block in model.blocks)
    got, counts = gradients(model), runs(model)
    assert counts == [2, 2]
    assert_same(got, gradients(checkpoint_activations(model)))
    assert runs(model) == [1, 1]
    # without checkpoints the cast forward stands in front again
    assert all(isinstance(vars(block)["forward"], CastForward) for block in model.blocks)


def test_names_and_modules_stay_as_they_were():
    model, plain = checkpoint_activations(make("bf16"), "*"), make("bf16")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [(p, type(m)) for p, m in model.named_modules()] == [(p, type(m)) for p, m in plain.named_modules()]
    forward = model.blocks[0].forward
    assert inspect.signature(forward) == inspect.signature(plain.blocks[0].forward)
    assert forward.__doc__ == Block.forward.__doc__
    assert not hasattr(forward, "policy")
    model.load_state_dict(plain.state_dict())


def test_a_part_in_the_backward_pass_sees_the_random_numbers_it_saw():
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(nn.functional.dropout(torch.ones(99), 0.5))
            return (x * seen[-1].to(x.dtype)).exp()

    seen: list[Tensor] = []
    model = nn.Sequential(nn.Linear(99, 99), nn.Sequential(Drops(), nn.Linear(99, 1)))
    dt.cast(model, "bf16; 1.0: param=fp32,compute=fp32")
    state = checkpoint_activations(model, "1")(torch.ones(1, 99)).sum()
    after = torch.get_rng_state()
    state.backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert torch.equal(torch.get_rng_state(), after)


class Odd(nn.Module):
    """Takes and returns structures, and writes to the list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, list[Tensor]], name: str, *, debug: dict[str, Any], out: list) -> Any:
        """Return several results."""
        first, (second, third) = pair
        assert second is third
        hidden = self.linear(first * debug["scale"]).exp() * second
        out.append(hidden.detach())
        return {"sum": hidden + third, name: (hidden * 2, 3, None)}, debug


def odd_loss(model: nn.Module, x: Tensor, y: Tensor, out: list) -> Tensor:
    debug = {"scale": y, "text": "kept"}
    (result, same), (again, _) = (model((x, [y, y]), "name", debug=debug, out=out) for _ in range(2))
    assert same is debug
    assert result["name"][1:] == (3, None)
    return (result["sum"] * again["name"][0]).sum()


@pytest.mark.parametrize("offload", [False, True])
def test_structures_go_in_and_out_and_a_module_may_be_called_twice(offload):
    torch.manual_seed(0)
    odd, x, y = Odd(), torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    inputs, plain, out = [x, y, *odd.parameters()], [], []
    expected = torch.autograd.grad(odd_loss(odd, x, y, plain), inputs)
    root = checkpoint_activations(nn.ModuleDict({"odd": odd}), "odd", offload=offload)
    got = torch.autograd.grad(odd_loss(root["odd"], x, y, out), inputs)
    assert all(map(torch.equal, got, expected))
    # the second run, in the backward pass, wrote to a list of its own
    assert len(out) == len(plain) == 2


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_module_runs_as_it_is(without, monkeypatch):
    model = checkpoint_activations(make("bf16").eval(), "blocks.*", offload=True)
    expected = model(TOKENS)
    monkeypatch.setattr(activation_checkpointing, "checkpoint", None)
    runs(model)
    with without():
        assert torch.equal(model(TOKENS), expected)
    assert runs(model) == [1, 1]


@pytest.mark.parametrize("offload", [False, True])
def test_parameters_behind_a_frozen_embedding_have_gradients(offload):
    model = make("bf16")
    model.embed.requires_grad_(False)
    expected = gradients(model)
    assert "blocks.0.qkv.weight" in expected
    assert_same(gradients(checkpoint_activations(model, "blocks.*", offload=offload)), expected)
    assert runs(model) == [3, 3]


@pytest.mark.parametrize("offload", [False, True])
def test_the_graph_may_be_used_twice_and_differentiated(offload):
    def derivatives(model: Model) -> list[Tensor]:
        torch.manual_seed(1)
        params = list(model.parameters())
        loss = model(TOKENS, causal=False).square().sum()
        once = torch.autograd.grad(loss, params, retain_graph=True)
        twice = torch.autograd.grad(loss, params, create_graph=True)
        penalty = sum(grad.square().sum() for grad in twice)
        return [*once, *twice, *torch.autograd.grad(penalty, params, materialize_grads=True)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model = make("bf16-mixed")
        expected = derivatives(model)
        got = derivatives(checkpoint_activations(model, "blocks.*", offload=offload))
    assert all(map(torch.equal, got, expected))


# what is around it, in the second run too


class Noting(TorchFunctionMode):
    """Notes what it sees."""

    def __init__(self, name: str, notes: list[str]) -> None:
        super().__init__()
        self.name, self.notes = name, notes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.sigmoid:
            self.notes.append(self.name)
        return func(*args, **(kwargs or {}))


class Sigmoid(nn.Module):
    """One that calls the very function."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sigmoid."""
        return torch.sigmoid(x)


@pytest.mark.parametrize("present", [False, True])
def test_function_modes_are_on_again_once_and_in_order(present):
    notes: list[str] = []
    outer, inner = Noting("outer", notes), Noting("inner", notes)
    model = checkpoint_activations(nn.Sequential(nn.Sequential(Sigmoid(), nn.Linear(1, 1))), "0")
    with outer, inner:
        result = model(torch.ones(1, requires_grad=True))
    if present:
        with outer:
            result.backward()
            assert _get_current_function_mode_stack() == [outer]
    else:
        result.backward()
        assert _get_current_function_mode_stack() == []
    assert notes == ["inner", "outer"] * 2


@pytest.mark.parametrize("run", [gradients, lambda model: compiled_gradients(model, "eager")])
def test_a_default_device_is_no_trouble(run):
    expected = gradients(make(dropout=0.0))
    torch.set_default_device("cpu")
    try:
        assert_same(run(checkpoint_activations(make(dropout=0.0), "blocks.*")), expected)
    finally:
        torch.set_default_device(None)
    assert _get_current_function_mode_stack() == []


def test_an_error_in_the_second_run_leaves_nothing_behind():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch._C._current_graph_task_id() != -1:
                raise ValueError("in the backward pass")
            return x.exp()

    model = checkpoint_activations(nn.Sequential(nn.Sequential(nn.BatchNorm1d(1), Fails())), "0")
    mean = model[0][0].running_mean
    with Noting("mode", []):
        result = model(torch.ones(2, 1, requires_grad=True)).sum()
    with pytest.raises(ValueError, match="in the backward pass"):
        result.backward()
    assert _get_current_function_mode_stack() == []
    assert model[0][0].running_mean is mean


@pytest.mark.parametrize("policy", [None, "bf16-mixed"])
def test_running_statistics_count_a_batch_once(policy):
    def train(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        for _ in range(3):
            model(torch.randn(8, 4)).square().sum().backward()
        return dict(model.named_buffers()) | {name: param.grad for name, param in model.named_parameters()}

    torch.manual_seed(0)
    norms = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.ReLU()))
    norms = norms if policy is None else dt.cast(norms, policy)
    plain, counted = copy.deepcopy(norms), checkpoint_activations(norms, "*")
    buffers = dict(counted.named_buffers())
    assert_same(train(counted), train(plain))
    assert counted[0][1].num_batches_tracked == 3
    assert all(buffer is buffers[name] for name, buffer in counted.named_buffers())


@pytest.mark.parametrize("policy", [None, "bf16"])
@pytest.mark.parametrize("kind", [nn.Parameter, Tensor.detach])
def test_functional_call_differentiates_what_it_was_given(policy, kind):
    def derivatives(model: Model) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        loss = torch.func.functional_call(model, given, (TOKENS,)).float().square().sum()
        return torch.autograd.grad(loss, list(given.values()))

    model = make(policy)
    given = {name: kind(torch.randn_like(p) / 4).requires_grad_() for name, p in model.named_parameters()}
    own = dict(model.named_parameters())
    expected = derivatives(model)
    got = derivatives(checkpoint_activations(model, "blocks.*"))
    assert all(map(torch.equal, got, expected))
    assert all(param is own[name] for name, param in model.named_parameters())
    assert runs(model) == [3, 3]


@pytest.mark.parametrize("policy", [None, "bf16", "fp16,grad=float32", "bf16-mixed"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_copy_is_whole_and_its_own(policy, way, offload):
    model = checkpoint_activations(make(policy), "blocks.*", offload=offload)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert checkpointed(other) == ["blocks.0", "blocks.1"]
    expected = gradients(model)
    runs(model)
    assert_same(gradients(other), expected)
    assert (runs(model), runs(other)) == ([0, 0], [2, 2])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(read_master(ours), read_master(theirs))
    # the choice can be taken back, in the copy alone
    checkpoint_activations(other)
    assert (checkpointed(other), checkpointed(model)) == ([], ["blocks.0", "blocks.1"])
    assert_same(gradients(other), expected)


def compiled_gradients(model: Model, backend: str) -> dict[str, Tensor]:
    torch.compiler.reset()
    return gradients(torch.compile(model, backend=backend, fullgraph=True))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=SLOW)])
@pytest.mark.parametrize("policy", ["fp16", *(pytest.param(name, marks=SLOW) for name in (None, "bf16", "bf16-mixed"))])
def test_compiling_breaks_no_graph(policy, backend):
    model = make(policy, dropout=0.0)
    expected = compiled_gradients(model, backend)
    assert_same(compiled_gradients(checkpoint_activations(model, "blocks.*"), backend), expected)


def test_compiled_code_says_that_it_does_not_offload():
    model = make("bf16", dropout=0.0)
    expected = compiled_gradients(model, "eager")
    checkpoint_activations(model, "blocks.*", offload=True)
    with pytest.warns(DuotoneWarning, match="does not reach into compiled code"):
        assert_same(compiled_gradients(model, "eager"), expected)
