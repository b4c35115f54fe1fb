"""What stands out of an explanation, a sentence each: what was seen, how much of it, what to do.

Only what matters is said: at least 1 MB, or a share of what the model saves for its backward pass. Where a rule of the
policy asks for FP32, FP32 is no finding.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from duotone.policy import Policy
from duotone.torch.explanation.explanation import Explanation
from duotone.torch.explanation.records import NO_HALF, OUTSIDE, ModuleDtypes, RepeatedCast, Widening
from duotone.wording.findings import NOTHING, wide_results
from duotone.wording.groups import paths_of_groups
from duotone.wording.records import Cast, Operation, amount, largest
from duotone.wording.words import SIXTEEN_BITS, at, count, first_few, label, size

_ATTENTION = frozenset({"bmm", "baddbmm", "matmul", "scaled_dot_product_attention"})
_LARGE_BYTES = 1_000_000
# FP32 in what is saved is worth a word from 1 MB on, or where it is much of what is more than a toy
_SHARE, _MUCH, _TOY_BYTES = 0.1, 0.3, 64_000
_MOST = 3


def findings_of(
    explanation: Explanation, policy: Policy | None, policies: Mapping[str, Policy], wide: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Return the sentences about an explanation, the gravest first.

    Args:
        explanation: without findings.
        policy: that the model was cast to, or None.
        policies: of the modules that are under one, by path, rules applied.
        wide: the modules whose FP32 parameters are meant.
    """
    if not explanation.operations:
        return ("no operation on floating-point numbers ran: call the model with a batch, or call it inside run",)
    run = _Run(explanation, policy, policies, wide)
    checks = (_without_policy, _repeated)
    if policy is not None:
        checks = (
            _products_in_float32,
            _no_half_products,
            _attention_in_float32,
            _parameters_in_float32,
            _first_widening,
            _residual_in_float32,
            _rounded_and_widened,
            _outputs,
            _repeated,
            _upcasts,
            _saved_in_float32,
        )
    return tuple(finding for check in checks for finding in check(run)) or (NOTHING,)


@dataclass(frozen=True)
class _Run:
    """An explanation, and what several findings ask of it."""

    explanation: Explanation
    policy: Policy | None
    policies: Mapping[str, Policy]
    wide: frozenset[str]

    @cached_property
    def group_paths(self) -> dict[str, str]:
        """The path of the group of each module, by path."""
        return {**paths_of_groups(self.explanation.modules), OUTSIDE: OUTSIDE}

    @cached_property
    def widened_by_torch(self) -> dict[str, dict[str, None]]:
        """The products that torch itself computes in FP32 inside of a layer or an attention, by module."""
        names: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for operation in self.explanation.operations:
            if _is_product_in_float32(operation) and operation.reason == "torch":
                for path in filter(self.is_narrow, operation.modules):
                    names[path][operation.name] = None
        return names

    @cached_property
    def widenings(self) -> list[Widening]:
        """Those in modules that are to compute in 16 bits."""
        return [each for each in self.explanation.widenings if self.is_narrow(each.module)]

    def is_narrow(self, path: str) -> bool:
        """Return whether a module's policy computes in 16 bits."""
        return path in self.policies and self.policies[path].compute in SIXTEEN_BITS

    def has_wide_stream(self, path: str) -> bool:
        """Return whether a module's policy asks for a residual stream in FP32."""
        return path in self.policies and self.policies[path].residual == "float32"

    def is_large(self, number: int, share: float) -> bool:
        """Return whether bytes are worth a sentence: many, or at least a share of what is saved for backward."""
        return number >= min(_LARGE_BYTES, share * self.explanation.saved_for_backward.total_activation_bytes)

    def names_of(self, paths: Iterable[str]) -> str:
        """Return modules as a sentence names them, those that are alike as one."""
        return first_few((self.group_paths[path] or "the model" for path in paths), most=2)

    def tensor_name(self, name: str) -> str:
        """Return a parameter's or a buffer's name, that of its module as it is shown."""
        path, _, own = name.rpartition(".")
        return f"{self.group_paths.get(path, path)}.{own}".lstrip(".")


def _without_policy(run: _Run) -> Iterator[str]:
    casts = [cast for cast in run.explanation.casts if cast.by == "autocast"]
    if casts:
        number, bytes_written = amount(casts)
        yield (
            f"torch.autocast made {number} in this pass, {bytes_written}, those of weights again in "
            'every pass; dt.cast(model, "bf16") casts the weights once'
        )
    elif {operation.compute_dtype for operation in run.explanation.operations} <= {"float32", "float64"}:
        yield ('the model is under no policy and computes in FP32; see what changes after dt.cast(model, "bf16")')


def _outputs(run: _Run) -> Iterator[str]:
    wide = [
        each
        for each in run.explanation.outputs
        if each.dtype == "float32" and each.computed_dtype in SIXTEEN_BITS and each.rounded_in is None
    ]
    if wide and run.is_large(sum(each.result_bytes for each in wide), share=0.1):
        yield wide_results(wide, "model")


def _rounded_and_widened(run: _Run) -> Iterator[str]:
    for each in run.explanation.outputs:
        if each.rounded_in is not None and each.dtype == "float32" and each.computed_dtype in SIXTEEN_BITS:
            yield (
                f"the FP32 result of {each.rounded_in} is rounded to {label(each.computed_dtype)} at its border and "
                f'widened again at the model\'s; write "{each.rounded_in}: ...,output=float32" in the policy'
            )


def _repeated(run: _Run) -> Iterator[str]:
    # one sentence speaks of all that are the same in what it says
    alike: defaultdict[tuple[str, str], list[RepeatedCast]] = defaultdict(list)
    for each in run.explanation.repeated_casts:
        named = f" ({run.tensor_name(each.name)})" if each.name else ""
        what = f"{each.times} casts of the same tensor{named} from {label(each.from_dtype)} to {label(each.to_dtype)}"
        alike[what, f"{run.names_of(each.modules)}{at(each.source_lines)}"].append(each)
    for (what, where), group in largest(alike, lambda each: each.wasted_bytes):
        wasted_bytes = sum(each.wasted_bytes for each in group)
        if run.is_large(wasted_bytes, share=0.01):
            tensors = f", {len(group)} such tensors" if len(group) > 1 else ""
            again = f"{size(wasted_bytes)} written again"
            yield f"{what} in {where}{tensors}: {again}; cast it once before, and use that copy"


def _products_in_float32(run: _Run) -> Iterator[str]:
    calls: Counter[str] = Counter()
    names, source_lines = dict[str, None](), dict[str, None]()
    for operation in run.explanation.operations:
        modules = Counter({path: number for path, number in operation.modules.items() if run.is_narrow(path)})
        if modules and _is_product_in_float32(operation) and operation.reason is None:
            calls += modules
            names[operation.name] = None
            source_lines.update(dict.fromkeys(operation.source_lines))
    if calls:
        yield (
            f"{count(calls.total(), 'product')} ({first_few(names)}) ran in FP32 in {run.names_of(calls)}"
            f"{at(source_lines)} although the policy computes in 16 bits; look there for .float(), "
            "autocast(enabled=False) or a product with an FP32 tensor"
        )


def _is_product_in_float32(operation: Operation) -> bool:
    return operation.kind == "compute" and operation.compute_dtype == "float32"


def _no_half_products(run: _Run) -> Iterator[str]:
    products = [each for each in run.explanation.operations if _is_product_in_float32(each) and each.reason == NO_HALF]
    if products:
        casts, bytes_written = amount(run.explanation.emulated_casts)
        yield (
            f"this CPU has no FP16 products: {sum(each.calls for each in products):,} ran in FP32; their {casts} "
            f"({bytes_written}) would not be there on a GPU"
        )


def _attention_in_float32(run: _Run) -> Iterator[str]:
    modules = run.widened_by_torch
    if not modules:
        return
    names = dict.fromkeys(name for names in modules.values() for name in names)
    saved = sum(each.saved_bytes.get("float32", 0) for each in run.explanation.modules if each.path in modules)
    attention = " (attention with dropout has no fused kernel on a CPU)" if _ATTENTION.intersection(names) else ""
    yield (
        f"torch computes {first_few(names)} in FP32 by itself in {run.names_of(modules)}{attention}: "
        f"{size(saved)} saved"
    )


def _parameters_in_float32(run: _Run) -> Iterator[str]:
    wide = []
    for module in run.explanation.modules:
        is_narrow = module.path in run.policies and run.policies[module.path].param in SIXTEEN_BITS
        if is_narrow and not _is_norm(module) and module.path not in run.wide and "float32" in module.parameter_dtypes:
            wide.append(f"{run.group_paths[module.path] or 'the model'} ({module.type})")
    if wide:
        modules = "1 module that is no norm has" if len(wide) == 1 else f"{len(wide)} modules that are no norms have"
        yield (
            f"{modules} FP32 parameters although the policy keeps them in 16 bits: {first_few(wide)}; cast the model "
            "after its last change, or say by a rule that FP32 is meant"
        )


def _is_norm(module: ModuleDtypes) -> bool:
    return "norm" in module.type.lower() or "norm" in module.path.rpartition(".")[2].lower()


def _is_residual(each: Widening) -> bool:
    """Return whether a widening is two results being added, and not one and a buffer."""
    return each.operation == "add" and each.is_stream and each.name is None


def _is_of_wide_stream(run: _Run, each: Widening) -> bool:
    """Return whether a widening is part of a residual stream that the policy has in FP32: added to it, or its norm."""
    norms = (module.path for module in run.explanation.modules if _is_norm(module))
    return run.has_wide_stream(each.module) and (each.operation == "add" or each.module in norms)


def _first_widening(run: _Run) -> Iterator[str]:
    large = (each for each in run.widenings if run.is_large(each.result_bytes, share=0.01))
    first = next((each for each in large if not _is_of_wide_stream(run, each)), None)
    if first is None or _is_residual(first):
        return
    named, what = "", "the FP32 one"
    if first.name is not None:
        named = f" (the {'buffer' if first.is_buffer else 'parameter'} {run.tensor_name(first.name)})"
        what = "it"
    yield (
        f"the stream becomes FP32 in {run.names_of([first.module])}{at([first.source_line])}: "
        f"{first.operation} of {label(first.from_dtype)} and FP32{named}; cast {what} where it is used, .to(x.dtype)"
    )


def _residual_in_float32(run: _Run) -> Iterator[str]:
    additions = [each for each in run.widenings if _is_residual(each) and not run.has_wide_stream(each.module)]
    if additions:
        yield (
            f"{count(sum(each.calls for each in additions), 'addition')} of a 16-bit and an FP32 tensor gave FP32 in "
            f"{run.names_of(each.module for each in additions)}{at(each.source_line for each in additions)}: a "
            "residual stream in FP32 takes twice the bytes and a cast before every layer; cast the FP32 side once "
            "where it begins, unless FP32 is meant"
        )


def _upcasts(run: _Run) -> Iterator[str]:
    groups: defaultdict[tuple[str | None, str, str | None], list[Cast]] = defaultdict(list)
    for cast in run.explanation.casts:
        products = run.widened_by_torch.get(cast.module, ())
        has_been_said = (
            cast.by == "torch" and products and cast.operation in ("multi_head_attention_forward", *products)
        )
        is_upcast = cast.from_dtype in SIXTEEN_BITS and cast.to_dtype == "float32"
        if cast.by in ("model", "torch") and is_upcast and not has_been_said:
            groups[cast.source_line, cast.from_dtype, cast.operation if cast.by == "torch" else None].append(cast)
    for (source_line, from_dtype, operation), casts in largest(groups, lambda cast: cast.result_bytes):
        if run.is_large(sum(cast.result_bytes for cast in casts), share=0.01):
            who, advice = "the model's own code", "drop it: the policy keeps FP32 inside the operations that need it"
            if operation is not None:
                who, advice = f"torch's {operation} by itself", "call another operation"
            yield (
                f"{who} casts {label(from_dtype)} to FP32{at([source_line])} in "
                f"{run.names_of(cast.module for cast in casts)}: {', '.join(amount(casts))}; leave it if FP32 is "
                f"meant there, or {advice}"
            )


def _saved_in_float32(run: _Run) -> Iterator[str]:
    if run.policy is None or run.policy.compute not in SIXTEEN_BITS:
        return
    saved = run.explanation.saved_for_backward
    shares = Counter({OUTSIDE: saved.outside_bytes.get("float32", 0)})
    for module in run.explanation.modules:
        # what a rule or keep_float32 asks for is meant, and what torch does by itself has been said
        is_meant = module.path in run.policies and run.policies[module.path].compute == "float32"
        # as are the inputs of norms where the residual stream is in FP32
        is_meant |= _is_norm(module) and run.has_wide_stream(module.path)
        if not is_meant and module.path not in run.widened_by_torch:
            wide_bytes = module.saved_bytes.get("float32", 0) - module.kept_float32_bytes
            shares[run.group_paths[module.path] or "the model"] += wide_bytes
    total, wide, all_wide = saved.total_activation_bytes, shares.total(), saved.activation_bytes.get("float32", 0)
    if wide >= max(_LARGE_BYTES, _SHARE * total) or wide >= max(_TOY_BYTES, _MUCH * total):
        rest = f", without {size(all_wide - wide)} that is meant or named above" if all_wide > wide else ""
        parts = ", ".join(f"{path} ({size(number)})" for path, number in shares.most_common(_MOST) if number)
        yield (
            f"FP32 is {wide / total:.0%} of what is saved for backward, {size(wide)} of {size(total)}{rest}; the "
            f"largest parts: {parts}; look for casts to FP32 there"
        )
