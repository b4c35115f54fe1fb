"""The Python around casting: calls that a forward pass, and the backward pass after it, make in Python and in C.

    python benchmarks/overhead.py             # checks, counts, writes results/overhead.json, fills docs/evidence.md
    python benchmarks/overhead.py --tables    # fills docs/evidence.md from the results that are there

The arms, each with its own model from the same seed:

- `fp32`: FP32 throughout.
- `torch.amp bf16`: forward pass and loss under `torch.autocast`.
- `bf16`: `dt.cast(model, "bf16")`.
- `dt.autocast bf16`: FP32 weights, forward pass and loss under `dt.autocast`.

A call is what `sys.setprofile` reports: one of a function in Python, or one that Python makes of a function in C.
Unlike time, their number is the same on every machine; it is not the same for every version of torch and Python.
Tensors are small, for their size does not matter. Hugging Face's GPT-2 is left out where transformers is not installed.
"""

import gc
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import report
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 12, 64, 4, 8, 128
ARMS = ("fp32", "torch.amp bf16", "bf16", "dt.autocast bf16")
PEER = "torch.amp bf16"

# a model, and its loss
Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


class Block(nn.Module):
    """A pre-norm transformer block as nanoGPT writes it: one projection to queries, keys and values, views, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv, self.to_residual = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to the same."""
        rows, length, width = x.size()
        q, k, v = self.to_qkv(self.attention_norm(x)).split(width, dim=2)
        q = q.view(rows, length, HEADS, width // HEADS).transpose(1, 2)
        k = k.view(rows, length, HEADS, width // HEADS).transpose(1, 2)
        v = v.view(rows, length, HEADS, width // HEADS).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_residual(attended.transpose(1, 2).contiguous().view(rows, length, width))
        return x + self.down(self.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    """A decoder of 12 blocks, with tied embeddings; gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map tokens (B, T) and those that follow them to a scalar."""
        hidden = self.tokens(x) + self.positions(torch.arange(x.size(1), device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))


def decoder() -> Case:
    """Return the decoder and its loss."""
    tokens = torch.arange(CONTEXT + 1)[None]
    return Decoder(), lambda model: model(tokens[:, :-1], tokens[:, 1:])


def gpt2() -> Case:
    """Return Hugging Face's GPT-2 of the same size and its loss."""
    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    tokens = torch.arange(CONTEXT)[None]
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return model, lambda model: model(input_ids=tokens, labels=tokens).loss


def mlp() -> Case:
    """Return an MLP for digits, 64 wide, and its loss."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.linspace(-1, 1, 32 * 64).view(32, 64), torch.arange(32) % 10
    return model, lambda model: F.cross_entropy(model(x), y)


CASES: Mapping[str, Callable[[], Case]] = MappingProxyType(
    {"decoder, 12 layers": decoder, "Hugging Face GPT-2, 12 layers": gpt2, "MLP, 64 wide": mlp}
)


def is_here(name: str) -> bool:
    """Return whether the library that a model comes from is installed."""
    return not name.startswith("Hugging Face") or find_spec("transformers") is not None


def losses(name: str) -> dict[str, Callable[[], Tensor]]:
    """Return what computes a model's loss in each arm."""
    made: dict[str, Callable[[], Tensor]] = {}
    for arm in ARMS:
        torch.manual_seed(0)
        model, loss_of = CASES[name]()
        made[arm] = _in_arm(arm, model, loss_of)
    return made


def _in_arm(arm: str, model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Callable[[], Tensor]:
    if arm == "bf16":
        dt.cast(model, arm)
    if arm in ("fp32", "bf16"):
        return lambda: loss_of(model)
    autocast = torch.autocast if arm == PEER else dt.autocast

    def loss() -> Tensor:
        with autocast("cpu", torch.bfloat16):
            return loss_of(model)

    return loss


def calls(function: Callable[[], object]) -> tuple[int, int]:
    """Return how many functions in Python, and how many in C, Python code calls in a function."""
    in_python = in_c = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal in_python, in_c
        in_python += event == "call"
        in_c += event == "c_call"

    before = sys.getprofile()
    # finalizers of garbage would be counted
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
        gc.enable()
    # `function` itself, and the call that takes the profiler away
    return in_python - 1, in_c - 1


def counts(loss: Callable[[], Tensor]) -> dict[str, int]:
    """Return the calls of a forward pass, and of a forward and a backward pass, after two of them."""
    for _ in range(2):
        loss().backward()
    forward = calls(loss)
    both = calls(lambda: loss().backward())
    return {
        "forward_python": forward[0],
        "forward_c": forward[1],
        "both_python": both[0],
        "both_c": both[1],
    }


def check(arms: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Check that every loss is near FP32's.

    Raises:
        SystemExit: one is not; nothing is counted then.
    """
    values = {arm: loss().item() for arm, loss in arms.items()}
    distances = {arm: abs(value - values["fp32"]) / values["fp32"] for arm, value in values.items()}
    if max(distances.values()) > 1e-2:
        raise SystemExit(f"losses {values}; allowed is 1 % from FP32's; nothing was counted")
    return distances


def measure(device: str, seconds: float) -> dict[str, Any]:
    """Check, then count calls for every model that is here; counts need neither a device's name nor time."""
    results: dict[str, Any] = {"models": {}, "distance_of_loss_to_fp32": {}}
    for name in filter(is_here, CASES):
        print(name, flush=True)
        arms = losses(name)
        results["distance_of_loss_to_fp32"][name] = check(arms)
        results["models"][name] = {arm: counts(loss) for arm, loss in arms.items()}
    libraries = {"torch": version("torch")}
    if find_spec("transformers") is not None:
        libraries["transformers"] = version("transformers")
    return {**results, "libraries": libraries}


def tables(results: dict[str, Any]) -> str:
    """Return the table of docs/evidence.md in Markdown."""
    lines = [
        "| model | arm | forward: in Python, in C | forward, backward: in Python, in C | in Python, of torch.amp's |",
        "|---|---|---|---|---|",
    ]
    for name, arms in results["models"].items():
        for arm, made in arms.items():
            ratio = made["both_python"] / arms[PEER]["both_python"]
            cells = (name, f"`{arm}`", "{forward_python}, {forward_c}", "{both_python}, {both_c}", f"{ratio:.2f}")
            lines.append(f"| {' | '.join(cells)} |".format(**made))
    absent = [name for name in CASES if name not in results["models"]]
    said = f"\nNot counted here: {', '.join(absent)} (transformers is not installed).\n" if absent else ""
    libraries = ", ".join(f"{library} {number}" for library, number in results["libraries"].items())
    command = "python benchmarks/overhead.py"
    return "\n".join(lines) + f"\n{said}\n" + report.provenance(results["machine"], command, libraries)


def main() -> None:
    """Run as the command line says."""
    report.run("overhead", __doc__, measure, tables, 0.0)


if __name__ == "__main__":
    main()
