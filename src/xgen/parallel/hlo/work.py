"""What one device does when a compiled program runs once: FLOPs of products, bytes of memory, bytes to other devices.

Loops are multiplied out, whatever is called is followed, of a conditional's branches the dearest counts, and a pair of
start and done counts once. The compiler's own `cost_analysis` counts a loop's body once: of a step that scans over 32
layers it tells a thirty-second.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from xgen.parallel.hlo.groups import Groups, of_instruction
from xgen.parallel.hlo.loops import trip_count
from xgen.parallel.hlo.products import convolution_flops, dot_flops
from xgen.parallel.hlo.text import Array, HloError, Instruction, Module, backend_config, parse
from xgen.parallel.hlo.traffic import continues, traffic

Cost = float | Callable[[tuple[Array, ...]], float]
"""FLOPs of one call of a kernel: a number, or a function of its operands' arrays."""

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")


@dataclass(frozen=True)
class Collective:
    """All exchanges of one kind among the same groups.

    `count`: how often they run. `bytes`: of one device, over all runs, the whole of what is exchanged: of an all-gather
    the result, of all others the operand. How much of it crosses a link is the roofline's business. `groups`: places of
    devices in the program's order; where `between_slices`, numbers of slices: each chip exchanges with those that have
    its place in the others, over the data centre's network.
    """

    kind: str
    groups: Groups = field(repr=False)
    between_slices: bool
    count: int
    bytes: int

    @property
    def size(self) -> int:
        """Devices of one group; of a permute, all that take part."""
        return len({d for pair in self.groups for d in pair}) if self.permutes else max(map(len, self.groups))

    @property
    def permutes(self) -> bool:
        return self.kind == "collective-permute"

    @property
    def sent(self) -> float:
        """Bytes that one device sends."""
        return self.bytes * (1.0 if self.permutes else crossing(self.kind, self.size))


def crossing(kind: str, members: int) -> float:
    """Share of an exchange's bytes that one member must send, when all reach all alike: an all-reduce is a
    reduce-scatter and an all-gather in turn. Raises HloError for a kind that is not known."""
    part = (members - 1) / members
    shares = {
        "all-gather": part,
        "reduce-scatter": part,
        "all-reduce": 2 * part,
        "all-to-all": part,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }
    if kind not in shares:
        raise HloError(f"an exchange of kind {kind!r} has no cost here; known: {', '.join(shares)}")
    return shares[kind]


@dataclass(frozen=True)
class Buffer:
    """An array that the program keeps: `bytes` with its layout's padding; `name` and `opcode` of the first instruction
    that makes it, `count` of instructions with the same shape."""

    name: str
    opcode: str
    shape: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Work:
    """Of one device and one run.

    `flops_by`: "dot", "convolution" and each kernel by name. `memory_bytes`: read and written in main memory. `loops`:
    how often each loop's body runs each time that the loop is met. `buffers`: results of instructions, the largest
    first, one for each shape; arguments, and what is updated in place, are not among them.
    """

    flops_by: Mapping[str, float]
    memory_bytes: int
    collectives: tuple[Collective, ...]
    loops: Mapping[str, float]
    buffers: tuple[Buffer, ...] = field(repr=False)

    @property
    def flops(self) -> float:
        return sum(self.flops_by.values())

    def bytes_by_kind(self) -> dict[str, int]:
        """Of collectives."""
        totals: Counter[str] = Counter()
        for one in self.collectives:
            totals[one.kind] += one.bytes
        return dict(totals)

    def at_least(self, size: int) -> tuple[Buffer, ...]:
        """Buffers of so many bytes or more: pass the whole model's, or the whole logits', to see that there is none."""
        return tuple(buffer for buffer in self.buffers if buffer.bytes >= size)


def read_work(text: str, kernels: Mapping[str, Cost] | None = None, trips: Mapping[str, float] | None = None) -> Work:
    """Count a program's work from `compiled.as_text()`.

    `kernels`: FLOPs of custom calls by a part of their name, for those whose text tells none (see `splash`).
    `trips`: how often loops run, on average, whose end only the data know: by name, or by a part of their `op_name`.
    Raises HloError where the text says something that cannot be counted.
    """
    counter = _Counter(parse(text), dict(kernels or {}), dict(trips or {}))
    total = counter.sequence(counter.module.entry)
    exchanges = (Collective(*key, count, size) for key, (count, size) in total.exchanges.items())
    return Work(
        flops_by=dict(total.flops),
        memory_bytes=total.memory,
        collectives=tuple(sorted(exchanges, key=lambda one: -one.bytes)),
        loops=counter.loops,
        buffers=_largest(counter.kept),
    )


def splash(products: Mapping[str, float]) -> dict[str, Cost]:
    """FLOPs of Pallas's splash attention on TPU by kernel ("fwd", "dq", "dkv"), whose text tells none.

    Each number is in products over the whole square of queries and keys, of which the causal kernel leaves out what is
    above the diagonal; with E the head's width, a product of one query and one key is 2 E FLOPs.
    """

    def cost(number: float) -> Cost:
        def flops(operands: tuple[Array, ...]) -> float:
            wide = [array for array in operands if len(array.dims) >= 3 and array.dtype in ("bf16", "f16", "f32")]
            if len(wide) < 2:
                raise HloError(f"not splash attention's operands: {', '.join(array.shape for array in operands)}")
            queries, keys = wide[0], wide[1]
            return number * 2.0 * queries.elements * keys.dims[-2]

        return flops

    return {f"splash_{kind}_{part}": cost(number) for kind in ("mha", "mqa") for part, number in products.items()}


# Targets that compute no product: the compiler's own marks and helpers.
_NO_PRODUCTS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "LayoutConstraint", "MoveToDevice", "MoveToHost", "PartialReduce",
    "SPMDFullToShardShape", "SPMDShardToFullShape", "Sharding", "SliceId", "TopK", "ZeroCrop",
    "annotate_device_placement",
}  # fmt: skip
# Nothing moves when they run.
_FREE = {
    "after-all", "add-dependency", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple", "domain", "get-dimension-size", "set-dimension-size",
}  # fmt: skip
_PLAIN = {
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "batch-norm-grad", "batch-norm-inference",
    "batch-norm-training", "bitcast-convert", "broadcast", "cbrt", "ceil", "cholesky", "clamp", "compare", "complex",
    "concatenate", "convert", "copy", "cos", "cosh", "cosine", "count-leading-zeros", "divide", "dynamic-reshape",
    "dynamic-slice", "dynamic-update-slice", "erf", "exponential", "exponential-minus-one", "fft", "floor", "gather",
    "imag", "iota", "is-finite", "log", "log-plus-one", "logistic", "map", "maximum", "minimum", "multiply", "negate",
    "not", "or", "pad", "popcnt", "power", "real", "reduce", "reduce-precision", "reduce-window", "remainder",
    "reshape",
    "reverse", "rng", "rng-bit-generator", "rng-get-and-update-state", "round-nearest-afz", "round-nearest-even",
    "rsqrt", "scatter", "select", "select-and-scatter", "shift-left", "shift-right-arithmetic", "shift-right-logical",
    "sign", "sin", "sine", "sinh", "slice", "sort", "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "topk",
    "transpose", "triangular-solve", "xor",
}  # fmt: skip


_Key = tuple[str, Groups, bool]
"""Kind, groups, whether between slices."""


@dataclass
class _Total:
    """Sums of one computation."""

    flops: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    exchanges: dict[_Key, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: _Total, times: float = 1) -> None:
        for name, flops in other.flops.items():
            self.flops[name] = self.flops.get(name, 0.0) + flops * times
        self.memory += round(other.memory * times)
        for key, (count, size) in other.exchanges.items():
            self.exchange(key, round(count * times), round(size * times))

    def exchange(self, key: _Key, count: int, size: int) -> None:
        had = self.exchanges.get(key, (0, 0))
        self.exchanges[key] = (had[0] + count, had[1] + size)

    @staticmethod
    def dearest(branches: list[_Total]) -> _Total:
        """Of each quantity the greatest: a bound, as it is not known which branch runs."""
        most = _Total()
        for branch in branches:
            most.memory = max(most.memory, branch.memory)
            for name, flops in branch.flops.items():
                most.flops[name] = max(most.flops.get(name, 0.0), flops)
            for key, (count, size) in branch.exchanges.items():
                had = most.exchanges.get(key, (0, 0))
                most.exchanges[key] = (max(had[0], count), max(had[1], size))
        return most


class _Counter:
    """Walks a program; each computation once."""

    def __init__(self, module: Module, kernels: Mapping[str, Cost], trips: Mapping[str, float]) -> None:
        self.module = module
        self.kernels = kernels
        self.trips = trips
        self.loops: dict[str, float] = {}
        self.kept: list[tuple[Instruction, Array]] = []
        self._sequences: dict[str, _Total] = {}
        self._insides: dict[str, _Total] = {}

    def sequence(self, name: str) -> _Total:
        """Of a computation whose instructions run one after the other."""
        if name not in self._sequences:
            total = _Total()
            for one in self.module[name]:
                total.add(self._instruction(one))
            self._sequences[name] = total
        return self._sequences[name]

    def inside(self, name: str) -> _Total:
        """Products and exchanges of a fused computation, whose values need not reach memory."""
        if name not in self._insides:
            total = _Total()
            for one in self.module[name]:
                part = self._instruction(one, fused=True)
                part.memory = 0
                total.add(part)
            self._insides[name] = total
        return self._insides[name]

    def _instruction(self, one: Instruction, fused: bool = False) -> _Total:
        base = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return _Total()
        if one.opcode == "while":
            return self._loop(one)
        if one.opcode == "conditional":
            branches = one.called("branch_computations", "true_computation", "false_computation")
            return _Total.dearest([self.sequence(branch) for branch in branches])
        if base in ("call", "async"):
            total = _Total()
            for callee in one.called("to_apply", "calls", "called_computations"):
                total.add(self.sequence(callee))
            return total
        total = self._products(one, base)
        if not fused:
            total.memory, kept = traffic(self.module, one, base)
            self.kept += [(one, array) for array in kept]
        return total

    def _loop(self, one: Instruction) -> _Total:
        times = trip_count(self.module, one, self.trips)
        self.loops[one.name] = times
        total = _Total()
        for callee in one.called("body", "condition"):
            total.add(self.sequence(callee), times)
        return total

    def _products(self, one: Instruction, base: str) -> _Total:
        """FLOPs and exchanges of one instruction that is no loop, branch or call."""
        total = _Total()
        if base == "fusion":
            total.add(self.inside(one.called("calls")[0]))
        elif base == "dot":
            total.flops["dot"] = dot_flops(self.module[one.computation], one)
        elif base == "convolution":
            total.flops["convolution"] = convolution_flops(self.module[one.computation], one)
        elif base in COLLECTIVES:
            if not continues(self.module[one.computation], one):
                key, size = self._exchange(one, base)
                total.exchange(key, 1, size)
        elif base == "send":
            key, size = self._between_slices(one)
            total.exchange(key, 1, size)
        elif base == "recv":
            pass  # the send has counted it
        elif base == "custom-call":
            name, flops = self._kernel(one)
            if flops:
                total.flops[name] = flops
        elif base not in _PLAIN:
            raise HloError(f"{one}: an operation that is not known here; its work cannot be counted")
        for callee in one.called("to_apply"):
            if self.inside(callee).flops:
                raise HloError(f"{one}: applies %{callee}, which has products, how often is not known here")
        return total

    def _exchange(self, one: Instruction, base: str) -> tuple[_Key, int]:
        size = self._operand_bytes(one)
        among = of_instruction(one, self.module.devices)
        if base == "all-gather":
            return (base, among, False), size * max(map(len, among))
        if base == "all-reduce" and self._scatters(one):
            return ("reduce-scatter", among, False), size
        return (base, among, False), size

    def _between_slices(self, one: Instruction) -> tuple[_Key, int]:
        """TPU's compiler hands an exchange between slices to the hosts: what is sent, to which slices, as what."""
        kind = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', one.tail)
        base = kind[1].lower().replace("_", "-") if kind else ""
        slices = _slices(one.tail)
        if base not in COLLECTIVES or not slices:
            raise HloError(f"{one}: sends to where or as what is not known here: {one.tail[:200]!r}")
        return (base, (slices,), True), self._operand_bytes(one) * (len(slices) if base == "all-gather" else 1)

    def _operand_bytes(self, one: Instruction) -> int:
        computation = self.module[one.computation]
        return sum(array.bytes for operand in one.operands for array in computation[operand].arrays)

    def _scatters(self, one: Instruction) -> bool:
        """TPU's compiler may write a reduce-scatter as a fusion: an all-reduce of which each device slices its part."""
        computation = self.module[one.computation]
        if computation.name == self.module.entry:
            return False
        direct = computation.users[one.name]
        users = [user for user in direct if user.opcode != "get-tuple-element"]
        users += [far for user in direct if user.opcode == "get-tuple-element" for far in computation.users[user.name]]
        parts = [user for user in users if user.opcode == "dynamic-slice"]
        return bool(parts) and len(parts) == len(users) and "partition-id" in {other.opcode for other in computation}

    def _kernel(self, one: Instruction) -> tuple[str, float]:
        """A custom call's name and FLOPs: the caller's, or the text's."""
        target = one.attribute("custom_call_target").strip('"')
        named = [name for name in self.kernels if name in one.name or name in one.op_name or name == target]
        if named:
            name = max(named, key=len)
            cost = self.kernels[name]
            computation = self.module[one.computation]
            operands = tuple(array for operand in one.operands for array in computation[operand].arrays)
            return name, cost(operands) if callable(cost) else float(cost)
        if target in _NO_PRODUCTS:
            return target, 0.0
        config = backend_config(one).get("custom_call_config")
        estimate = config.get("cost_estimate") if isinstance(config, dict) else None
        if isinstance(estimate, dict) and "flops" in estimate:
            return one.name.rpartition(".")[0] or one.name, float(estimate["flops"])
        raise HloError(
            f"{one}: the text does not tell the FLOPs of {target!r} ({one.op_name or 'no op_name'}); "
            "give them by a part of its name"
        )


def _slices(text: str) -> tuple[int, ...]:
    """Numbers of the slices that a send's target names: "{1,2}x{0:15}", slices and chips of each, or lists of devices,
    whose numbers begin with their slice's times 100,000. Empty when it names none."""
    by_slice = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{[\d,:]+\}"', text)
    by_device = re.search(r"_xla_megascale_target=\{((?:\{[\d,]+\},?)+)\}", text)
    if by_slice:
        return tuple(int(number) for number in by_slice[1].split(","))
    numbers = {int(number) // 100_000 for number in re.findall(r"\d+", by_device[1])} if by_device else set()
    return tuple(sorted(numbers))


def _largest(kept: list[tuple[Instruction, Array]]) -> tuple[Buffer, ...]:
    by_shape: dict[str, list[tuple[Instruction, Array]]] = {}
    for one, array in kept:
        by_shape.setdefault(array.shape, []).append((one, array))
    buffers = (
        Buffer(found[0][0].name, found[0][0].opcode, shape, max(array.padded_bytes for _, array in found), len(found))
        for shape, found in by_shape.items()
    )
    return tuple(sorted(buffers, key=lambda buffer: -buffer.bytes))
