"""What stands out of an explanation, a sentence each: what was seen, how much of it, what to do.

Only what matters is said: at least 1 MB, or a share of what is saved for the backward pass. Where a rule of the policy
asks for FP32, FP32 is no finding, except for products, which are the reason for 16 bits.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from duotone.jax.explanation.counting import bytes_of
from duotone.jax.explanation.equations import CAST, Equations
from duotone.jax.explanation.explanation import Explanation
from duotone.jax.explanation.reasons import DEFAULT_PRECISION, KEPT, OP_RULE, RULE
from duotone.jax.explanation.records import Residual
from duotone.jax.primitives import TRACED
from duotone.policy import Policy
from duotone.wording.findings import NOTHING, wide_results
from duotone.wording.groups import paths_of_groups
from duotone.wording.records import Cast, Operation, amount, largest
from duotone.wording.words import SIXTEEN_BITS, at, count, first_few, label, labels, size

_LARGE_BYTES = 1_000_000
# FP32 in what is saved is worth a word where it is much of what is more than a toy
_MUCH, _TOY_BYTES = 0.3, 64_000
_MOST = 3
# what each reason says, and what to do about it
_REASONS: Mapping[str | None, str] = {
    None: "although the policy computes in 16 bits",
    RULE: "as a rule of the policy asks",
    KEPT: "inside keep_float32",
    OP_RULE: "as op_rule asks",
    DEFAULT_PRECISION: "because jax.default_matmul_precision is set; leave it at the default for products in 16 bits",
    "preferred_element_type=float32": (
        "as preferred_element_type=float32 asks: operands in 16 bits, results in FP32, which are twice the bytes; "
        "leave it out where 16 bits are enough, for products are summed in FP32 anyway"
    ),
}


def findings_of(
    explanation: Explanation, policy: Policy | None, program: Equations, weights: frozenset[int]
) -> tuple[str, ...]:
    """Return the sentences about an explanation, the gravest first.

    Args:
        explanation: without findings.
        policy: that the function runs under, or None.
        program: its equations.
        weights: the numbers of those of its inputs that are weights.
    """
    if not explanation.operations:
        return ("nothing computes with floating-point numbers: give what the function is called with in training",)
    run = _Run(explanation, policy, program, weights)
    checks: tuple[Callable[[_Run], Iterator[str]], ...] = (_without_policy, _left_alone)
    if policy is not None and policy.compute in SIXTEEN_BITS:
        checks = (_products, _weights, _saved_in_float32, _outputs, _upcasts, _left_alone)
    return tuple(finding for check in checks for finding in check(run)) or (NOTHING,)


@dataclass(frozen=True)
class _Run:
    """An explanation, and what several findings ask of it."""

    explanation: Explanation
    policy: Policy | None
    program: Equations
    weights: frozenset[int]

    @cached_property
    def group_paths(self) -> dict[str, str]:
        """The path of the group of each scope, by path."""
        return paths_of_groups(self.explanation.scopes)

    def names_of(self, paths: Iterable[str]) -> str:
        """Return scopes as a sentence names them, those that are alike as one."""
        return first_few((self.group_paths.get(path, path) or "no scope" for path in paths), most=2)

    def is_large(self, number: int, share: float) -> bool:
        """Return whether bytes are worth a sentence: many, or at least a share of what is saved for backward."""
        return 0 < number >= min(_LARGE_BYTES, share * self.explanation.saved_for_backward.total_activation_bytes)


def _without_policy(run: _Run) -> Iterator[str]:
    if run.policy is not None:
        return
    dtypes = dict.fromkeys(each.compute_dtype for each in run.explanation.operations)
    if not set(SIXTEEN_BITS) & set(dtypes):
        yield f'the function is under no policy and computes in {labels(dtypes)}; see what changes with policy="bf16"'
    elif run.explanation.casts:
        number, bytes_written = amount(run.explanation.casts)
        yield (
            f"the function is under no policy and casts by itself: {number}, {bytes_written}; sums, norms and losses "
            "are in 16 bits wherever its code does not widen them"
        )


def _products(run: _Run) -> Iterator[str]:
    groups: defaultdict[str | None, list[Operation]] = defaultdict(list)
    for each in run.explanation.operations:
        if each.kind == "compute" and "float32" in (each.compute_dtype, each.output_dtype):
            groups[each.reason].append(each)
    for reason, operations in sorted(groups.items(), key=lambda item: (item[0] is not None, str(item[0]))):
        why = _REASONS.get(reason, f"as {reason} asks; leave it out for 16 bits, or leave it if FP32 is meant there")
        dtype = "with FP32 results" if str(reason).startswith("preferred") else "in FP32"
        names = first_few(each.name for each in operations)
        lines = [line for each in operations for line in each.source_lines]
        yield (
            f"{count(sum(each.calls for each in operations), 'product')} ({names}) ran {dtype} in "
            f"{run.names_of(path for each in operations for path in each.modules)}{at(lines)} {why}"
        )


def _weights(run: _Run) -> Iterator[str]:
    casts = [each for each in run.program.all if each.name == CAST and each.inputs[0] in run.weights]
    wide = [each for each in casts if str(each.source.outvars[0].aval.dtype) in SIXTEEN_BITS]
    written = sum(each.times * bytes_of(each.source.outvars[0].aval) for each in wide)
    if run.is_large(written, share=0.01):
        number = len({each.inputs[0] for each in wide})
        are = "weight in FP32 is" if number == 1 else "weights in FP32 are"
        yield (
            f"{number:,} {are} cast in every step, {size(written)}; dj.cast(params, policy) casts them once, and "
            "dj.masters keeps what 16 bits lack"
        )


def _saved_in_float32(run: _Run) -> Iterator[str]:
    saved = run.explanation.saved_for_backward
    wide, total = saved.activation_bytes.get("float32", 0), saved.total_activation_bytes
    if wide >= max(_TOY_BYTES, _MUCH * total):
        groups: defaultdict[str, list[Residual]] = defaultdict(list)
        for each in run.explanation.residuals:
            if each.dtype == "float32" and not each.origin.startswith("argument"):
                groups[each.origin].append(each)
        parts = (
            f"{name} ({size(sum(each.result_bytes for each in group))})" for name, group in largest(groups, _bytes)
        )
        yield (
            f"FP32 is {wide / total:.0%} of what is saved for backward, {size(wide)} of {size(total)}; the largest "
            f"parts: {', '.join(parts) or 'arguments'}; see the table of residuals for where they are made"
        )


def _outputs(run: _Run) -> Iterator[str]:
    wide = [each for each in run.explanation.outputs if each.dtype == "float32" and each.computed_dtype in SIXTEEN_BITS]
    if wide and run.is_large(sum(each.result_bytes for each in wide), share=0.1):
        yield wide_results(wide, "function")


def _upcasts(run: _Run) -> Iterator[str]:
    groups: defaultdict[tuple[str | None, str], list[Cast]] = defaultdict(list)
    for cast in run.explanation.casts:
        if cast.by == "model" and cast.from_dtype in SIXTEEN_BITS and cast.to_dtype == "float32":
            groups[cast.source_line, cast.from_dtype].append(cast)
    for (source_line, from_dtype), casts in largest(groups, _bytes):
        if run.is_large(sum(map(_bytes, casts)), share=0.01):
            yield (
                f"the code casts {label(from_dtype)} to FP32{at([source_line])} in "
                f"{run.names_of(cast.module for cast in casts)}: {', '.join(amount(casts))}; leave it if FP32 is meant "
                "there, or drop it: the policy keeps FP32 inside the operations that need it"
            )


def _left_alone(run: _Run) -> Iterator[str]:
    foreign: Counter[str] = Counter()
    dtypes: dict[str, None] = {}
    for each in run.program.all:
        if each.name in TRACED and any("float" in str(getattr(atom.aval, "dtype", "")) for atom in each.source.invars):
            foreign[each.name] += each.times
        for atom in each.source.outvars:
            dtype = str(getattr(atom.aval, "dtype", ""))
            if dtype.startswith(("float8", "float64", "complex")):
                dtypes[label(dtype)] = None
    if run.policy is not None and foreign:
        names = ", ".join(f"{name} ({number:,})" for name, number in foreign.most_common(_MOST))
        yield f"left in the dtypes that they were traced in, for what is inside is not Duotone's: {names}"
    if run.policy is not None and dtypes:
        yield f"left alone: arithmetic in {', '.join(dtypes)}"


def _bytes(each: Cast | Residual) -> int:
    return each.result_bytes
