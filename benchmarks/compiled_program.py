"""What XLA's compiler made of a program: its kernels, the bytes that they move, and what a result is computed from.

Read from the text of the optimised HLO, `compiled.as_text()`, so that it works for devices that are not there. A
kernel's bytes are those of the arrays that it reads and writes in the device's main memory, each once; of an array that
it only cuts a slice from, those of the slice. What happens in a TPU's vector memory costs none. A loop's body counts
once, whatever its number of turns.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# of these nothing runs on the device, or it counts where it began
_NAMES = """
    after-all async-done bitcast constant copy-done get-tuple-element iota optimization-barrier parameter partition-id
    slice-done tuple
"""
_FREE = frozenset(_NAMES.split())
_WITH_BODIES = ("while", "conditional", "call")
_SLICES = ("slice", "dynamic-slice", "slice-start")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    """An instruction of HLO.

    Attributes:
        name: unique in its computation.
        opcode: what it does.
        arrays: bytes of each array that it gives, and whether it lies in the device's main memory.
        operands: names, in order.
        rest: what stands after its operands.
        number: a parameter's.
        is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[tuple[int, bool], ...]
    operands: tuple[str, ...]
    rest: str
    number: int | None
    is_root: bool

    @property
    def size(self) -> int:
        """The bytes that it gives in main memory."""
        return sum(size for size, is_in_main in self.arrays if is_in_main)

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        found = re.findall(r"(?:calls|body|to_apply|(?:true|false)_computation)=%([\w.\-]+)", self.rest)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", self.rest):
            found += re.findall(r"%([\w.\-]+)", branches)
        return found

    @property
    def index(self) -> int:
        """Which element a get-tuple-element takes."""
        found = re.search(r"\bindex=(\d+)", self.rest)
        return int(found[1]) if found else 0


class CompiledProgram:
    """An optimised program.

    Args:
        text: of `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if begun := _COMPUTATION.match(line):
                current = self._computations[begun[2]] = {}
                self._entry = begun[2] if begun[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = _instruction(found[2], found[3], is_root=bool(found[1]))

    @cached_property
    def _kernels(self) -> list[tuple[int, bool]]:
        """The bytes that each kernel moves, and whether it was written by hand."""
        return [
            (self._bytes_moved(each, among), each.opcode == "custom-call" and "tpu_custom_call" in each.rest)
            for each, among in self._run(self._entry)
        ]

    def kernels(self, least_bytes: int = 0) -> int:
        """Return how many kernels move at least so many bytes."""
        return sum(moved >= least_bytes for moved, _ in self._kernels)

    def hand_written(self) -> int:
        """Return how many of the kernels are Pallas kernels for TPUs."""
        return sum(is_by_hand for _, is_by_hand in self._kernels)

    def bytes_moved(self) -> int:
        """Return the bytes that all kernels together read from and write to the device's main memory."""
        return sum(moved for moved, _ in self._kernels)

    def made_from(self, result: int) -> set[int]:
        """Return the numbers of the program's parameters that one of its results is computed from."""
        return self._parameters(self._entry, result)

    def _run(self, computation: str) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        among = self._computations[computation]
        for each in among.values():
            if each.opcode in _WITH_BODIES:
                for called in each.called:
                    yield from self._run(called)
            elif each.opcode not in _FREE and not _is_allocation(each):
                yield each, among

    def _bytes_moved(self, each: Instruction, among: dict[str, Instruction]) -> int:
        if each.opcode in ("copy-start", "slice-start"):
            # its results are the original, the copy and a flag, or the copy, the original and a flag
            (_, is_read), (copied, is_written) = each.arrays[:2] if each.opcode == "slice-start" else each.arrays[1::-1]
            return copied * (is_read + is_written)
        written = each.size
        if each.opcode in _SLICES:
            return 2 * written
        read = 0
        for operand in dict.fromkeys(each.operands):
            size = among[operand].size if operand in among else 0
            read += min(size, self._read_of(each, operand, size))
        return read + written

    def _read_of(self, fusion: Instruction, operand: str, size: int) -> int:
        """Return how much of an operand a fusion reads: all of it, or what it cuts out."""
        if fusion.opcode != "fusion" or not fusion.called:
            return size
        inner = self._computations[fusion.called[0]]
        numbers = {number for number, name in enumerate(fusion.operands) if name == operand}
        names = {each.name for each in inner.values() if each.opcode == "parameter" and each.number in numbers}
        users = [each for each in inner.values() if names.intersection(each.operands)]
        if users and all(each.opcode in _SLICES for each in users):
            return sum(each.size for each in users)
        return size

    def _parameters(self, computation: str, result: int) -> set[int]:
        among = self._computations[computation]
        root = next(each for each in among.values() if each.is_root)
        # of one array, that; of several, the one at its place
        todo = [(root.name, result)]
        seen = set(todo)
        found: set[int] = set()
        while todo:
            name, place = todo.pop()
            each = among.get(name)
            if each is None:
                continue
            if each.opcode == "parameter":
                found.add(each.number if each.number is not None else -1)
                continue
            for follow in self._sources(each, place):
                if follow not in seen:
                    seen.add(follow)
                    todo.append(follow)
        return found

    def _sources(self, each: Instruction, place: int) -> list[tuple[str, int]]:
        if each.opcode == "tuple":
            return [(each.operands[place], 0)]
        if each.opcode == "get-tuple-element":
            return [(each.operands[0], each.index)]
        if each.opcode == "fusion" and each.called:
            return [(each.operands[number], 0) for number in self._parameters(each.called[0], place)]
        return [(operand, 0) for operand in each.operands]


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    kind, rest = _parted(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, rest = _parted("(" + rest)
    number = int(operands.strip("()")) if opcode == "parameter" else None
    names = () if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", operands))
    return Instruction(name, opcode, tuple(map(_array, _ARRAY.finditer(kind))), names, rest, number, is_root)


def _parted(text: str) -> tuple[str, str]:
    """Return a text's first bracket, and what comes after it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _array(array: re.Match[str]) -> tuple[int, bool]:
    count = 1
    for dimension in filter(None, array[2].split(",")):
        count *= int(dimension)
    # S(1) and so on are other memories
    is_in_main = re.search(r"S\([1-9]", array[3] or "") is None
    return count * (_BYTES.get(array[1]) or max(1, int(array[1][1:]) // 8)), is_in_main


def _is_allocation(each: Instruction) -> bool:
    is_called = each.opcode == "custom-call"
    return is_called and re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', each.rest) is not None
