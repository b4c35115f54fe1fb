"""The residual stream: FP32 from embeddings, class tokens and positions on, or in the format of the arithmetic."""

import copy
import io
import statistics

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.errors import CheckpointError
from duotone.torch.parameters.storage import storage_of

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = torch.arange(40).view(4, 10) % 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.dtype
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens or patches, a class token, positions, and blocks."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.patch = nn.Embedding(11, 16), nn.Conv1d(3, 16, 2, 2)
        self.class_token, self.positions = (nn.Parameter(torch.randn(1, length, 16)) for length in (1, 11))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(16, 11)
        self.checkpoint = False

    def forward(self, given: Tensor) -> Tensor:
        x = self.patch(given).mT if given.is_floating_point() else self.embed(given)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return self.head(x[:, 1:])


def make(policy: str | None, depth: int = 2) -> Model:
    torch.manual_seed(0)
    model = Model(depth)
    return model if policy is None else dt.cast(model, policy)


def gradients(model: nn.Module, given: Tensor) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(model(given).flatten(0, 1), TOKENS.flatten()).backward()
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("policy", NARROW)
@pytest.mark.parametrize("given", [TOKENS, torch.ones(4, 3, 20)], ids=["tokens", "patches"])
def test_the_stream_is_in_float32_or_in_the_policys_format(policy, given):
    for text, dtype in ((policy, torch.float32), (f"{policy},residual=compute", NARROW[policy])):
        model = make(text)
        model(given)
        assert [block.seen for block in model.blocks] == [dtype, dtype]
        assert model.class_token.dtype == model.positions.dtype == dtype
        assert model.embed.weight.dtype == model.head.weight.dtype == NARROW[policy]
        with torch.no_grad():
            model(given)
        assert model.blocks[0].seen == dtype


def test_what_is_kept_in_float32_for_the_stream_has_no_tail_unless_a_rule_says_so():
    model = make("bf16")
    assert storage_of(model.positions).tail is None
    assert model.positions.grad_dtype == torch.float32
    model = dt.cast(nn.Sequential(make(None)), "bf16; 0: param=bfloat16")[0]
    assert storage_of(model.positions).tail is not None


def test_rules_choose_for_parts():
    model = make("bf16; embed: residual=compute")
    assert model.positions.dtype == torch.float32
    looked_up = []
    model.embed.register_forward_hook(lambda *args: looked_up.append(args[2].dtype))
    model(TOKENS)
    model = make("bf16,residual=compute; embed: residual=float32")
    model.embed.register_forward_hook(lambda *args: looked_up.append(args[2].dtype))
    model(TOKENS)
    assert looked_up == [torch.bfloat16, torch.bfloat16]
    model = make("bf16,residual=compute; embed: residual=float32,output=float32")
    assert model.positions.dtype == torch.bfloat16
    model(TOKENS)
    assert model.blocks[1].seen == torch.float32


def test_a_part_in_float32_does_not_round_the_stream_that_goes_through_it():
    model = make("bf16; blocks.0: param=float32,compute=float32")
    model(TOKENS)
    assert model.blocks[1].seen == torch.float32
    # what comes in 16 bits is no stream in FP32, and leaves in what the model around it computes in
    assert model.blocks[0](torch.ones(1, 16).bfloat16()).dtype == torch.bfloat16
    assert model.blocks[0](torch.ones(1, 16)).dtype == torch.float32


class Call(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.call, self.table = call, nn.Parameter(torch.randn(11, 4))

    def forward(self) -> Tensor:
        return self.call(self.table)


LOOKUPS = {
    "functional": lambda table: F.embedding(TOKENS, table),
    "torch": lambda table: torch.embedding(table, TOKENS),
    "padded": lambda table: F.embedding(TOKENS, table, padding_idx=3),
    "sparse": lambda table: F.embedding(TOKENS, table, sparse=True),
    "by frequency": lambda table: F.embedding(TOKENS, table, scale_grad_by_freq=True),
    "bag": lambda table: F.embedding_bag(TOKENS, table, mode="mean"),
}


@pytest.mark.parametrize("policy", NARROW)
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_by_hand_are_widened_rows(name, policy, same_bits):
    torch.manual_seed(0)
    model = dt.cast(Call(LOOKUPS[name]), f"{policy},output={policy}")
    seen = []
    model.call = lambda table: seen.append(LOOKUPS[name](table)) or seen[-1]
    model()
    with torch.no_grad():
        model()
    table = model.table.detach().float().requires_grad_()
    expected = LOOKUPS[name](table)
    assert all(same_bits(rows.detach(), expected.detach()) for rows in seen)
    seen[0].sum().backward()
    expected.sum().backward()
    assert torch.equal(model.table.grad.to_dense(), table.grad.to_dense().to(NARROW[policy]))


def test_gradients_are_as_near_as_autocasts_in_a_deep_model():
    exact = gradients(make(None, 16).double(), TOKENS)

    def error(model: nn.Module) -> float:
        pairs = zip(gradients(model, TOKENS), exact, strict=True)
        return statistics.median(((got - want).norm() / want.norm()).item() for got, want in pairs)

    with torch.autocast("cpu", torch.bfloat16):
        of_autocast = error(make(None, 16))
    assert error(make("bf16", 16)) < 1.2 * of_autocast
    assert error(make("bf16,residual=compute", 16)) > 1.3 * of_autocast


@pytest.mark.parametrize("policy", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_it_is_the_same_checkpointed_compiled_copied_and_pickled(policy):
    model = make(policy)
    expected = gradients(model, TOKENS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.compiler.reset()
    others = {
        "copied": copy.deepcopy(model),
        "pickled": torch.load(file, weights_only=False),
        "compiled": torch.compile(model, backend="eager", fullgraph=True),
    }
    for name, other in others.items():
        assert all(map(torch.equal, gradients(other, TOKENS), expected)), name
    model.checkpoint = True
    assert all(map(torch.equal, gradients(model, TOKENS), expected))


def test_a_checkpoint_that_has_positions_in_16_bits_is_converted(tmp_path, same_bits):
    model = make("bf16")
    # as versions without the role stored it
    before = make("bf16,residual=compute")
    for module in before.modules():
        if hasattr(module.forward, "policy"):
            module.forward.policy = dt.policy_of(model)
    masters = dt.master_weights(before)
    dt.save_checkpoint(tmp_path / "last", before)
    with pytest.raises(CheckpointError, match="convert=True"):
        dt.load_checkpoint(tmp_path / "last", model)
    dt.load_checkpoint(tmp_path / "last", model, convert=True)
    assert all(same_bits(master, masters[name]) for name, master in dt.master_weights(model).items())
