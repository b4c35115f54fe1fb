"""What torch's conversions and shallow copies of a cast module leave: masters bit for bit, and copies of their own."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import OptimizerError, PolicyError
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.shards import local
from duotone.torch.parameters.storage import storage_of

POLICIES = ["bf16", "fp16", "bf16; 2: param=float32,compute=float32", "bf16-true,rounding=stochastic"]
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda params: dt.AdamW(params, lr=1e-3, backend="reference"),
    "MasterWeights": lambda params: dt.MasterWeights(torch.optim.NAdam(params, lr=1e-3)),
}
X = torch.linspace(-1, 1, 12).view(3, 4)


def trained(policy: str, kind: str = "AdamW") -> tuple[nn.Sequential, Any]:
    """Return a model with masters that no 16-bit weight holds, gradients among it, and its optimizer."""
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), policy)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
    return model, optimizer


def converted(way: str, module: nn.Module) -> None:
    """Convert a module, in one of torch's ways."""
    ways: dict[str, Callable[[], Any]] = {
        "float": module.float,
        "to float32": lambda: module.to(torch.float32),
        "type": lambda: module.type(torch.float32),
        "double": module.double,
        "half": module.half,
        "bfloat16": module.bfloat16,
        "to bfloat16": lambda: module.to(device="cpu", dtype=torch.bfloat16),
    }
    ways[way]()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", ["float", "to float32", "type", "double", "half", "bfloat16", "to bfloat16"])
def test_a_conversion_keeps_every_bit_of_the_masters(policy: str, way: str, same_bits: Any) -> None:
    model, _ = trained(policy)
    masters = dt.master_weights(model)
    wanted = {param: param.dtype for param in model.parameters()}
    converted(way, model)
    for name, param in model.named_parameters():
        has_master = storage_of(param).rounding is None
        if param.dtype in (torch.float32, torch.float64):
            assert same_bits(param.float(), masters[name])
        elif has_master:
            assert same_bits(read_master(param), masters[name])
            assert param.equal(masters[name].to(param.dtype))
        assert param.grad is not None
        assert param.grad.dtype == param.grad_dtype == param.dtype, wanted
    # and what is cast again is cast as if nothing had been
    again = dt.cast(model.float(), policy)
    assert {param: param.dtype for param in again.parameters()} == wanted
    if "true" not in policy:
        assert all(same_bits(dt.master_weights(again)[name], master) for name, master in masters.items())


def by_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_is_converted_by_itself(copied: Callable[[nn.Module], nn.Module], same_bits: Any) -> None:
    model, _ = trained("bf16")
    masters = dt.master_weights(model)
    other = copied(model)
    other.float()
    assert all(same_bits(param, masters[name]) for name, param in other.named_parameters())
    assert model[0].weight.dtype == torch.bfloat16
    wrapper = nn.Sequential(copied(other))
    wrapper.bfloat16()
    assert same_bits(read_master(wrapper[0][0].weight), masters["0.weight"])


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16; 2: output=float32"])
def test_a_part_that_is_float32_is_said_to_be(policy: str, same_bits: Any) -> None:
    model, optimizer = trained(policy)
    masters = dt.master_weights(model)
    model[2].float()
    assert same_bits(model[2].weight, masters["2.weight"])
    assert model[0].weight.dtype != torch.float32
    assert str(dt.policy_of(model)).startswith(str(dt.Policy.parse(policy)))
    now = dt.policy_of(model)
    assert (now.for_module("0").param, now.for_module("2").param) == (now.param, "float32")
    assert dt.memory(model, optimizer).tails_bytes == 2 * 20
    fresh = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), now)
    assert [p.dtype for p in fresh.parameters()] == [p.dtype for p in model.parameters()]
    model.float()
    assert {dt.policy_of(model).for_module(path).param for path in ("", "0", "2")} == {"float32"}
    assert dt.memory(model, optimizer).tails_bytes == 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16; 2: param=float32,compute=float32"])
def test_an_optimizer_goes_on_with_float32_weights(policy: str, kind: str, same_bits: Any) -> None:
    (model, optimizer), (twin, its_optimizer) = trained(policy, kind), trained(policy, kind)
    model.float()
    for each in (*model.parameters(), *twin.parameters()):
        each.grad = torch.full(each.shape, 0.25, dtype=each.dtype)
    optimizer.step()
    its_optimizer.step()
    masters = dt.master_weights(twin)
    assert all(same_bits(param, masters[name]) for name, param in model.named_parameters())
    assert dt.master_weights(model, optimizer).keys() == masters.keys()
    assert optimizer.state_dict()["duotone"]["weights"] == ["float32"] * 6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_weights_that_no_policy_computes_in_is_refused(kind: str) -> None:
    model, optimizer = trained("bf16", kind)
    model.half()
    with pytest.raises(OptimizerError, match=r'"0.weight" was cast to torch.bfloat16 and converted to torch.float16'):
        optimizer.step()
    assert dt.policy_of(model).name == "bf16"
    dt.cast(model, "fp16")
    optimizer.step()
    model.double()
    with pytest.raises(OptimizerError, match=r"float32, bfloat16 and float16"):
        optimizer.step()
    # no policy computes in FP64
    assert dt.policy_of(model) is None
    assert model(X.double()).dtype == torch.float64
    model.float()
    optimizer.step()


def test_a_part_in_float64_has_no_policy_and_the_others_keep_theirs() -> None:
    model, _ = trained("bf16")
    model[2].double()
    assert cast_forward_of(model[2]) is None
    assert dt.policy_of(model).name == "bf16"


def test_a_master_beyond_float16_is_refused_before_it_is_lost() -> None:
    model = dt.cast(nn.Linear(1, 1, bias=False), "bf16")
    dt.load_master_weights(model, {"weight": torch.tensor([[70000.0]])})
    with pytest.raises(PolicyError, match=r'"weight" holds 70000, beyond FP16.* keep it in bfloat16, or call float'):
        model.half()
    assert dt.master_weights(model)["weight"].item() == 70000.0
    assert model.weight.dtype == torch.bfloat16


def test_what_is_moved_or_emptied_keeps_its_record() -> None:
    model, _ = trained("bf16")
    master = dt.master_weights(model)["0.weight"]
    model.to("cpu")
    model.share_memory()
    assert dt.master_weights(model)["0.weight"].equal(master)
    model.to("meta")
    assert storage_of(model[0].weight).param == torch.bfloat16
    model.to_empty(device="cpu")
    model[0].weight.data.fill_(1.0)
    assert dt.master_weights(model)["0.weight"].equal(torch.ones(4, 4))
    lazy = dt.cast(nn.Sequential(nn.LazyLinear(2)), "bf16").float()
    assert lazy(X).shape == (3, 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_data_of_another_shape_or_dtype_is_the_new_master(policy: str) -> None:
    for new in (torch.full((5, 4), 0.1).bfloat16(), torch.full((4, 4), 0.1), torch.full((4, 4), 0.1).half()):
        model, _ = trained(policy)
        if (new.dtype, new.shape) == (model[0].weight.dtype, model[0].weight.shape):
            continue
        model[0].weight.grad = None
        model[0].weight.data = new
        assert dt.master_weights(model)["0.weight"].equal(new.float())
        assert read_master(copy.deepcopy(model)[0].weight).equal(new.float())
        if new.shape == (4, 4):
            optimizer = dt.AdamW(dt.cast(model, policy).parameters(), backend="reference")
            assert dt.master_weights(model, optimizer)["0.weight"].sub(new.float()).abs().max() < 1e-3
            assert dt.uncast(model)[0].weight.sub(new.float()).abs().max() < 1e-3


def test_a_resized_embedding_trains_and_is_cast_again(same_bits: Any) -> None:
    model = dt.cast(nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)), "bf16")
    wider = torch.cat([model[0].weight.data, torch.full((2, 3), 0.1).bfloat16()])
    model[0].weight.data = wider
    optimizer = dt.AdamW(model.parameters(), backend="reference")
    assert same_bits(dt.master_weights(model, optimizer)["0.weight"], wider.float())
    model(torch.tensor([5, 0])).sum().backward()
    optimizer.step()
    assert dt.master_weights(model, optimizer)["0.weight"].shape == (6, 3)
    assert same_bits(dt.uncast(copy.deepcopy(model))[0].weight, dt.master_weights(model)["0.weight"])
    dt.prepare(model, torch.optim.AdamW(model.parameters()), "fp16")


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16; type=Linear: output=float32"])
@pytest.mark.parametrize("way", [copy.copy, lambda module: module._replicate_for_data_parallel()])
def test_a_shallow_copy_runs_its_own_weights(policy: str, way: Callable[[nn.Module], nn.Module]) -> None:
    model = dt.cast(nn.Sequential(nn.Linear(4, 2)), policy)
    expected = model(X)
    copied = way(model)
    linear = way(model[0])
    linear._parameters = {}
    vars(linear).update({name: torch.zeros_like(param).detach() for name, param in model[0].named_parameters()})
    copied._modules = {"0": linear}
    assert copied(X).equal(torch.zeros(3, 2))
    assert linear(X).float().equal(torch.zeros(3, 2))
    assert copied(X).dtype == expected.dtype
    assert model(X).equal(expected)
    assert dt.policy_of(copied) == dt.policy_of(model)
    assert copied.float() is copied
    assert model[0].weight.dtype == model[0].bias.dtype


def test_a_shallow_copy_of_a_checkpointed_module_runs_its_own_weights() -> None:
    model = dt.checkpoint_activations(dt.cast(nn.Sequential(nn.Linear(4, 2)), "bf16"), "0")
    linear = model[0]._replicate_for_data_parallel()
    linear.__dict__.update({name: torch.zeros_like(p).detach() for name, p in model[0].named_parameters()})
    assert linear(X).equal(torch.zeros(3, 2))
    assert model(X).abs().max() > 0


def test_uncast_takes_the_methods_away() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    before = set(vars(model[0])), set(vars(model))
    dt.uncast(dt.cast(model, "bf16"))
    assert (set(vars(model[0])), set(vars(model))) == before


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16; 2: param=float32,compute=float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
def test_float32_values_that_are_loaded_are_the_masters(policy: str, dtype: Any, assign: bool, same_bits: Any) -> None:
    model, optimizer = trained(policy)
    dtypes = [param.dtype for param in model.parameters()]
    loaded = {name: value.to(dtype) + 0.1 for name, value in dt.master_weights(model).items()}
    assert not model.load_state_dict(loaded, assign=assign and dtype == torch.float32).missing_keys
    assert [param.dtype for param in model.parameters()] == dtypes
    masters = dt.master_weights(model)
    assert all(same_bits(masters[name], value.float()) for name, value in loaded.items())
    if not assign:
        optimizer.step()
        assert dt.master_weights(model, optimizer)["0.weight"].sub(masters["0.weight"]).abs().max() < 0.01
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**loaded, "0.weight": torch.zeros(2, 2)})


def test_sixteen_bit_values_leave_tails_to_the_optimizers_state(same_bits: Any) -> None:
    model, optimizer = trained("bf16")
    model(X).square().mean().backward()
    optimizer.step()
    for model_first in (True, False):
        other, its_optimizer = trained("bf16")
        if model_first:
            other.load_state_dict(model.state_dict())
        its_optimizer.load_state_dict(optimizer.state_dict())
        if not model_first:
            other.load_state_dict(model.state_dict())
        its_masters = dt.master_weights(other)
        assert all(same_bits(its_masters[name], master) for name, master in dt.master_weights(model).items())


def sharded(way: str) -> list[str]:
    """Return which masters are not what they were, of a sharded model that is converted, and what its steps say."""
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), "bf16")
    masters = {name: master + 1e-4 for name, master in dt.master_weights(model).items()}
    dt.load_master_weights(model, masters)
    model = dt.fully_shard(model)
    model(X)
    converted(way, model)
    if way == "float":
        model(X).sum().backward()
        if model[0].weight.grad.dtype != torch.float32:
            return ["gradient"]
    wrong = []
    for name, master in dt.master_weights(model).items():
        whole: Tensor = master.full_tensor()  # type: ignore[attr-defined]
        if not whole.equal(masters[name]):
            wrong.append(name)
    for name, param in model.named_parameters():
        if way == "float" and not local(param).equal(local(dt.master_weights(model)[name])):
            wrong.append(f"{name} itself")
    return wrong


@pytest.mark.parametrize("way", ["float", "half"])
def test_a_sharded_model_is_converted_with_its_masters(ranks: Any, way: str) -> None:
    assert ranks.run(2, sharded, way) == [[], []]


@pytest.mark.parametrize(
    "policy", ["fp32", "bf16; 0: param=float32,compute=float32", "bf16; 1: param=float32,compute=float32"]
)
@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16])
def test_a_part_that_computes_in_float32_says_why_it_does_not_run_with_16_bit_weights(policy, convert):
    model = dt.cast(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)), policy)
    convert(model)
    with pytest.raises(PolicyError, match=r"computes in float32 here, but .* since the model was converted by half"):
        model(torch.ones(2, 3))
    model.float()(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(2, 5))


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1"])
@pytest.mark.parametrize("is_edited", [True, False])
def test_a_weight_that_is_moved_in_memory_keeps_its_master_and_is_followed(policy, is_edited):
    # as by a move to another device, the memory is another one
    model = dt.cast(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), policy)
    weight = model[0].weight
    if is_edited:
        weight.data.mul_(2.0)
    expected = read_master(weight)
    model.to(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(read_master(weight), expected)
    assert torch.equal(expected, weight.float()) == is_edited
    # and changes after the move are noticed too
    weight.data.neg_().mul_(2.0)
    assert torch.equal(read_master(weight), weight.float())
    optimizer = dt.SGD(model.parameters(), lr=0.0)
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(read_master(weight), weight.float())


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1"])
def test_a_weight_that_is_moved_to_a_device_keeps_its_master_and_is_followed(policy):
    model = dt.cast(nn.Linear(40, 40), policy)
    model.weight.data[0].mul_(2.0)
    expected = read_master(model.weight)
    model.cuda()
    assert torch.equal(read_master(model.weight).cpu(), expected)
    model.weight.data.neg_().mul_(2.0)
    assert torch.equal(read_master(model.weight), model.weight.float())
    model.cpu()
    assert torch.equal(read_master(model.weight), model.weight.float())
