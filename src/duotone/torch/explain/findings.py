"""What stands out of an explanation, a sentence each: what was seen, how much of it, what to do.

Only what matters is said: at least 1 MB, or a share of what the model saves for its backward pass. Where a rule of the
policy asks for FP32, FP32 is no finding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from duotone.policy import Policy
from duotone.torch.explain.explanation import OUTSIDE, Cast, Explanation, RepeatedCast
from duotone.torch.explain.siblings import group_siblings, paths_of_groups
from duotone.torch.explain.wording import SIXTEEN_BITS, count, label, listed, size

PRODUCTS = frozenset(
    {
        "linear",
        "bilinear",
        "matmul",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addmv",
        "addbmm",
        "baddbmm",
        "einsum",
        "tensordot",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "scaled_dot_product_attention",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "lstm_cell",
        "gru_cell",
    }
)
NOTHING = "nothing stands out: every dtype is where the policy puts it"
_LARGE_BYTES = 1_000_000
_MOST = 3


class _Alike(NamedTuple):
    """In what repeated casts are the same if one sentence is to speak of all of them."""

    from_dtype: str
    to_dtype: str
    times: int
    name: str | None
    modules: tuple[str, ...]
    places: tuple[str, ...]


Key = TypeVar("Key")
Value = TypeVar("Value")


def with_findings(explanation: Explanation) -> Explanation:
    """Return the explanation with the sentences about it, the gravest first."""
    if not explanation.operations:
        found = ["no operation on floating-point numbers ran: call the model with a batch, or call it inside run"]
    elif explanation.policy is None:
        found = [*_without_policy(explanation), *_repeated(explanation)]
    else:
        found = [
            *_products_in_float32(explanation),
            *_parameters_in_float32(explanation),
            *_residual_in_float32(explanation),
            *_outputs(explanation),
            *_repeated(explanation),
            *_upcasts(explanation),
            *_saved_in_float32(explanation),
        ]
    return replace(explanation, findings=tuple(found or [NOTHING]))


def _without_policy(explanation: Explanation) -> Iterator[str]:
    computed = {operation.compute_dtype for operation in explanation.operations}
    if any(cast.by == "autocast" for cast in explanation.casts):
        number = sum(cast.calls for cast in explanation.casts if cast.by == "autocast")
        written = sum(cast.result_bytes for cast in explanation.casts if cast.by == "autocast")
        yield (
            f"torch.autocast made {count(number, 'cast')} in this pass, {size(written)}, those of weights again in "
            'every pass; dt.cast(model, "bf16") casts the weights once'
        )
    elif computed <= {"float32", "float64"}:
        yield (
            "the model is under no policy and computes in FP32; see what changes after "
            'dt.cast(model, "bf16"), or with --policy bf16'
        )


def _outputs(explanation: Explanation) -> Iterator[str]:
    wide = [each for each in explanation.outputs if each.dtype == "float32" and each.computed_dtype in SIXTEEN_BITS]
    written = sum(each.result_bytes for each in wide)
    if wide and _is_large(written, explanation, share=0.1):
        narrow = wide[0].computed_dtype
        shape = " x ".join(map(str, max(wide, key=lambda each: each.result_bytes).shape))
        results = "the result leaves" if len(wide) == 1 else f"{len(wide)} results leave"
        yield (
            f"{results} the model in FP32 although computed in {label(narrow)}: {size(written)} ({shape}); "
            f"with output={narrow} in the policy it takes half, with the loss inside the model nothing"
        )


def _repeated(explanation: Explanation) -> Iterator[str]:
    shown = _shown(explanation)
    alike: defaultdict[_Alike, list[RepeatedCast]] = defaultdict(list)
    for each in explanation.repeated_casts:
        modules = tuple(dict.fromkeys(shown[path] for path in each.modules))
        name = each.name and _shown_parameter(each.name, shown)
        alike[_Alike(each.from_dtype, each.to_dtype, each.times, name, modules, each.places)].append(each)
    for key, group in _largest(alike, lambda each: each.wasted_bytes):
        wasted = sum(each.wasted_bytes for each in group)
        if not _is_large(wasted, explanation, share=0.01):
            continue
        tensor = f"the same tensor ({key.name})" if key.name else "the same tensor"
        tensors = f", {len(group)} such tensors" if len(group) > 1 else ""
        yield (
            f"{key.times} casts of {tensor} from {label(key.from_dtype)} to {label(key.to_dtype)} in "
            f"{_listed_modules(key.modules)}{_at(key.places)}{tensors}: {size(wasted)} written again; "
            "cast it once before, and use that copy"
        )


def _products_in_float32(explanation: Explanation) -> Iterator[str]:
    shown, asked = _shown(explanation), _computes(explanation)
    calls: defaultdict[str, int] = defaultdict(int)
    names, places = dict[str, None](), dict[str, None]()
    for operation in explanation.operations:
        if operation.name not in PRODUCTS or operation.compute_dtype != "float32":
            continue
        for path, number in operation.modules.items():
            if asked.get(path) in SIXTEEN_BITS:
                calls[shown[path]] += number
                names[operation.name] = None
                places.update(dict.fromkeys(operation.places))
    if calls:
        advice = "look there for .float(), autocast(enabled=False) or a product with an FP32 tensor"
        if "float16" in asked.values():
            advice = "a CPU without FP16 products runs them so; anywhere else " + advice
        yield (
            f"{count(sum(calls.values()), 'matrix product')} ({listed(names)}) ran in FP32 in {_listed_modules(calls)}"
            f"{_at(places)} although the policy computes in 16 bits; {advice}"
        )


def _parameters_in_float32(explanation: Explanation) -> Iterator[str]:
    shown, found = _shown(explanation), dict[str, None]()
    number = 0
    for module in explanation.modules:
        is_norm = "norm" in module.type.lower() or "norm" in module.path.rpartition(".")[2].lower()
        wants = module.policy is not None and Policy.parse(module.policy).param in SIXTEEN_BITS
        if wants and not is_norm and "float32" in module.parameter_dtypes:
            number += 1
            found[f"{shown[module.path] or 'the model'} ({module.type})"] = None
    if found:
        modules = "1 module that is no norm has" if number == 1 else f"{number} modules that are no norms have"
        yield (
            f"{modules} FP32 parameters although the policy keeps them in 16 bits: {listed(found)}; cast the model "
            "after its last change, or say by a rule that FP32 is meant"
        )


def _residual_in_float32(explanation: Explanation) -> Iterator[str]:
    shown, asked = _shown(explanation), _computes(explanation)
    calls, places = 0, dict[str, None]()
    modules = dict[str, None]()
    for operation in explanation.operations:
        if operation.name == "add" and operation.mixed and operation.output_dtype == "float32":
            inside = {path: number for path, number in operation.modules.items() if asked.get(path) in SIXTEEN_BITS}
            calls += sum(inside.values())
            modules.update((shown[path], None) for path in inside)
            places.update(dict.fromkeys(operation.places) if inside else {})
    if calls:
        yield (
            f"{count(calls, 'addition')} of a 16-bit and an FP32 tensor gave FP32 in {_listed_modules(modules)}"
            f"{_at(places)}: a residual stream in FP32 takes twice the bytes and a cast before every layer; cast the "
            "FP32 side once where it begins, unless FP32 is meant"
        )


def _upcasts(explanation: Explanation) -> Iterator[str]:
    shown = _shown(explanation)
    groups: defaultdict[tuple[str | None, str, str | None], list[Cast]] = defaultdict(list)
    for cast in explanation.casts:
        if cast.by in ("model", "torch") and cast.from_dtype in SIXTEEN_BITS and cast.to_dtype == "float32":
            groups[cast.place, cast.from_dtype, cast.operation if cast.by == "torch" else None].append(cast)
    for (place, from_dtype, operation), casts in _largest(groups, lambda cast: cast.result_bytes):
        written = sum(cast.result_bytes for cast in casts)
        if not _is_large(written, explanation, share=0.01):
            continue
        who, advice = "the model's own code", "drop it: the policy keeps FP32 inside the operations that need it"
        if operation is not None:
            who, advice = f"torch's {operation} by itself", "call another operation"
        yield (
            f"{who} casts {label(from_dtype)} to FP32{_at([place])} in "
            f"{_listed_modules(shown[cast.module] for cast in casts)}: "
            f"{count(sum(cast.calls for cast in casts), 'cast')}, {size(written)}; leave it if FP32 is meant there, or "
            f"{advice}"
        )


def _saved_in_float32(explanation: Explanation) -> Iterator[str]:
    total = sum(explanation.saved_activation_bytes.values())
    wide = explanation.saved_activation_bytes.get("float32", 0)
    if Policy.parse(explanation.policy or "").compute not in SIXTEEN_BITS or not total or wide < 0.1 * total:
        return
    by_module = {group.path or "the model": group.saved_bytes for group in group_siblings(explanation.modules)}
    by_module[OUTSIDE] = explanation.saved_outside_bytes
    shares = {path: saved["float32"] for path, saved in by_module.items() if saved.get("float32")}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_MOST]
    yield (
        f"FP32 is {wide / total:.0%} of what is saved for backward, {size(wide)} of {size(total)}; the largest parts: "
        f"{', '.join(f'{path} ({size(number)})' for path, number in largest)}; look for casts to FP32 there"
    )


def _is_large(number: int, explanation: Explanation, share: float) -> bool:
    return number >= min(_LARGE_BYTES, share * sum(explanation.saved_activation_bytes.values()))


def _computes(explanation: Explanation) -> dict[str, str]:
    """Return what each module's policy computes in, by path."""
    parsed = {text: Policy.parse(text).compute for text in {each.policy for each in explanation.modules} if text}
    return {each.path: parsed[each.policy] for each in explanation.modules if each.policy}


def _shown(explanation: Explanation) -> dict[str, str]:
    return paths_of_groups(explanation.modules) | {OUTSIDE: OUTSIDE}


def _shown_parameter(name: str, shown: dict[str, str]) -> str:
    path, _, own = name.rpartition(".")
    return f"{shown.get(path, path)}.{own}".lstrip(".")


def _listed_modules(paths: Iterable[str]) -> str:
    return listed((path or "the model" for path in paths), most=2)


def _at(places: Iterable[str | None]) -> str:
    text = listed((place for place in places if place is not None), most=2)
    return f" at {text}" if text else ""


def _largest(groups: Mapping[Key, list[Value]], weigh: Callable[[Value], int]) -> list[tuple[Key, list[Value]]]:
    return sorted(groups.items(), key=lambda item: -sum(map(weigh, item[1])))[:_MOST]
