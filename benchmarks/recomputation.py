"""Gradients with and without activation checkpointing, of models that use one tensor in several checkpointed parts.

    python benchmarks/recomputation.py             # needs transformers; prints a table
    python benchmarks/recomputation.py --seeds 4

Tiny models of transformers with random weights, trained for one backward pass. For each model and arm the median over
parameters of the distance of a gradient from FP64's (of the models with experts, whose kernels take no FP64, from
FP32's), its median over seeds, and with each kind of `torch.utils.checkpoint`: the geometric mean of its ratio to that
without, and how many parameters' gradients differ in a bit. `fp32` has no policy and no autocast: what differs there is
not of Duotone's making.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Callable

import torch
import transformers as hf  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

import duotone.torch as dt

ARMS = ("fp32", "torch.amp bf16", "bf16")
_SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_local_experts": 4,
}


def _t5(implementation: str, **settings: int) -> nn.Module:
    config = hf.T5Config(**{**_SIZES, **settings}, decoder_start_token_id=0)
    model = hf.T5ForConditionalGeneration(config)
    model.set_attn_implementation(implementation)
    return model


def _mixtral(with_router_loss: bool) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, output_router_logits=with_router_loss))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "T5": lambda: _t5("sdpa"),
    "T5, eager attention": lambda: _t5("eager"),
    "T5, eager, 24 decoder layers": lambda: _t5("eager", num_decoder_layers=24),
    "LongT5": lambda: hf.LongT5ForConditionalGeneration(
        hf.LongT5Config(**_SIZES, decoder_start_token_id=0, local_radius=7)
    ),
    "Switch": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(**_SIZES, decoder_start_token_id=0, num_experts=4)
    ),
    "Mixtral": lambda: _mixtral(False),
    "Mixtral, router loss": lambda: _mixtral(True),
}


def gradients(model: nn.Module, arm: str, kind: bool | None, seed: int) -> dict[str, Tensor]:
    """Return the gradients of a copy of a model in an arm; `kind` is `use_reentrant`, None without checkpointing."""
    model = copy.deepcopy(model)
    if arm == "fp64":
        model.double()
    elif arm == "bf16":
        dt.cast(model, arm)
    if kind is not None:
        model.gradient_checkpointing_enable({"use_reentrant": kind})  # type: ignore[operator]
    torch.manual_seed(1000 + seed)
    tokens, labels = torch.randint(1, 64, (4, 16)), torch.randint(1, 64, (4, 12))
    # a cache of keys and values, which checkpointing does without, has other sums
    given = {"input_ids": tokens, "use_cache": False}
    is_two = model.config.is_encoder_decoder  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16, enabled=arm == "torch.amp bf16"):
        loss = model(**given, labels=labels if is_two else tokens).loss
    loss.backward()
    return {name: param.grad.double() for name, param in model.named_parameters() if param.grad is not None}


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the median distance of gradients from exact ones, relative to each one's norm."""
    return statistics.median(((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact)


def measure(name: str, seeds: int) -> list[str]:
    """Return the rows of a model's table."""
    errors: dict[tuple[str, bool | None], list[float]] = {}
    differing: dict[tuple[str, bool], int] = {}
    total = 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = MODELS[name]().train()
        exact = gradients(model, "fp32" if "experts" in str(model) else "fp64", None, seed)
        total = len(exact)
        for arm in ARMS:
            plain = gradients(model, arm, None, seed)
            errors.setdefault((arm, None), []).append(error(plain, exact))
            for kind in (False, True):
                found = gradients(model, arm, kind, seed)
                errors.setdefault((arm, kind), []).append(error(found, exact))
                count = sum(not torch.equal(found[each], plain[each]) for each in exact)
                differing[arm, kind] = max(count, differing.get((arm, kind), 0))
    rows = []
    for arm in ARMS:
        cells = [name, f"`{arm}`", f"{statistics.median(errors[arm, None]):.2e}"]
        for kind in (False, True):
            pairs = zip(errors[arm, kind], errors[arm, None], strict=True)
            ratios = [one / other for one, other in pairs if one and other]
            ratio = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else 1.0
            cells.append(f"{ratio:.3f}, {differing[arm, kind]} of {total}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=24)
    arguments = parser.parse_args()
    hf.logging.set_verbosity_error()
    print("| model | arm | error | non-reentrant: error and gradients that differ | reentrant |\n|---|---|---|---|---|")
    for name in MODELS:
        for row in measure(name, arguments.seeds if "24" not in name else max(arguments.seeds // 6, 1)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
