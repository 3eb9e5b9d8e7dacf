"""What a compiled program says of itself: bytes it moves, whole arrays it copies, buffers it takes over.

Reads the text of optimised HLO (`compiled.as_text()`) of CPU, GPU and TPU. It knows no kernel and no model.

Bytes are counted as device memory sees them, in instructions that are not inside a fusion: operands read
once and outputs written once, as padded by the layout's tiles; nothing for what lies in another memory (a
TPU's VMEM). Loop bodies count as often as they run. Slices and gathers count what they take, updates and
scatters in place what they change. Products are taken to read each operand once, which holds while one side
fits on the chip. A kernel's own estimate of its cost is not looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

# what Pallas kernels are called in the HLO of each platform
KERNEL_TARGETS = ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu")

COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}

# hand on what they were given
_PASSIVE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "conditional",
    "constant",
    "domain",
    "done",
    "get-dimension-size",
    "get-tuple-element",
    "opt-barrier",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """minor_to_major: the order of the axes in memory; tile: of the minor axes, which are padded to multiples
    of it. memory: 0 is the device's own (HBM)."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """With padding; none where it lies in another memory."""
        if self.memory:
            return 0
        order = self.minor_to_major or tuple(reversed(range(len(self.dims))))
        sizes = [self.dims[axis] for axis in order]
        for i, size in enumerate(reversed(self.tile[-len(sizes) :] if sizes else ())):
            sizes[i] = -(-sizes[i] // size) * size
        return -(-math.prod(sizes) * _bits(self.dtype) // 8)

    def part(self, elements: int) -> int:
        """Bytes of so many of its elements, at most all."""
        return self.bytes if elements >= self.elements else -(-self.bytes * elements // self.elements)


Tree = Shape | tuple["Tree", ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """opcode: that of an asynchronous start is the work's own. operands: names within its computation.
    attributes: as written behind them. inside: what stands in their place: a parameter's number, a constant.
    starts: whether it is asynchronous."""

    name: str
    shape: Tree
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    inside: str = ""
    starts: bool = False

    @functools.cached_property
    def leaves(self) -> tuple[Shape, ...]:
        return tuple(_leaves(self.shape))

    @property
    def elements(self) -> int:
        return sum(shape.elements for shape in self.leaves)

    @property
    def results(self) -> tuple[Shape, ...]:
        """The arrays that it computes: of an asynchronous start, (operands, result, …), the result alone."""
        if self.starts and isinstance(self.shape, tuple) and len(self.shape) > 1:
            return tuple(_leaves(self.shape[0 if self.opcode == "copy" else 1]))
        return self.leaves

    def called(self, *keys: str) -> list[str]:
        """Computations named by these attributes."""
        found = []
        for key in keys:
            if match := re.search(rf"\b{key}=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes):
                found += re.findall(r"%([\w.\-]+)", match[1])
        return found

    def attribute(self, name: str) -> str:
        match = re.search(rf"\b{name}=([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, named scopes included; may be empty."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def trip_count(self) -> int | None:
        """Of a loop, where the compiler knew it."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def aliased_outputs(self) -> set[int]:
        """Leaves of a custom call's output that lie in the buffer of an operand."""
        match = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", self.attributes)
        return {int(index or 0) for index in re.findall(r"\{(\d*)\}: ?\(", match[1])} if match else set()


class Computation:
    def __init__(self, name: str, instructions: list[Instruction]) -> None:
        self.name = name
        self.fused = False  # the inside of a fusion
        self.instructions = instructions
        self.by_name = {one.name: one for one in instructions}
        self.root = next(one for one in instructions if one.root)
        self.parameters = {int(one.inside): one for one in instructions if one.opcode == "parameter"}
        self.users: dict[str, list[tuple[Instruction, int]]] = {one.name: [] for one in instructions}
        for one in instructions:
            for i, operand in enumerate(one.operands):
                self.users[operand].append((one, i))

    def operand(self, instruction: Instruction, i: int) -> Instruction:
        return self.by_name[instruction.operands[i]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One instruction's share: `times` it runs, `bytes` in all of those together."""

    instruction: Instruction
    times: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Written:
    """Elements of a result that an instruction writes. in_place: into what it was given; the rest stays."""

    elements: int
    in_place: bool


class Module:
    """A program's computations. Raises ValueError for text that is not one."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self._needed: dict[Instruction, int] = {}
        self.header = text.split("\n", 1)[0]
        entry = name = None
        lines: list[Instruction] = []
        for line in text.split("\n"):  # strings in it may hold what else ends a line
            if name is None:
                if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
                    name, lines = match[2], []
                    entry = name if match[1] else entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, lines)
                name = None
            elif " = " in line:
                lines.append(_instruction(line))
        if entry is None:
            raise ValueError(f"no entry computation in {text[:80]!r}")
        self.entry = self.computations[entry]
        for computation in list(self.computations.values()):
            for one in computation.instructions:
                if one.opcode == "fusion":
                    self._fused(one).fused = True

    # -- what it takes and gives ---------------------------------------------------------------------------

    @property
    def arguments(self) -> list[Shape]:
        parameters = self.entry.parameters
        return [leaf for i in sorted(parameters) for leaf in parameters[i].leaves]

    @property
    def outputs(self) -> list[Shape]:
        return list(self.entry.root.leaves)

    @property
    def aliases(self) -> dict[int, int]:
        """Output -> the argument whose buffer it takes over."""
        _, _, rest = self.header.partition("input_output_alias={")
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)", rest.split("}, entry_", 1)[0])
        return {int(out or 0): int(argument) for out, argument in pairs}

    def executed(self) -> Iterator[tuple[Computation, Instruction]]:
        """Every instruction that stands by itself: not those inside fusions or reductions."""
        todo, seen = [self.entry], set()
        while todo:
            computation = todo.pop()
            if computation.name in seen:
                continue
            seen.add(computation.name)
            for one in computation.instructions:
                yield computation, one
                todo += [self.computations[name] for name in _callees(one)]

    def collectives(self) -> list[tuple[Instruction, int]]:
        """Exchanges between devices and how often each runs; loops without a known count once, and every arm
        of a conditional."""
        found: list[tuple[Instruction, int]] = []

        def visit(computation: Computation, times: int) -> None:
            for one in computation.instructions:
                if one.opcode in COLLECTIVES:
                    found.append((one, times))
                count = 1
                if one.opcode == "while":
                    known = one.trip_count
                    known = self._counted(computation, one) if known is None else known
                    count = 1 if known is None else known
                for name in _callees(one):
                    visit(self.computations[name], times * count)

        visit(self.entry, 1)
        return found

    def kernel_calls(self) -> list[Instruction]:
        """Calls of Pallas kernels."""
        return [one for _, one in self.executed() if one.target in KERNEL_TARGETS]

    def whole_writes(self, match: Callable[[Shape], bool]) -> list[tuple[Instruction, Shape]]:
        """Instructions that write all of an array that `match`es to device memory; updates in place do not.

        That an update which could be in place is so is the buffers' assignment, which the text does not tell:
        the program's temporary memory does.
        """
        found = []
        for computation, one in self.executed():
            if one.opcode in _PASSIVE or _callees(one):
                continue
            for shape, written in zip(one.results, self._written(computation, one), strict=True):
                if match(shape) and not written.in_place and not shape.memory:
                    found.append((one, shape))
        return found

    def remade(
        self, argument: Callable[[Shape], bool], result: Callable[[Shape], bool]
    ) -> list[tuple[Instruction, Shape]]:
        """Instructions that take an argument of the program as it was given and write it, or part of it, to
        device memory once more: in another type or order, or cut out. Products with it are not meant.

        argument, result: which arguments, and which shapes of what is written, count.
        """
        given = {
            i: {j for j, leaf in enumerate(one.leaves) if argument(leaf)}
            for i, one in self.entry.parameters.items()
        }
        found: list[tuple[Instruction, Shape]] = []
        whole = {id(one) for one, _ in self.whole_writes(result)}
        self._follow(self.entry, given, whole, found)
        return [(one, shape) for one, shape in found if result(shape)]

    def _follow(
        self,
        computation: Computation,
        given: dict[int, set[int]],
        whole: set[int],
        found: list[tuple[Instruction, Shape]],
    ) -> None:
        """given: of each parameter, which of its leaves are what is followed."""
        held: dict[str, set[int]] = {}
        for one in computation.instructions:
            own = [held[name] for name in one.operands]
            held[one.name] = set()
            if one.opcode == "parameter":
                held[one.name] = given.get(int(one.inside), set())
            elif one.opcode in ("bitcast", "copy", "done", "opt-barrier", "optimization-barrier", "while"):
                held[one.name] = own[0] if own else set()
            elif one.opcode == "tuple":
                start = 0
                for name, leaves in zip(one.operands, own, strict=True):
                    held[one.name] |= {start + i for i in leaves}
                    start += len(computation.by_name[name].leaves)
            elif one.opcode == "get-tuple-element":
                index = int(one.attribute("index"))
                taken = computation.operand(one, 0).shape
                assert isinstance(taken, tuple)
                start = sum(len(list(_leaves(part))) for part in taken[:index])
                size = len(one.leaves)
                held[one.name] = {i - start for i in own[0] if start <= i < start + size}
            inside = own[1:] if one.opcode == "conditional" else own * (2 if one.opcode == "while" else 1)
            for i, name in enumerate(_callees(one)):
                passed = {0: inside[i]} if one.opcode in ("conditional", "while") else dict(enumerate(own))
                self._follow(self.computations[name], passed, whole, found)
            if id(one) in whole and any(own) and not self._multiplies(one):
                found += [(one, shape) for shape in one.results]

    def _multiplies(self, one: Instruction) -> bool:
        if one.opcode == "fusion":
            return any(self._multiplies(inner) for inner in self._fused(one).instructions)
        return one.opcode in ("dot", "convolution", "custom-call")

    def operands(self, instruction: Instruction) -> list[Shape]:
        """The arrays that an instruction takes."""
        computation = next(home for home, one in self.executed() if one is instruction)
        return [leaf for name in instruction.operands for leaf in computation.by_name[name].leaves]

    # -- bytes ---------------------------------------------------------------------------------------------

    def bytes_moved(
        self,
        *,
        kernel: Callable[[Instruction], int | None] = lambda call: None,
        trips: Callable[[Instruction], int | None] = lambda loop: None,
        costly: Callable[[Instruction], bool] = lambda conditional: True,
    ) -> list[Row]:
        """Bytes read from and written to device memory, by instruction, those that move none left out.

        kernel: bytes that one call of a Pallas kernel moves; None counts its operands and outputs whole.
        trips: how often a loop runs whose count the compiler did not know.
        costly: whether a conditional takes the arm that moves most, or the one that moves least.
        Raises ValueError for a loop that nobody knows the count of.
        """
        rows: list[Row] = []
        self._count(self.entry, 1, rows, kernel, trips, costly)
        return rows

    def _count(
        self,
        computation: Computation,
        times: int,
        rows: list[Row],
        kernel: Callable[[Instruction], int | None],
        trips: Callable[[Instruction], int | None],
        costly: Callable[[Instruction], bool],
    ) -> None:
        def arm(name: str, times: int) -> list[Row]:
            inner: list[Row] = []
            self._count(self.computations[name], times, inner, kernel, trips, costly)
            return inner

        for one in computation.instructions:
            if one.opcode == "while":
                count = one.trip_count
                count = self._counted(computation, one) if count is None else count
                count = trips(one) if count is None else count
                if count is None:
                    raise ValueError(f"how often does the loop {one.name} ({one.op_name}) run?")
                for name in one.called("body", "condition"):
                    rows += arm(name, times * count)
            elif one.opcode == "conditional":
                arms = [arm(name, times) for name in _callees(one)]
                rows += sorted(arms, key=total)[-1 if costly(one) else 0]
            elif callees := _callees(one):
                for name in callees:
                    rows += arm(name, times)
            elif moved := self._moved(computation, one, kernel):
                rows.append(Row(one, times, times * moved))

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop runs that counts from a constant to a constant by one."""
        condition, body = (self.computations[loop.called(key)[0]] for key in ("condition", "body"))
        test, inside = condition.root, condition
        if test.opcode == "fusion":
            inside = self._fused(test)
            test = inside.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, limit = (_origin(inside, inside.operand(test, i)) for i in (0, 1))
        if inside.fused and counter.opcode == "parameter":
            counter = _origin(condition, condition.operand(condition.root, int(counter.inside)))
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        i = int(counter.attribute("index"))
        before = computation.operand(loop, 0)
        if before.opcode != "tuple" or body.root.opcode != "tuple":
            return None
        start = _origin(computation, computation.operand(before, i))
        step = _origin(body, body.operand(body.root, i))
        if start.opcode != "constant" or step.opcode != "add":
            return None
        ends = [_origin(body, body.operand(step, i)) for i in (0, 1)]
        if [end.opcode for end in ends] != ["get-tuple-element", "constant"] or ends[1].inside != "1":
            return None
        if ends[0].attribute("index") != str(i):
            return None
        return max(int(limit.inside) - int(start.inside), 0)

    def _moved(
        self, computation: Computation, one: Instruction, kernel: Callable[[Instruction], int | None]
    ) -> int:
        if one.opcode in _PASSIVE:
            return 0
        if one.target in KERNEL_TARGETS and (known := kernel(one)) is not None:
            return known
        results = list(zip(one.results, self._written(computation, one), strict=True))
        moved = sum(shape.part(written.elements) for shape, written in results)
        for i, operand in enumerate(one.operands):
            leaves = computation.by_name[operand].leaves
            if len(leaves) == 1:
                moved += leaves[0].part(self._read(computation, one, i))
            else:
                moved += sum(leaf.bytes for leaf in leaves)
        return moved

    def _written(self, computation: Computation, one: Instruction) -> list[_Written]:
        """Of each result."""
        if one.target == "AllocateBuffer":
            return [_Written(0, in_place=True)] * len(one.results)
        if one.opcode == "custom-call":
            kept = one.aliased_outputs
            return [
                _Written(0, in_place=True)
                if i in kept or _workspace(one, i)
                else _Written(shape.elements, in_place=False)
                for i, shape in enumerate(one.results)
            ]
        if one.opcode == "fusion":
            fused = self._fused(one)
            tops = (
                [fused.by_name[name] for name in fused.root.operands]
                if fused.root.opcode == "tuple"
                else [fused.root]
            )
            return [self._stored(fused, top, leaf) for top in tops for leaf in top.leaves]
        return [self._stored(computation, one, shape) for shape in one.results]

    def _stored(self, computation: Computation, one: Instruction, leaf: Shape) -> _Written:
        """What `one` changes of the array that it is given to update, or all of its output."""
        while one.opcode in ("bitcast", "reshape") and computation.fused:
            one = computation.operand(one, 0)
        if one.opcode == "dynamic-update-slice" and self._handed_in(computation, one):
            changed = computation.operand(one, 1).elements
            return _Written(changed, in_place=changed < leaf.elements)
        if one.opcode == "scatter" and self._handed_in(computation, one):
            count = (len(one.operands) - 1) // 2
            changed = sum(computation.operand(one, i).elements for i in range(count + 1, 2 * count + 1))
            return _Written(changed, in_place=True)
        if one.opcode == "fusion" and len(one.leaves) == 1:
            fused = self._fused(one)
            return self._stored(fused, fused.root, leaf)
        return _Written(leaf.elements, in_place=False)

    def _handed_in(self, computation: Computation, update: Instruction) -> bool:
        """Whether what is updated comes from outside the fusion, and not from a sum in it, say."""
        source = computation.operand(update, 0)
        if not computation.fused:
            return True
        while source.opcode in ("bitcast", "reshape"):
            source = computation.operand(source, 0)
        return source.opcode == "parameter"

    def _read(self, computation: Computation, user: Instruction, i: int) -> int:
        """Elements of operand i that `user` reads."""
        operand = computation.operand(user, i)
        if user.opcode in ("dynamic-slice", "slice", "gather") and i == 0:
            return min(sum(shape.elements for shape in user.results), operand.elements)
        if user.opcode == "dynamic-update-slice" and i == 0:
            return 0
        if user.opcode == "scatter" and i < (len(user.operands) - 1) // 2:
            return 0 if self._overwrites(user) else computation.operand(user, -1).elements
        if user.opcode == "fusion":
            fused = self._fused(user)
            return self._touched(fused, fused.parameters[i])
        if user.target == "AllocateBuffer":
            return 0
        return operand.elements

    def _overwrites(self, scatter: Instruction) -> bool:
        """Whether the scatter puts its updates in place of what was there, rather than add to it."""
        root = self.computations[scatter.called("to_apply")[0]].root
        return root.opcode == "parameter"

    def _touched(self, fused: Computation, one: Instruction) -> int:
        """Elements of `one`, inside a fusion, that its users there need."""
        if one in self._needed:  # without this, time doubles with each pair of ways that meet again
            return self._needed[one]
        needed = one.elements if one.root else 0
        for user, i in fused.users[one.name]:
            if user.opcode in ("dynamic-update-slice", "scatter") and i == 0:
                in_place = self._handed_in(fused, user) and self._is_output(fused, user)
                needed += self._read(fused, user, 0) if in_place else self._touched(fused, user)
            elif user.opcode in ("dynamic-slice", "slice", "gather", "scatter", "fusion"):
                needed += self._read(fused, user, i)
            elif user.opcode in ("tuple", "bitcast") or _pointwise(user, one):
                needed += one.elements if user.root else self._touched(fused, user)
            else:
                needed += one.elements
        self._needed[one] = min(needed, one.elements)
        return self._needed[one]

    def _is_output(self, fused: Computation, one: Instruction) -> bool:
        while not one.root:
            users = fused.users[one.name]
            if len(users) != 1 or users[0][0].opcode not in ("bitcast", "reshape", "tuple"):
                return False
            one = users[0][0]
        return True

    def _fused(self, fusion: Instruction) -> Computation:
        return self.computations[fusion.called("calls")[0]]


def total(rows: list[Row]) -> int:
    return sum(row.bytes for row in rows)


def _callees(one: Instruction) -> list[str]:
    """Computations that run where the instruction stands; a reduction's or fusion's do not by themselves."""
    if one.opcode == "while":
        return one.called("body", "condition")
    if one.opcode == "conditional":
        return one.called("branch_computations", "true_computation", "false_computation")
    if one.opcode == "call":
        return one.called("to_apply", "calls")
    if one.opcode == "async":
        return one.called("calls", "called_computation")
    return []


def _origin(computation: Computation, one: Instruction) -> Instruction:
    while one.opcode in ("copy", "bitcast", "done") and one.operands:
        one = computation.operand(one, 0)
    return one


def _workspace(call: Instruction, i: int) -> bool:
    """cuBLAS and cuDNN get scratch memory as a last output of bytes; how much they touch is not told."""
    return (
        (call.target or "").startswith("__cu")
        and len(call.leaves) > 1
        and i == len(call.leaves) - 1
        and call.leaves[i].dtype in ("s8", "u8")
    )


def _pointwise(user: Instruction, operand: Instruction) -> bool:
    """Whether the user's elements each need one of the operand's."""
    return user.elements == operand.elements and user.opcode not in (
        "convolution",
        "custom-call",
        "dot",
        "reduce",
        "reduce-window",
        "sort",
    )


def _leaves(shape: Tree) -> Iterator[Shape]:
    if isinstance(shape, Shape):
        yield shape
    else:
        for part in shape:
            yield from _leaves(part)


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    match = re.search(r"\d+", dtype)
    return int(match[0]) if match else 8  # pred


# -- text ----------------------------------------------------------------------------------------------------


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    shape, rest = _first(right)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    inside = rest[:end]
    opcode = opcode.strip()
    leaf = opcode in ("constant", "parameter")
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        shape=_shape(shape),
        opcode="done" if opcode.endswith(("-done", "-update")) else opcode.removesuffix("-start"),
        operands=() if leaf else tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=rest[end + 1 :],
        root=left.startswith("ROOT "),
        inside=inside if leaf else "",
        starts=opcode.endswith("-start"),
    )


def _first(text: str) -> tuple[str, str]:
    """The shape that the text starts with, and what follows."""
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before the text is closed."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _shape(text: str) -> Tree:
    text = re.sub(r"/\*.*?\*/", "", text).strip()
    if text.startswith("("):
        return tuple(_shape(part) for part in _split(text[1:-1]) if part.strip())
    match = re.fullmatch(r"(\w+)(?:\[([^\]]*)\])?(?:\{(.*)\})?", text)
    if not match:
        raise ValueError(f"not a shape: {text[:80]!r}")
    order, _, properties = (match[3] or "").partition(":")
    tile = re.search(r"T\(([\d,]*)\)", properties)
    memory = re.search(r"S\((\d+)\)", properties)
    return Shape(
        dtype=match[1],
        dims=_ints(re.sub("<=", "", match[2] or "")),
        minor_to_major=_ints(order),
        tile=_ints(tile[1]) if tile else (),
        memory=int(memory[1]) if memory else 0,
    )


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
