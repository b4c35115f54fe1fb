"""What stands out of an explanation, a sentence each: what was seen, how much of it, what to do.

Only what matters is said: at least 1 MB, or a share of what the model saves for its backward pass. Where a rule of the
policy asks for FP32, FP32 is no finding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from duotone.policy import Policy
from duotone.torch.explanation.explanation import NO_HALF, OUTSIDE, Cast, Explanation, Operation, RepeatedCast, Widening
from duotone.torch.explanation.siblings import group_siblings, paths_of_groups
from duotone.torch.explanation.wording import SIXTEEN_BITS, count, label, listed, size

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
_ATTENTION = frozenset({"bmm", "baddbmm", "matmul", "scaled_dot_product_attention"})
NOTHING = "nothing stands out: every floating-point dtype is where the policy puts it"
_LARGE_BYTES = 1_000_000
# FP32 in what is saved is worth a word from 1 MB on, or where it is much of what is more than a toy
_SHARE, _MUCH, _TOY_BYTES = 0.1, 0.3, 64_000
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
            *_no_half_products(explanation),
            *_attention_in_float32(explanation),
            *_parameters_in_float32(explanation),
            *_first_widening(explanation),
            *_residual_in_float32(explanation),
            *_rounded_and_widened(explanation),
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
        yield ('the model is under no policy and computes in FP32; see what changes after dt.cast(model, "bf16")')


def _outputs(explanation: Explanation) -> Iterator[str]:
    wide = [
        each
        for each in explanation.outputs
        if each.dtype == "float32" and each.computed_dtype in SIXTEEN_BITS and each.rounded_in is None
    ]
    written = sum(each.result_bytes for each in wide)
    if wide and _is_large(written, explanation, share=0.1):
        narrow = wide[0].computed_dtype
        shape = " x ".join(map(str, max(wide, key=lambda each: each.result_bytes).shape))
        results = "the result leaves" if len(wide) == 1 else f"{len(wide)} results leave"
        yield (
            f"{results} the model in FP32 although computed in {label(narrow)}: {size(written)} ({shape}); "
            f"with output={narrow} in the policy it takes half, with the loss inside the model nothing"
        )


def _rounded_and_widened(explanation: Explanation) -> Iterator[str]:
    for each in explanation.outputs:
        if each.rounded_in is not None and each.dtype == "float32" and each.computed_dtype in SIXTEEN_BITS:
            yield (
                f"the FP32 result of {each.rounded_in} is rounded to {label(each.computed_dtype)} at its border and "
                f'widened again at the model\'s; write "{each.rounded_in}: ...,output=float32" in the policy'
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
        if not _is_product_in_float32(operation) or operation.reason is not None:
            continue
        for path, number in operation.modules.items():
            if asked.get(path) in SIXTEEN_BITS:
                calls[shown[path]] += number
                names[operation.name] = None
                places.update(dict.fromkeys(operation.places))
    if calls:
        advice = "look there for .float(), autocast(enabled=False) or a product with an FP32 tensor"
        yield (
            f"{count(sum(calls.values()), 'matrix product')} ({listed(names)}) ran in FP32 in {_listed_modules(calls)}"
            f"{_at(places)} although the policy computes in 16 bits; {advice}"
        )


def _is_product_in_float32(operation: Operation) -> bool:
    return operation.name in PRODUCTS and operation.compute_dtype == "float32"


def _no_half_products(explanation: Explanation) -> Iterator[str]:
    number = sum(
        each.calls for each in explanation.operations if _is_product_in_float32(each) and each.reason == NO_HALF
    )
    casts = sum(cast.calls for cast in explanation.emulated_casts)
    written = sum(cast.result_bytes for cast in explanation.emulated_casts)
    if number:
        yield (
            f"this CPU has no FP16 products: {number:,} ran in FP32; their {count(casts, 'cast')} ({size(written)}) "
            "would not be there on a GPU"
        )


def _widened_by_torch(explanation: Explanation) -> dict[str, dict[str, None]]:
    """Return the products that torch itself computes in FP32 inside of a layer or an attention, by module."""
    asked = _computes(explanation)
    found: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for operation in explanation.operations:
        if _is_product_in_float32(operation) and operation.reason == "torch":
            for path in operation.modules:
                if asked.get(path) in SIXTEEN_BITS:
                    found[path][operation.name] = None
    return found


def _attention_in_float32(explanation: Explanation) -> Iterator[str]:
    shown, found = _shown(explanation), _widened_by_torch(explanation)
    if not found:
        return
    names = dict.fromkeys(name for names in found.values() for name in names)
    saved = sum(each.saved_bytes.get("float32", 0) for each in explanation.modules if each.path in found)
    attention = " (attention with dropout has no fused kernel on a CPU)" if _ATTENTION.intersection(names) else ""
    yield (
        f"torch computes {listed(names)} in FP32 by itself in "
        f"{_listed_modules(dict.fromkeys(shown[path] for path in found))}{attention}: {size(saved)} saved"
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


def _widenings(explanation: Explanation) -> list[Widening]:
    asked = _computes(explanation)
    return [each for each in explanation.widenings if asked.get(each.module) in SIXTEEN_BITS]


def _is_residual(each: Widening) -> bool:
    """Return whether a widening is two results being added, and not one and a buffer."""
    return each.operation == "add" and each.is_stream and each.name is None


def _first_widening(explanation: Explanation) -> Iterator[str]:
    large = [each for each in _widenings(explanation) if _is_large(each.result_bytes, explanation, share=0.01)]
    if not large or _is_residual(large[0]):
        return
    first, shown = large[0], _shown(explanation)
    named, what = "", "the FP32 one"
    if first.name is not None:
        kind, what = "buffer" if first.is_buffer else "parameter", "it"
        named = f" (the {kind} {_shown_parameter(first.name, shown)})"
    yield (
        f"the stream becomes FP32 in {_listed_modules([shown[first.module]])}{_at([first.place])}: "
        f"{first.operation} of {label(first.from_dtype)} and FP32{named}; cast {what} where it is used, .to(x.dtype)"
    )


def _residual_in_float32(explanation: Explanation) -> Iterator[str]:
    shown = _shown(explanation)
    found = [each for each in _widenings(explanation) if _is_residual(each)]
    if found:
        yield (
            f"{count(sum(each.calls for each in found), 'addition')} of a 16-bit and an FP32 tensor gave FP32 in "
            f"{_listed_modules(dict.fromkeys(shown[each.module] for each in found))}"
            f"{_at(each.place for each in found)}: a residual stream in FP32 takes twice the bytes and a cast before "
            "every layer; cast the FP32 side once where it begins, unless FP32 is meant"
        )


def _upcasts(explanation: Explanation) -> Iterator[str]:
    shown, by_torch = _shown(explanation), _widened_by_torch(explanation)
    groups: defaultdict[tuple[str | None, str, str | None], list[Cast]] = defaultdict(list)
    for cast in explanation.casts:
        widened = by_torch.get(cast.module)
        if cast.by == "torch" and widened and cast.operation in ("multi_head_attention_forward", *widened):
            continue
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
    if Policy.parse(explanation.policy or "").compute not in SIXTEEN_BITS:
        return
    asked, by_torch = _computes(explanation), _widened_by_torch(explanation)
    shares: dict[str, int] = {}
    for group in group_siblings(explanation.modules):
        for module in group.members:
            # what a rule or keep_float32 asks for is meant, and what torch does by itself has been said
            meant = asked.get(module.path) == "float32" or module.path in by_torch
            wide = 0 if meant else module.saved_bytes.get("float32", 0) - module.kept_float32_bytes
            if wide:
                path = group.path or "the model"
                shares[path] = shares.get(path, 0) + wide
    outside = explanation.saved_outside_bytes.get("float32", 0)
    if outside:
        shares[OUTSIDE] = outside
    total, wide = sum(explanation.saved_activation_bytes.values()), sum(shares.values())
    if not (wide >= max(_LARGE_BYTES, _SHARE * total) or wide >= max(_TOY_BYTES, _MUCH * total)):
        return
    all_wide = explanation.saved_activation_bytes["float32"]
    rest = f", without {size(all_wide - wide)} that is meant or named above" if all_wide > wide else ""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_MOST]
    yield (
        f"FP32 is {wide / total:.0%} of what is saved for backward, {size(wide)} of {size(total)}{rest}; the largest "
        f"parts: {', '.join(f'{path} ({size(number)})' for path, number in largest)}; look for casts to FP32 there"
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
