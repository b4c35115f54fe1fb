"""FP16 products in FP32 arithmetic: one rounding of the operands and one of the result, forward and backward.

`plainly` says the same in conversions alone, which autograd saves in FP32; the numbers are held to it bit for bit, the
memory to that of FP16. What is around a call (checkpoints, hooks, transforms) is in `test_half_on_cpu_contexts`.
"""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import duotone.torch as dt
from duotone.errors import DuotoneError, DuotoneWarning
from duotone.torch.casting import half_on_cpu
from duotone.torch.casting.half_on_cpu import multiply_in_float32, say_once_how_half_runs_on_cpu
from duotone.torch.nested import map_tensors


def plainly(func, args, kwargs):
    def widen(tensor: Tensor) -> Tensor:
        narrow = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
        return tensor.to(torch.float16).to(torch.float32) if narrow else tensor

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float16) if tensor.dtype == torch.float32 else tensor

    with torch.autocast("cpu", enabled=False):
        return map_tensors(narrow, func(*map_tensors(widen, args), **map_tensors(widen, dict(kwargs))))


def half(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape).half().requires_grad_(requires_grad)


def call(func, *args, **kwargs):
    return func, args, kwargs


def heads_of(qkv: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value as a transformer makes them: strided views of one tensor, [batch, heads, time, 4]."""
    return tuple(part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))


def recurrent(kind: type[nn.RNNBase], layers: int, batch_first: bool):
    module = kind(5, 7, layers, batch_first=batch_first).half()
    state = half(layers, 3, 7)
    state = (state, half(layers, 3, 7)) if kind is nn.LSTM else state
    x = half(3, 4, 5) if batch_first else half(4, 3, 5)
    func = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[kind]
    return call(func, x, state, module._flat_weights, True, layers, 0.0, True, False, batch_first)


def cell(kind: type[nn.RNNCellBase]):
    module = kind(5, 7).half()
    state = (half(3, 7), half(3, 7)) if kind is nn.LSTMCell else half(3, 7)
    func = {nn.LSTMCell: torch.lstm_cell, nn.GRUCell: torch.gru_cell}[kind]
    return call(func, half(3, 5), state, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)


def multi_head(**kwargs):
    module, x = nn.MultiheadAttention(8, 2).half(), half(4, 2, 8)
    weights = (module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0)
    weights += (module.out_proj.weight, module.out_proj.bias)
    return call(F.multi_head_attention_forward, x, half(4, 2, 8), half(4, 2, 8), 8, 2, *weights, **kwargs)


torch.manual_seed(0)
attention = F.scaled_dot_product_attention
triangle = torch.ones(6, 6).tril()

# one product each, so that nothing in FP32 need be saved
PRODUCTS = {
    "linear": call(F.linear, half(4, 5), half(3, 5), half(3)),
    "linear in 3 dimensions": call(F.linear, half(2, 4, 5), half(3, 5), half(3)),
    "linear of a part": call(F.linear, half(2, 4, 9)[..., 2:7], half(3, 5)),
    "linear of a part's transpose": call(F.linear, half(5, 4, 9)[..., 2:7].transpose(0, 1), half(3, 5), half(3)),
    "linear by a transposed weight": call(F.linear, half(4, 5), half(5, 3).T),
    "linear of FP32 and BF16": call(F.linear, torch.randn(4, 5, requires_grad=True), half(3, 5).bfloat16()),
    "linear by name": call(F.linear, half(4, 5), weight=half(3, 5), bias=None),
    "matmul": call(torch.matmul, half(2, 4, 5), half(5, 3)),
    "matmul broadcasts": call(torch.matmul, half(3, 2, 4, 5), half(2, 5, 3)),
    "matmul of transposed heads": call(torch.matmul, heads_of(half(2, 6, 24))[0], half(2, 2, 6, 4).mT),
    "@ of a vector": call(Tensor.__matmul__, half(4, 5), half(5)),
    "mm": call(torch.mm, half(4, 5), half(3, 5).T),
    "bmm": call(Tensor.bmm, half(2, 4, 5), half(2, 5, 3)),
    "bmm expanded": call(torch.bmm, half(4, 5).expand(2, 4, 5), half(2, 5, 3)),
    "mv": call(torch.mv, half(4, 5), half(5)),
    "addmm": call(torch.addmm, half(4, 3), half(4, 5), half(5, 3)),
    "baddbmm": call(torch.baddbmm, half(2, 4, 3), half(2, 4, 5), half(2, 5, 3), beta=0.5),
    "einsum": call(torch.einsum, "bij,bkj->bik", half(2, 3, 4), half(2, 5, 4)),
    "einsum of a list": call(torch.einsum, "bthd,bshd->bhts", [half(2, 6, 2, 4), half(2, 6, 2, 4)]),
    "bilinear": call(F.bilinear, half(4, 5), half(4, 6), half(3, 5, 6)),
    "conv1d": call(F.conv1d, half(2, 3, 8), half(4, 3, 3), half(4)),
    "conv2d": call(F.conv2d, half(2, 3, 8, 8), half(4, 3, 3, 3), half(4), stride=2),
    "conv2d channels last": call(
        F.conv2d, half(2, 3, 8, 8).to(memory_format=torch.channels_last), half(4, 3, 3, 3), None, 1, "same"
    ),
    "conv3d": call(F.conv3d, half(1, 2, 4, 4, 4), half(3, 2, 2, 2, 2)),
    "conv_transpose1d": call(F.conv_transpose1d, half(2, 3, 4), half(3, 2, 3)),
    "conv_transpose2d": call(F.conv_transpose2d, half(2, 3, 4, 4), half(3, 2, 3, 3)),
    "nothing": call(F.linear, half(0, 5), half(3, 5)),
}
ATTENTIONS = {
    "attention": call(attention, half(1, 2, 6, 4), half(1, 2, 6, 4), half(1, 2, 6, 4)),
    "attention, causal, of strided heads": call(attention, *heads_of(half(2, 6, 24)), is_causal=True),
    "attention with a boolean mask": call(attention, *heads_of(half(2, 6, 24)), attn_mask=triangle.bool()),
    "attention with an added mask": call(attention, *heads_of(half(2, 6, 24)), triangle.log()),
}
# several steps each: what lies between them is FP32
COMPOSED = {
    "lstm": recurrent(nn.LSTM, 1, False),
    "lstm, two layers": recurrent(nn.LSTM, 2, True),
    "gru": recurrent(nn.GRU, 2, True),
    "rnn": recurrent(nn.RNN, 1, False),
    "lstm cell": cell(nn.LSTMCell),
    "gru cell": cell(nn.GRUCell),
    "multi-head attention": multi_head(need_weights=False),
    "multi-head attention and its weights": multi_head(average_attn_weights=False),
    "attention with a learned mask": call(attention, *heads_of(half(2, 6, 24)), attn_mask=half(6, 6)),
    "linear of some rows": call(lambda x, weight: F.linear(x[1:3], weight), half(4, 5), half(3, 5)),
    "linear of rows of a part": call(lambda x, weight: F.linear(x[1:3], weight), half(4, 9)[:, 2:7], half(3, 5)),
    "linear of the first rows": call(lambda x, weight: F.linear(x[:3], weight), half(9, 5)[3:], half(3, 5)),
    "linear of some columns": call(lambda x, weight: F.linear(x[:, 2:], weight), half(4, 7), half(3, 5)),
    "linear of a row, repeated": call(lambda x, weight: F.linear(x[1].expand(3, 5), weight), half(4, 5), half(3, 5)),
    "einsum of three": call(torch.einsum, "ij,jk,kl->il", half(2, 3), half(3, 4), half(4, 5)),
}
CALLS = PRODUCTS | ATTENTIONS | COMPOSED


def tensors_in(value) -> list[Tensor]:
    found = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def gradients(result, operands: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    results = [each for each in tensors_in(result) if each.requires_grad]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(each.shape, generator=generator).to(each) for each in results]
    grads = torch.autograd.grad(results, operands, directions, allow_unused=True, create_graph=create_graph)
    return [grad for grad in grads if grad is not None]


def learned(args, kwargs) -> list[Tensor]:
    return [operand for operand in tensors_in((args, kwargs)) if operand.requires_grad]


def saved_by(func, args, kwargs) -> list[Tensor]:
    """Return what the hooks of someone outside are given to save."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), lambda nothing: nothing):
        multiply_in_float32(func, args, kwargs)
    return saved


def as_flash_saves(tensor: Tensor) -> Tensor:
    # [batch, heads, time] is the logarithm of the sum of exponentials, which stays FP32
    return tensor.detach() if tensor.dim() == 3 else tensor.detach().half().float()


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_plain_conversions(name, same_bits):
    func, args, kwargs = CALLS[name]
    operands = learned(args, kwargs)
    got = multiply_in_float32(func, args, kwargs)
    if name in ATTENTIONS:
        # flash attention in FP16 reads its rounded result in backward
        with saved_tensors_hooks(as_flash_saves, lambda tensor: tensor):
            expected = plainly(func, args, kwargs)
    else:
        expected = plainly(func, args, kwargs)
    for one, other in zip(tensors_in(got), tensors_in(expected), strict=True):
        assert one.dtype == torch.float16
        assert one.stride() == other.stride()
        assert same_bits(one, other)
    got_grads, expected_grads = gradients(got, operands), gradients(expected, operands)
    assert got_grads
    for one, other in zip(got_grads, expected_grads, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("name", ["linear", "matmul", "conv2d", "bmm", "einsum"])
def test_gradients_of_gradients(name, same_bits):
    func, args, kwargs = CALLS[name]
    operands = learned(args, kwargs)
    widened = [operand.detach().float().requires_grad_() for operand in operands]
    in_place_of = {id(operand): wide for operand, wide in zip(operands, widened, strict=True)}
    of_wide = func(*map_tensors(lambda tensor: in_place_of[id(tensor)], args), **kwargs)

    def second(result, operands):
        grads = gradients(result, operands, create_graph=True)
        return gradients(sum(grad.float().square().sum() for grad in grads), operands)

    got = second(multiply_in_float32(func, args, kwargs), operands)
    assert got
    plain, wide = second(plainly(func, args, kwargs), operands), second(of_wide, widened)
    for one, other, exact in zip(got, plain, wide, strict=True):
        assert same_bits(one, other)
        assert torch.allclose(one.float(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_saves_nothing_in_float32(name):
    func, args, kwargs = CALLS[name]
    saved = saved_by(func, args, kwargs)
    assert saved
    assert {tensor.dtype for tensor in saved} == {torch.float16}


OWN = ["linear", "linear in 3 dimensions", "linear of a part", "matmul", "mm", "addmm", "bmm expanded", "einsum"]


@pytest.mark.parametrize("name", [*OWN, "conv1d", "conv2d", "conv_transpose2d", "attention, causal, of strided heads"])
def test_operands_are_saved_in_the_memory_they_have(name):
    func, args, kwargs = CALLS[name]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
    if func is attention:
        query, key, value, logsumexp, _ = saved_by(func, args, kwargs)
        saved = [query, key, value]
        assert (logsumexp.dtype, logsumexp.shape) == (torch.float32, query.shape[:3])
    else:
        saved = saved_by(func, args, kwargs)
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= own


def test_attention_saves_its_result_in_the_memory_it_has():
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), lambda nothing: nothing):
        result = multiply_in_float32(*ATTENTIONS["attention, causal, of strided heads"])
    assert [tensor.dtype for tensor in saved].count(torch.float16) == 4
    assert saved[-1].untyped_storage().data_ptr() == result.untyped_storage().data_ptr()


def test_a_result_that_is_a_part_is_saved_as_it_is(monkeypatch, same_bits):
    def part(query):
        return query.exp()[..., 1:]

    monkeypatch.setattr(F, "scaled_dot_product_attention", part)
    query = half(4, 5)
    one, other = (gradients(how(part, (query,), {}), [query]) for how in (multiply_in_float32, plainly))
    assert all(map(same_bits, one, other))


def test_an_operand_is_what_it_was_or_backward_refuses():
    for changed in range(2):
        operands = [half(2, 4, 5) * 1, half(3, 5) * 1]
        result = multiply_in_float32(F.linear, tuple(operands), {})
        operands[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
            result.sum().backward()
        assert isinstance(raised.value, DuotoneError)
        shape = "(2, 4, 5)" if changed == 0 else "(3, 5)"
        assert f"torch.float16 tensor of shape {shape} that linear saved" in str(raised.value)
        assert "is at version 1 instead of 0; change a clone of it" in str(raised.value)


def test_what_else_is_saved_is_what_it_was_or_backward_refuses():
    result = multiply_in_float32(attention, tuple(half(1, 1, 6, 4) for _ in range(3)), {})
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()

    weight, mask = half(3, 3), torch.ones(3, 3, dtype=torch.bool)
    result = multiply_in_float32(lambda weight, mask: weight.masked_fill(mask, 0.0), (weight, mask), {})
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_an_operand_may_change_where_that_is_harmless(same_bits):
    x, weight = half(4, 5) * 1, half(3, 5)
    multiply_in_float32(F.linear, (x, weight), {}).sum().backward()
    # after backward; an operand that was rounded first; one that no gradient needs; a bias
    x.add_(1)
    wide, bias = torch.randn(4, 5), half(3) * 1
    expected = wide.half().sum(0).expand(3, 5)
    weight.grad = None
    result = multiply_in_float32(F.linear, (wide, weight, bias), {})
    wide.add_(1)
    bias.add_(1)
    result.sum().backward()
    assert torch.allclose(weight.grad, expected, rtol=1e-2, atol=1e-2)
    fixed = half(3, 5, requires_grad=False)
    result = multiply_in_float32(F.linear, (half(4, 5, requires_grad=False), weight), {})
    fixed.add_(1)
    result.sum().backward()


def test_a_function_that_changes_what_it_was_given(same_bits):
    def shifted(x, weight):
        return F.linear(x.mul_(2), weight)

    x, weight = half(4, 5), half(3, 5)
    one, other = (gradients(how(shifted, (x, weight), {}), [x, weight]) for how in (multiply_in_float32, plainly))
    assert all(map(same_bits, one, other))


@pytest.mark.parametrize("name", ["mm", "linear by a transposed weight", "conv2d channels last", *ATTENTIONS])
def test_hooks_outside_may_bring_another_layout(name, same_bits):
    func, args, kwargs = CALLS[name]
    expected = gradients(multiply_in_float32(func, args, kwargs), learned(args, kwargs))
    # save_on_cpu(pin_memory=True) loses strides in this way
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), Tensor.clone):
        result = multiply_in_float32(func, args, kwargs)
    assert all(map(same_bits, gradients(result, learned(args, kwargs)), expected))


def test_one_operand_in_several_places_stays_one():
    x, seen = half(1, 2, 6, 4), []

    def watched(query, key, value, attn_mask):
        seen.append((query, key, value))
        return attention(query, key, value, attn_mask)

    result = multiply_in_float32(watched, (x, x), {"value": x, "attn_mask": None})
    query, key, value = seen[0]
    assert query is key is value
    wide = x.detach().float().requires_grad_()
    result.float().sum().backward()
    attention(wide, wide, wide).half().float().sum().backward()
    # the three gradients are added in FP32 and rounded once
    assert torch.equal(x.grad, wide.grad.half())


def test_what_is_not_an_operand_stays_as_it_is():
    others = [torch.ones(2, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64)]

    def watched(x, *rest, **named):
        assert x.dtype == torch.float32
        assert all(one is other for one, other in zip(rest, others, strict=True))
        assert named == {"none": None, "text": "text", "nested": [1, (None, 2.5)]}
        return [*rest, None, {"product": x}]

    result = multiply_in_float32(
        watched, (half(2), *others), {"none": None, "text": "text", "nested": [1, (None, 2.5)]}
    )
    assert all(one is other for one, other in zip(result, others, strict=False))
    assert result[-2] is None
    assert result[-1]["product"].dtype == torch.float16


def test_writing_into_a_given_tensor_is_left_alone():
    a, out = half(4, 4, requires_grad=False), torch.empty(4, 4, dtype=torch.float16)
    result = multiply_in_float32(torch.matmul, (a, a), {"out": out})
    assert result is out
    assert torch.allclose(out.float(), a.float() @ a.float(), rtol=1e-2, atol=1e-2)


def test_roundings_of_what_has_none():
    values = torch.tensor([[float("nan"), float("inf"), -0.0, 2.0**-24, 65504.0, 65520.0, -1e-30]])
    result = multiply_in_float32(torch.mul, (values, torch.ones(1)), {})
    assert str(result.tolist()) == str([[float("nan"), float("inf"), -0.0, 2.0**-24, 65504.0, float("inf"), -0.0]])


def test_sums_longer_than_float16_counts():
    ones = torch.ones(1, 5000, dtype=torch.float16)
    # in FP16 a running sum of ones ends at 2048; the nearest FP16 number to 5000 is itself
    assert multiply_in_float32(torch.matmul, (ones, ones.T), {}).item() == 5000.0
    assert multiply_in_float32(torch.matmul, (ones * 100, ones.T * 100), {}).item() == float("inf")


def test_a_model_in_fp16_learns_with_float16_gradients():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    model = dt.cast(copy.deepcopy(plain), "fp16")
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    x = torch.randn(32, 8).half().float()
    model(x).mean().backward()
    plain(x).mean().backward()
    for param, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert param.grad.dtype == torch.float16
        assert torch.allclose(param.grad.float(), reference.grad, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("has_products", [True, False])
def test_what_it_does_is_said_once(monkeypatch, has_products):
    monkeypatch.setattr(half_on_cpu, "cpu_has_half_products", lambda: has_products)
    say_once_how_half_runs_on_cpu.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            dt.cast(nn.Linear(1, 1), "fp16")
            dt.cast(nn.Linear(1, 1), "bf16")
    about_it = [each for each in said if "this CPU has no FP16 matrix products" in str(each.message)]
    assert len(about_it) == (0 if has_products else 1)
    # it points at the call of cast
    assert all((each.category, each.filename) == (DuotoneWarning, __file__) for each in about_it)
