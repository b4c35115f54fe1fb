"""What checkpointed modules keep until the backward pass: their inputs, on the device or in the memory of the CPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import duotone.torch as dt
from duotone.torch.casting import activation_checkpointing
from duotone.torch.casting.activation_checkpointing import checkpoint_activations

WIDTH = 16
SHAPE = (2, 24, WIDTH)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the stream, `[batch, tokens, WIDTH]`."""
        query, key, value = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.mix(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class Made(TorchDispatchMode):
    """Knows every storage that an operation returned, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def still_there(self, known: list[Tensor]) -> list[int]:
        """Return the bytes of each storage that is still there and belongs to none of the known tensors."""
        apart = {tensor.untyped_storage()._cdata for tensor in known}
        found = [(at, *made) for at, made in self.storages.items() if at not in apart]
        # torch 2.11's checkpoint keeps empty ones besides
        return [size for _, reference, size in found if size and not reference.expired()]


def run(*patterns: str, offload: bool = False) -> tuple[Tensor, Tensor, list[int]]:
    """Return the input and the result of four blocks in BF16, and the bytes of what they keep besides the weights."""
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(*(Block() for _ in range(4))), "bf16,output=bf16")
    checkpoint_activations(model, *patterns, offload=offload)
    x = torch.randn(SHAPE).bfloat16().requires_grad_()
    with Made() as made:
        result = model(x)
    return x, result, made.still_there([x, result, *model.parameters()])


def test_a_block_keeps_two_bytes_per_token_and_channel():
    x, result, kept = run("*")
    # the inputs of all blocks but the first, whose input is that of the model
    assert kept == [2 * 24 * WIDTH * 2] * 3
    result.float().sum().backward()
    plain_x, plain_result, everything = run()
    plain_result.float().sum().backward()
    assert torch.equal(x.grad, plain_x.grad)
    assert sum(everything) > 10 * sum(kept)


class OutOfSight(saved_tensors_hooks):
    """Stands for `save_on_cpu`, which on a CPU moves nothing: keeps bits outside of torch."""

    moved: Counter[str]

    def __init__(self, pin_memory: bool) -> None:
        assert pin_memory is torch.cuda.is_available()
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> tuple[torch.device, Any]:
        self.moved[f"{[*tensor.shape]} to the cpu"] += 1
        return tensor.device, Bits(tensor)

    def unpack(self, packed: tuple[torch.device, Any]) -> Tensor:
        if isinstance(packed[1], Tensor):
            return packed[1]
        self.moved["back"] += 1
        return torch.from_numpy(packed[1].array).view(torch.bfloat16)


class Bits:
    """The bits of a tensor in BF16."""

    _version = 0

    def __init__(self, tensor: Tensor) -> None:
        self.array = tensor.view(torch.int16).numpy().copy()

    def is_inference(self) -> bool:
        return False


@pytest.fixture
def moved(monkeypatch) -> Counter[str]:
    """Count what moves between a device and the CPU."""
    monkeypatch.setattr(OutOfSight, "moved", Counter(), raising=False)
    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", OutOfSight)
    return OutOfSight.moved


def test_offloaded_inputs_leave_nothing_on_the_device(moved):
    plain_x, plain_result, _ = run("*")
    plain_result.float().square().sum().backward()
    assert not moved
    x, result, kept = run("*", offload=True)
    assert kept == []
    assert moved == {f"{[*SHAPE]} to the cpu": 4}
    result.float().square().sum().backward()
    assert torch.equal(x.grad, plain_x.grad)
    assert moved == {f"{[*SHAPE]} to the cpu": 4, "back": 4}


def test_offload_leaves_inputs_without_gradient_where_they_are(moved):
    model = checkpoint_activations(nn.Sequential(Block()).bfloat16(), "0", offload=True)
    x, mask = torch.randn(SHAPE).bfloat16().requires_grad_(), torch.zeros(24, 24).bfloat16()
    model[0](x, mask=mask).sum().backward()
    assert moved == {f"{[*SHAPE]} to the cpu": 1, "back": 1}


@pytest.mark.parametrize("offload", [False, True])
def test_an_input_given_thrice_stays_one(offload):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
    x = torch.randn(2, 3, 8, requires_grad=True)
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(model[0](x, x, x)[0].square().sum(), inputs)
    # with a query that is not its key, attention saves other tensors, and torch raises
    checkpoint_activations(model, "0", offload=offload)
    assert all(map(torch.equal, torch.autograd.grad(model[0](x, x, x)[0].square().sum(), inputs), expected))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("which", ["x", "mask"])
def test_an_input_changed_before_the_backward_pass_is_an_error(offload, which):
    model = checkpoint_activations(nn.Sequential(Block()), "0", offload=offload)
    given = {"x": torch.randn(SHAPE, requires_grad=True) * 1, "mask": torch.zeros(24, 24)}
    result = model[0](given["x"], mask=given["mask"])
    given[which].add_(1)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        result.sum().backward()
