"""What a cast model computes: dtypes at its borders, torch.autocast's bits inside, and the same after copies of it."""

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_of

PRECISIONS = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks over an embedding, through activation checkpointing if `reentrant` says which kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 13)
        self.reentrant: bool | None = None

    def forward(self, tokens: Tensor, shift: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        """Return logits and the tokens."""
        x = self.embed(tokens) * scale
        if shift is not None:
            x = x + shift
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return {"logits": self.head(x), "tokens": tokens}


TOKENS = torch.arange(52).view(4, 13) % 13


def make(policy: str | None) -> Model:
    torch.manual_seed(0)
    model = Model()
    return model if policy is None else dt.cast(model, policy)


def gradients(model: nn.Module, **options) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(TOKENS, **options)["logits"]
    nn.functional.cross_entropy(logits.float().flatten(0, 1), TOKENS.flatten()).backward()
    return {name.removeprefix("_orig_mod."): param.grad.clone() for name, param in model.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def seen_by(block: nn.Module, model: nn.Module) -> torch.dtype:
    """Return the dtype of what a block works on when the model runs."""
    found = []
    handle = block.norm.register_forward_pre_hook(lambda _, args: found.append(args[0].dtype))
    model(TOKENS, shift=torch.ones(16))
    handle.remove()
    return found[0]


def global_state() -> tuple[object, ...]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), tuple(_get_current_function_mode_stack())


@pytest.mark.parametrize(("policy", "dtype"), PRECISIONS)
@pytest.mark.parametrize("output", ["float32", None])
def test_dtypes_inside_and_at_the_borders(policy, dtype, output):
    narrow = f"{policy},inputs={policy},residual=compute"
    model = make(narrow if output else f"{narrow},output={policy}")
    result = model(TOKENS, shift=torch.ones(16, dtype=torch.float32))
    assert result["logits"].dtype == (torch.float32 if output else dtype)
    assert result["tokens"] is TOKENS
    assert [seen_by(block, model) for block in model.blocks] == [dtype, dtype]
    assert {name for name, grad in gradients(model).items() if grad.dtype != dtype} == {
        f"blocks.{block}.norm.{name}" for block in (0, 1) for name in ("weight", "bias")
    }


def test_float32_takes_16_bits_in(same_bits):
    model = make("fp32")
    shift = torch.randn(16).bfloat16()
    got = model(TOKENS, shift=shift)["logits"]
    assert same_bits(got, make(None)(TOKENS, shift=shift.float())["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        # a policy says what holds, whatever is around it
        assert same_bits(model(TOKENS, shift=shift)["logits"], got)


def test_mixed_bfloat16_is_torchs_autocast():
    mixed, plain = make("bf16-mixed"), make(None)
    x = torch.randn(8, 3, 6, 6)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Softmax(-1))
    cast_convolutions = dt.cast(copy.deepcopy(convolutions), "bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(TOKENS)["logits"]
        expected_convolutions = convolutions(x)
        assert expected.dtype == torch.bfloat16
    got = mixed(TOKENS)["logits"]
    assert torch.equal(got, expected.float())
    assert torch.equal(cast_convolutions(x), expected_convolutions.float())
    assert seen_by(mixed.blocks[1], mixed) == torch.float32
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected.float() * weight).sum().backward()
    assert_same(
        {name: param.grad for name, param in mixed.named_parameters()},
        {name: param.grad for name, param in plain.named_parameters()},
    )


def test_mixed_float16_is_torchs_autocast_but_for_the_order_of_sums():
    with torch.autocast("cpu", torch.float16):
        expected = make(None)(TOKENS)["logits"]
    assert expected.dtype == torch.float16
    got = make("fp16-mixed")(TOKENS)["logits"]
    assert torch.equal(got, got.half().float())
    assert (got - expected.float()).abs().max() <= torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.parametrize(("policy", "dtype"), PRECISIONS)
def test_gradients_are_near_those_of_float32(policy, dtype):
    rough, exact = gradients(make(policy)), gradients(make("fp32"))
    for name, grad in exact.items():
        # some tens of roundings of the format, relative to the whole gradient
        assert (rough[name].float() - grad).norm() < 30 * torch.finfo(dtype).eps * grad.norm(), name


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed", "fp16-mixed", "fp32"])
def test_inputs_come_as_they_are(policy, same_bits):
    x = torch.full((2,), 1 / 3)
    assert same_bits(dt.cast(nn.Identity(), policy)(x), x)
    inner = dt.cast(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), policy)[0]
    assert same_bits(inner(x), x)


class Seen(nn.Module):
    """Notes in which dtype its input comes."""

    def forward(self, x: Tensor) -> Tensor:
        self.dtype = x.dtype
        return x


@pytest.mark.parametrize(("policy", "dtype"), PRECISIONS)
def test_inputs_are_cast_where_the_policy_says_so(policy, dtype, same_bits):
    x = torch.full((2,), 1 / 3)
    model = dt.cast(nn.Sequential(nn.Identity(), Seen()), f"{policy},inputs={policy}")
    assert same_bits(model(x), x.to(dtype).float())
    assert same_bits(model[0](x), x.to(dtype).float())
    dt.cast(model, f"{policy}; 1: inputs={policy}")(x)
    assert model[1].dtype == dtype
    dt.cast(model, f"{policy},inputs={policy}; 1: inputs=float32")(x)
    assert model[1].dtype == torch.float32


def test_float32_gradients_add_up_many_micro_batches():
    def accumulate(policy: str) -> Tensor:
        model = dt.cast(nn.Linear(1, 1, bias=False), policy)
        for value in micro_batches:
            model(value.view(1, 1)).sum().backward()
        return model.weight.grad

    micro_batches = (torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    exact = micro_batches.double().sum().item()
    wide, narrow = accumulate("bf16,grad=float32"), accumulate("bf16")
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert wide.item() == pytest.approx(exact, rel=1e-5)
    # the running sum of about 1000 stalls at 256 to 512
    assert narrow.item() < 0.6 * exact


def test_a_part_under_a_rule_computes_and_returns_as_told(same_bits):
    inner = "bf16,inputs=bf16,residual=compute; blocks.1: param=float32,compute=float32"
    model = make(inner)
    assert [seen_by(block, model) for block in model.blocks] == [torch.bfloat16, torch.float32]
    returned = []
    model.blocks[1].register_forward_hook(lambda *args: returned.append(args[2].dtype))
    model(TOKENS)
    told = make(f"{inner},output=float32")
    told.head.register_forward_pre_hook(lambda _, args: returned.append(args[0].dtype))
    told(TOKENS)
    assert returned == [torch.bfloat16, torch.float32]
    # inside, the part is a model in FP32
    alone = Block()
    alone.load_state_dict(model.blocks[1].state_dict())
    x = torch.randn(2, 16).bfloat16()
    assert same_bits(model.blocks[1](x), alone(x.float()).bfloat16())


@pytest.mark.parametrize("policy", ["bf16", "fp16,grad=float32", "bf16-mixed", "bf16-true,rounding=stochastic"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_whole_and_its_own(policy, way):
    model = make(policy)
    model.blocks[1].requires_grad_(False)
    optimizer = dt.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert dt.policy_of(other) == dt.policy_of(model)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours is not theirs
        assert ours.grad_dtype == theirs.grad_dtype
        assert torch.equal(read_master(ours), read_master(theirs))
        assert storage_of(ours).tail is None or storage_of(ours).tail is not storage_of(theirs).tail
    trained = [param for param in other.parameters() if param.requires_grad]
    before = {name: master.clone() for name, master in dt.master_weights(other).items()}
    gradients(model.requires_grad_(True))
    optimizer.step()
    assert_same(dt.master_weights(other), before)
    # the forward in front of the copy belongs to the copy: it learns from its own weights
    other_optimizer = dt.SGD(trained, lr=0.1)
    gradients(other.requires_grad_(True))
    other_optimizer.step()
    assert_same(dt.master_weights(other), dt.master_weights(model))


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed", "fp32", "bf16; blocks.1: compute=fp32,param=fp32"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(policy, reentrant):
    model = make(policy)
    expected = gradients(model)
    model.reentrant = reentrant
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed", "fp32"])
def test_compiling_changes_no_bit_and_breaks_no_graph(policy):
    torch.compiler.reset()
    model = make(policy)
    expected, logits = gradients(model), model(TOKENS)["logits"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS)["logits"], logits)
    assert_same(gradients(compiled), expected)
    assert dt.policy_of(compiled) == dt.policy_of(model)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-mixed"])
def test_an_error_inside_leaves_nothing_behind(policy):
    model, before = make(policy), global_state()
    with pytest.raises(RuntimeError, match="size"):
        model(TOKENS, shift=torch.ones(17))
    assert global_state() == before


def test_a_forward_looks_as_it_did():
    model = make("bf16")
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    assert model.forward.__doc__ == Model.forward.__doc__
    assert torch.equal(model(TOKENS, scale=2.0)["logits"], model(tokens=TOKENS, scale=2.0)["logits"])


def test_removing_it_restores_the_forward():
    model = make("bf16")
    for module in model.modules():
        if "forward" in vars(module):
            module.forward.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    # a forward that the user had set comes back too
    linear = nn.Linear(2, 2)
    linear.forward = own = lambda x: x
    dt.cast(linear, "bf16").forward.remove()
    assert linear.forward is own


def test_a_callable_forward_of_ones_own_is_called(same_bits):
    class Spy:
        def __init__(self, forward) -> None:
            self._forward, self._module, self.calls = forward, None, 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self._forward(x)

    model = nn.Sequential(nn.Linear(2, 2))
    spy = model[0].forward = Spy(model[0].forward)
    dt.cast(model, "bf16")(torch.ones(1, 2))
    assert spy.calls == 1
    assert dt.uncast(model)[0].forward is spy


def test_masks_are_filled_with_what_float16_can_hold():
    class Masked(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.masked_fill(scores > 0, -1e9).softmax(-1)

    scores = torch.tensor([[-1.0, 1.0, -1.0], [1.0, 2.0, 3.0]])
    probabilities = dt.cast(Masked(), "fp16")(scores.half())
    assert probabilities.tolist() == [[0.5, 0.0, 0.5], pytest.approx([1 / 3] * 3, abs=1e-3)]


class Container(nn.Module):
    """A module without a forward of its own, as GANs and training loops in classes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_a_part_that_is_called_by_itself_is_its_own_border(policy, same_bits):
    torch.manual_seed(0)
    model, x = dt.cast(Container(), policy), torch.randn(3, 4)
    assert model.training_step(x, torch.tensor([0, 1, 2])).dtype == torch.float32
    alone = model.net(x)
    assert same_bits(alone, dt.cast(copy.deepcopy(model.net), policy)(x))
    torch.compiler.reset()
    assert same_bits(torch.compile(model.net, backend="eager", fullgraph=True)(x), alone)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_gives_the_same_bits(strict, same_bits):
    torch.manual_seed(0)
    model, x = dt.cast(Container().net, "bf16"), torch.randn(3, 4)
    with torch.no_grad():
        assert same_bits(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


def attend(x: Tensor, lowest: float) -> Tensor:
    mask = torch.zeros(3, 3)
    mask[2] = lowest
    return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize(("policy", "dtype"), PRECISIONS)
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9])
def test_masks_in_float32_do_not_become_infinite(policy, dtype, lowest):
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(x, lowest)

    torch.manual_seed(0)
    x = torch.randn(1, 1, 3, 8)
    rough, exact = dt.cast(Attention(), policy)(x)[0, 0], attend(x, lowest)[0, 0]
    # a row that is masked as a whole has no meaning, but it has a value; BF16 reaches as far as FP32
    assert rough[2].abs().max() > 0.1
    rows = slice(3 if dtype == torch.bfloat16 else 2)
    assert (rough[rows] - exact[rows]).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, torch.tensor(-3.4e38)])
def test_bfloat16_masks_are_filled_too(number):
    class Masked(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.masked_fill(scores > 0, number)

    assert dt.cast(Masked(), "bf16")(torch.ones(1, 2).bfloat16()).tolist() == [[torch.finfo(torch.bfloat16).min] * 2]


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["orthogonal", "weight_norm"])
def test_a_weight_that_is_parametrized_after_the_cast_is_computed_by_the_rules_too(policy, kind):
    parametrize = getattr(nn.utils.parametrizations, kind)
    outcomes = []
    for is_after in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        if not is_after:
            parametrize(model[0])
        dt.cast(model, policy)
        if is_after:
            # linear algebra has no 16-bit kernels
            with dt.full_precision(model):
                parametrize(model[0])
        output = model(torch.linspace(-1, 1, 32).view(4, 8))
        output.square().mean().backward()
        outcomes.append([output, *(param.grad for param in model.parameters())])
    # of torch's matrix_exp in BF16, gradients are not a number
    assert all(value.isfinite().all() for value in outcomes[1])
    assert all(map(torch.equal, *outcomes))
