"""Writes one time step of a trained network as C99, in floats or in integers.

The two differ in how arithmetic is spelled, and in how rows of weights are added up. Structs, loops
over layers, and readouts are the same. The lines of a step are those of its trace.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

import snn_lib
from snn_lib.files import write_atomically
from snn_lib.inference.description import preparation_of
from snn_lib.inference.integers import FAR_BEHIND, NEAR_LIMIT, IntegerNetwork, StagedIntegers
from snn_lib.inference.stages import Gather, Pool, Rows, Stage, Step, Windows
from snn_lib.inference.staging import (
    StagedNetwork,
    check_classes,
    read_stages,
    warn_of_far_channels,
)
from snn_lib.kernels.trace import Line

# How C writes the operations of a step. It has no others without the library of mathematics.
SPELLING = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "maximum": "{0} > {1} ? {0} : {1}",
    "minimum": "{0} < {1} ? {0} : {1}",
    "abs": "{0} < 0 ? -{0} : {0}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "logical_and": "{} && {}",
    "logical_or": "{} || {}",
    "logical_not": "!{}",
    "where": "{} ? {} : {}",
    "round": "rounded(state, {}, {}, {})",
}
FLOAT_MAX = float(np.finfo(np.float32).max)
SIZES = {
    **{"double": 8, "float": 4, "int32_t": 4, "uint32_t": 4},
    **{"uint16_t": 2, "int16_t": 2, "uint8_t": 1},
}

ROUNDED = """
/* value / 2^shift, rounded to the nearest integer (halves up) and held in so many bits. What is
   shifted has no sign, because C does not say what the shift of a negative number is. */
static inline int32_t rounded({name}_state *state, int64_t value, int shift, int bits)
{{
    const uint64_t limit = (uint64_t)1 << (bits - 1), half = ((uint64_t)1 << shift) >> 1;
    const uint64_t up = (uint64_t)value + (limit << shift) + half;
    if (up >> (shift + bits) != 0) {{
        state->saturated += state->saturated < UINT32_MAX;
        return value < 0 ? -(int32_t)limit : (int32_t)(limit - 1);
    }}
    return (int32_t)(up >> shift) - (int32_t)limit;
}}
"""
SHIFT_SUMS = """
/* Only the differences of the sums count: when one nears its limit, all lose the largest. One that
   is far behind stays there, which changes no class. */
static inline void shift_sums({name}_state *state)
{{
    int32_t largest = state->{sums}[0], near = 0;
    for (int32_t n = 0; n < {big}_OUTPUTS; n++) {{
        const int32_t sum = state->{sums}[n];
        largest = sum > largest ? sum : largest;
        near |= sum >= {limit} || sum <= -{limit};
    }}
    for (int32_t n = 0; near && n < {big}_OUTPUTS; n++) {{
        const int64_t behind = (int64_t)state->{sums}[n] - largest;
        state->{sums}[n] = behind < {least} ? {least} : (int32_t)behind;
    }}
}}
"""
# A word holds several weights, each plus half its range. Their sums grow in halves of words. What a
# loop adds up stays in registers: eight sums of spikes or more, and those of a word for products.
ADD_ROWS = """
/* Adds up the rows of weights of the inputs that fired. A word holds weights of {bits} bits, plus
   {bias} each. They add up in halves of a word: so at most {most} rows at once. */
static void add_rows(const uint32_t *weights, int32_t words, const {at} *at, int32_t count,
                     int32_t *sum)
{{
    for (int32_t j = 0; j < words; j += {words}, sum += {sums}) {{
        int32_t first = 0, {totals};
        do {{
            const int32_t end = count - first < {most} ? count : first + {most};
            uint32_t {parts};
            for (; first < end; first++) {{
                const uint32_t *const row = weights + at[first] * words + j;
{adds}
            }}
{unpacks}
        }} while (first < count);
{stores}
    }}
}}
"""
ADD_PRODUCTS = """
/* Adds up the rows of weights of the inputs that are not zero, each times its input. A word holds
   {in_word} weights of {bits} bits, plus {bias} each. The sums fit, whatever is lost on the way. */
static void add_products(const uint32_t *weights, int32_t words, const {at} *at,
                         const int16_t *amount, int32_t count, int32_t *sum)
{{
    uint32_t all = 0;
    for (int32_t k = 0; k < count; k++)
        all -= {bias}U * (uint32_t)amount[k];
    for (int32_t j = 0; j < words; j++, sum += {in_word}) {{
        uint32_t {totals};
        for (int32_t k = 0; k < count; k++) {{
            const uint32_t word = weights[at[k] * words + j], x = (uint32_t)amount[k];
{adds}
        }}
{stores}
    }}
}}
"""
SIGNED = """
/* The number with a sign that has the same bits. */
static inline int32_t with_sign(uint32_t bits)
{{
    return (int32_t)((int64_t)(bits ^ 0x80000000U) - 2147483648LL);
}}
"""
ADD_FLOATS = """
/* Adds up the rows of weights of the inputs that are not zero, each times its input. */
static void add_products(const {number} *weights, int32_t outputs, const {at} *at,
                         const {number} *amount, int32_t count, {number} *sum)
{{
    for (int32_t n = 0; n < outputs; n++)
        sum[n] = 0;
    for (int32_t k = 0; k < count; k++)
        for (int32_t n = 0; n < outputs; n++)
            sum[n] += amount[k] * weights[at[k] * outputs + n];
}}
"""


def to_c(
    network: "nn.Module | IntegerNetwork",
    path: str | Path,
    shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    step: str | None = None,
) -> None:
    """Writes one time step of a trained network as C, for a microcontroller.

    ``network.c`` and ``network.h`` are C99 and need no library but its ``memset``, no memory but
    what they are given, and floats of IEEE 754. ``network_state`` holds what a stream remembers:
    there may be several. The step computes what the network does in evaluation mode, with the
    preparation of its input as in :func:`snn_lib.inference.to_onnx`. Sums of weights are added up
    in another order than in PyTorch. If the readout of the network is ``count``, ``mean``, ``last``
    or ``maximum``, or it answers at every step, ``network_class`` says which class leads, and
    ``network_lead`` by how much.

    Args:
        network: what :func:`snn_lib.inference.compiled` takes, without :class:`snn_lib.Recurrent`;
            it is written in floats. Or what :func:`snn_lib.inference.quantise` returns, in
            integers.
        path: the file to write, ``.c``; a file ``.h`` is written beside it. All names that the
            linker sees begin with the file's, which has to be a name in C.
        shape: as in :func:`snn_lib.inference.compiled`; of no use for integers.
        classes, step: as in :func:`snn_lib.inference.to_onnx`, but with a name for each output, or
            none. If a readout of your own makes the classes of the outputs, the C source has none.

    Raises:
        ValueError: the name does not fit, a step computes what needs the library of mathematics, or
            as :func:`snn_lib.inference.to_onnx`.
        RunError: as :func:`snn_lib.inference.to_onnx`.

    Warns:
        UserWarning: as :func:`snn_lib.inference.to_onnx`, of a network in floats.
    """
    if isinstance(network, IntegerNetwork):
        read = network.staged
        classes = check_classes(read.classes if classes is None else classes, read.after)
        write_c(replace(read, classes=classes, step=read.step if step is None else step), path)
    else:
        read = read_stages(network, shape, classes, step)
        warn_of_far_channels(preparation_of(network), read.dtype)
        write_c(read, path)


def write_c(read: StagedNetwork, path: str | Path) -> None:
    """Writes the two files of a network in stages, see :func:`to_c`."""
    path = Path(path)
    if path.suffix != ".c" or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", path.stem):
        raise ValueError(f"{path.name}: expected a name in C with the ending .c, such as network.c")
    source = _Source(read, path.stem)
    write_atomically(path, source.text().encode())
    write_atomically(path.with_suffix(".h"), source.header().encode())


READ_OUT = """
int32_t {name}_class(const {name}_state *state)
{{
    int32_t best = 0;
    for (int32_t n = 1; n < {big}_OUTPUTS; n++)
        if (state->answer[n] > state->answer[best])
            best = n;
    return best;
}}

{name}_output {name}_lead(const {name}_state *state)
{{
    const int32_t best = {name}_class(state);
    int32_t second = best == 0;
    for (int32_t n = 0; n < {big}_OUTPUTS; n++)
        if (n != best && state->answer[n] > state->answer[second])
            second = n;
    return state->answer[best] - state->answer[second];
}}
"""


@dataclass(frozen=True)
class _Values:
    """Where values lie: in an array of C, in the order of an index if there is one."""

    array: str
    index: str = ""

    def at(self, place: str) -> str:
        """Value number ``place`` in C."""
        return f"{self.array}[{self.index}[{place}]]" if self.index else f"{self.array}[{place}]"


class _Source:
    """The C source of a network in stages, whose names begin with ``name``.

    Attributes:
        tables, helpers: the constants and functions before the step, as text.
        flash: bytes of the tables.
        states, room: the arrays of the struct, type and length: what a stream remembers, and what
            one step needs.
        additions, products, others: operations of a step at most: at the weights, and elsewhere.
    """

    def __init__(self, read: StagedNetwork, name: str) -> None:
        self.staged, self.name = read, name
        self.integers = isinstance(read, StagedIntegers)
        self.number = "int32_t" if self.integers else {4: "float", 8: "double"}[read.dtype.itemsize]
        self.tables: list[str] = []
        self.helpers: dict[str, str] = {}
        self.states: dict[str, tuple[str, int]] = {}
        self.places: dict[str, str] = {}  # of states in C, by the names of step and state
        self.room: dict[str, tuple[str, int]] = {}
        self.flash = self.additions = self.products = self.others = 0
        rows = [stage for stage in read.stages if isinstance(stage, Rows)]
        self._place = _unsigned(max((stage.weights.shape[1] for stage in rows), default=0))
        self._lines: list[str] = []
        self._depth, self._locals = 1, 0
        self._names: set[str] = set()
        self._write_step()

    # ---------------------------------------------------------------------------------------------
    # The two files

    def header(self) -> str:
        """The text of the file ``.h``."""
        read, name, big = self.staged, self.name, self.name.upper()
        lines = [
            f"/* {name}.h: {read.title}, a time step at a time; {name}.c says what it takes. */",
            *(f"#ifndef {big}_H", f"#define {big}_H", "", "#include <stdint.h>", ""),
            *("#ifdef __cplusplus", 'extern "C" {', "#endif", ""),
            f"#define {big}_INPUTS {math.prod(read.before)}",
            f"#define {big}_OUTPUTS {math.prod(read.after)}",
        ]
        if isinstance(read, StagedIntegers):
            lines += [
                f"#define {big}_INPUT_MIN ({read.input_limits[0]})",
                f"#define {big}_INPUT_MAX {read.input_limits[1]}",
                f"#define {big}_INPUT_SCALE {read.input_scale!r} /* what a 1 of x stands for */",
                f"#define {big}_OUTPUT_SCALE {read.output_scale!r} /* what a 1 of y stands for */",
            ]
            if read.readout is not None:
                scale = f"{read.lead_scale!r} /* what a 1 of the lead stands for */"
                lines.append(f"#define {big}_LEAD_SCALE {scale}")
        kind = read.input_kind if isinstance(read, StagedIntegers) else self.number
        lines += ["", f"typedef {kind} {name}_input;", f"typedef {self.number} {name}_output;", ""]
        lines += [
            f"/* What a stream remembers, and the room for a step: {self._ram():,} bytes. */",
            "typedef struct {",
            *(f"    {kind} {key}[{n}];" for key, (kind, n) in self._members().items()),
        ]
        counts = (
            "    uint32_t saturated; /* values that did not fit: if any, do not trust the class */"
        )
        lines += [counts] * self.integers
        begins = "/* Begins a new sequence. Call it before the first step"
        begins += "; it clears `saturated`. */" if self.integers else ". */"
        lines += [
            *(f"}} {name}_state;", ""),
            *(begins, f"void {name}_reset({name}_state *state);", ""),
            f"/* Runs a time step, from {big}_INPUTS values x to {big}_OUTPUTS values y. */",
            f"void {name}_step({name}_state *state, const {name}_input *x, {name}_output *y);",
        ]
        if read.readout is not None:
            lines += [
                *("", "/* Which class leads after the steps so far, and by how much. */"),
                f"int32_t {name}_class(const {name}_state *state);",
                f"{name}_output {name}_lead(const {name}_state *state);",
            ]
        if read.classes:
            lines += ["", f"extern const char *const {name}_classes[{big}_OUTPUTS];"]
        if read.order is not None:
            lines += [
                *("", "/* Which pixel of the image is next, counted row by row. */"),
                f"extern const uint16_t {name}_order[{len(read.order)}];",
            ]
        lines += ["", "#ifdef __cplusplus", "}", "#endif", "", "#endif", ""]
        return "\n".join(lines)

    def text(self) -> str:
        """The text of the file ``.c``."""
        read, name = self.staged, self.name
        parts = [self._head(), f'\n#include "{name}.h"\n\n#include <string.h>\n']
        if read.classes:
            named = f"const char *const {name}_classes[{name.upper()}_OUTPUTS]"
            parts.append(_table(named, map(_quoted, read.classes)))
        if read.order is not None:
            parts.append(_table(f"const uint16_t {name}_order[{len(read.order)}]", read.order))
        parts += [*self.tables, *self.helpers.values()]
        reset, body = "    memset(state, 0, sizeof *state);", "\n".join(self._lines)
        used = re.search(r"\bstate(->|[,)])", body)  # names of layers may contain these words
        unused = "" if used else "    (void)state;\n"
        counts = "    int32_t count;\n" if re.search("^ *count = 0;", body, re.MULTILINE) else ""
        arguments = f"{name}_state *state, const {name}_input *x, {name}_output *y"
        parts += [
            f"\nvoid {name}_reset({name}_state *state)\n{{\n{reset}\n}}\n",
            f"\nvoid {name}_step({arguments})\n{{\n{counts}{unused}{body}\n}}\n",
        ]
        if read.readout is not None:
            parts.append(READ_OUT.format(name=name, big=name.upper()))
        return "".join(parts)

    def _members(self) -> dict[str, tuple[str, int]]:
        """The arrays of the struct, widest numbers first, so that nothing lies between them."""
        arrays = {**self.states, **self.room}
        if not arrays and not self.integers:
            arrays = {"nothing": ("uint8_t", 1)}  # C has no empty structs
        return dict(sorted(arrays.items(), key=lambda item: -SIZES[item[1][0]]))

    def _ram(self) -> int:
        """The bytes of the struct."""
        members = self._members().values()
        widest = max([SIZES[kind] for kind, _ in members] + [4] * self.integers)
        ram = sum(SIZES[kind] * n for kind, n in members) + 4 * self.integers
        return -(-ram // widest) * widest

    def _head(self) -> str:
        """The comment at the beginning of the file ``.c``."""
        read = self.staged
        before, after = (" x ".join(map(str, shape)) for shape in (read.before, read.after))
        if isinstance(read, StagedIntegers):
            low, high = read.input_limits
            takes = f"{read.input_kind}, {low} to {high}, times {read.input_scale:g}: {read.takes}"
            gives = f"int32_t, times {read.output_scale:g}"
            arithmetic = [
                f"integers: weights of {read.weight_bits} bits, factors of 24, states of 31.",
                "What does not fit is held at the limit, and counted in `saturated`.",
            ]
        else:
            takes, gives = f"{self.number}, {read.takes}", self.number
            arithmetic = [f"{self.number}, as IEEE 754 defines it"]
        rows = {
            "input": [f"{before}, {takes}"],
            "output": [f"{after}, {gives}"],
            "time step": [_remark(read.step) or "as in the training"],
            "flash": [f"{self.flash:,} bytes of tables"],
            "RAM": [f"{self._ram():,} bytes for each stream"],
            "operations": [
                f"of a step at most {self.additions:,} additions and {self.products:,} products",
                f"at the weights, and {self.others:,} products of filters and neurons",
            ],
            "arithmetic": arithmetic,
        }
        digest = hashlib.sha256("".join(self.tables).encode()).hexdigest()[:12]
        lines = [
            f"/* {self.name}.c: one time step of {read.title}, written by snn_lib "
            f"{snn_lib.__version__}; its tables are {digest} (SHA-256).",
            "",
        ]
        for key, (first, *more) in rows.items():
            lines += [f"   {key + ':':<12}{first}", *(f"   {'':<12}{text}" for text in more)]
        return "\n".join(lines) + " */\n"

    # ---------------------------------------------------------------------------------------------
    # The body of a step

    def _write_step(self) -> None:
        values, steps = _Values("x"), []  # steps that are still to be written, as one loop
        for stage in _needed(self.staged.stages):
            match stage:
                case Step():
                    steps = [*steps, stage]
                    continue
                case Gather(index=index):
                    place = self._add_table("place", _unsigned(index.max()), index)
                    values = _Values(self._stored(steps, values).array, place)
                case Rows():
                    values = self._rows(stage, steps, values)
                case Pool():
                    values = self._pool(stage, self._stored(steps, values))
            steps = []
        self._loop(steps, values, math.prod(self.staged.after), self._end)
        if isinstance(self.staged, StagedIntegers) and self.staged.answers_are_sums:
            sums = [self.places[f"{step.name}.sum"] for step in self.staged.readout or ()]
            names = {"name": self.name, "big": self.name.upper(), "sums": sums[0]}
            self.helpers["shift_sums"] = SHIFT_SUMS.format(
                **names, limit=NEAR_LIMIT, least=FAR_BEHIND
            )
            self._line("shift_sums(state);")

    def _end(self, value: str) -> None:
        """A value of the output is returned, and read out."""
        self._line(f"y[n] = {value};")
        for step in self.staged.readout or ():
            self.states["answer"] = self.number, step.channels
            self._line(f"state->answer[n] = {self._lines_of(step, value)};")

    def _stored(self, steps: list[Step], values: _Values) -> _Values:
        """The values after some steps, in an array."""
        if not steps:
            return values
        count = steps[0].positions * steps[0].channels
        in_place = values.array != "x" and not values.index
        there = values if in_place else self._other(values, count)
        self._loop(steps, values, count, lambda value: self._line(f"{there.at('n')} = {value};"))
        return there

    def _other(self, values: _Values, count: int) -> _Values:
        """Room for so many values, not where these are."""
        name = "b" if values.array == "state->a" else "a"
        self._reserve(name, self.number, count)
        return _Values(f"state->{name}")

    def _reserve(self, name: str, kind: str, count: int) -> None:
        _, length = self.room.get(name, (kind, 0))
        self.room[name] = kind, max(count, length)

    def _loop(
        self, steps: Sequence[Step], values: _Values, count: int, use: Callable[[str], None]
    ) -> None:
        """A loop with the lines of some steps, which hands the result of each value n on."""
        maps = [s for s in steps if s.positions > 1 and any(map(_differs, s.coefficients.values()))]
        if steps:
            self._line(f"/* {', '.join(dict.fromkeys(_plain(step.name) for step in steps))} */")
        with ExitStack() as loops:
            if maps:  # whose positions share coefficients
                begin, end = f"for (int32_t p = 0, n = 0; p < {maps[0].positions}; p++)", maps[0]
                loops.enter_context(self._block(begin))
                loops.enter_context(
                    self._block(f"for (int32_t c = 0; c < {end.channels}; c++, n++)")
                )
            else:
                loops.enter_context(self._for("n", count))
            value, self._locals = values.at("n"), 0
            for step in steps:
                value = self._lines_of(step, value)
            use(value)

    def _lines_of(self, step: Step, x: str) -> str:
        """Writes the lines of a step, and returns its output."""
        names = {"x": x if x.isidentifier() else self._local(self.number, x)}
        for key, row in step.coefficients.items():
            names[key] = self._coefficient(step, key, row)
        places = {}
        for state in step.states:
            place = self._unique(_identifier(f"{step.name}.{state}"))
            self.states[place] = self.number, step.positions * step.channels
            self.places[f"{step.name}.{state}"] = place
            places[state] = f"state->{place}[n]"
            names[state] = self._local(self.number, places[state])
        for line in step.trace.lines:
            names[line.name] = self._result_of(line, step, names)
        output, *after = (self._value(result, names) for result in step.trace.results)
        for state, value in zip(step.states, after, strict=True):
            self._line(f"{places[state]} = {value};")
        return output

    def _result_of(self, line: Line, step: Step, names: dict[str, str]) -> str:
        values = [self._value(value, names) for value in line.arguments]
        for value in line.arguments:
            if self.number == "float" and isinstance(value, float) and abs(value) > FLOAT_MAX:
                raise ValueError(
                    f"layer {step.name} computes with {value}, which C has no number for in float32"
                )
        wide = line.name in step.wide
        if line.operation == "round":
            self.helpers["rounded"] = ROUNDED.format(name=self.name)
        elif wide and line.operation != "where":
            values[0] = f"(int64_t){values[0]}"
        if line.operation in ("mul", "div"):
            self.others += step.positions * step.channels
        kind = "int" if line.is_condition else "int64_t" if wide else self.number
        return self._local(kind, SPELLING[line.operation].format(*values))

    def _local(self, kind: str, value: str) -> str:
        self._locals += 1
        self._line(f"const {kind} v{self._locals} = {value};")
        return f"v{self._locals}"

    def _value(self, value: str | float, names: dict[str, str]) -> str:
        return names[value] if isinstance(value, str) else self._literal(value)

    def _literal(self, value: float) -> str:
        text = _number(value, self.number)
        return f"({text})" if text.startswith("-") else text

    def _coefficient(self, step: Step, key: str, row: np.ndarray) -> str:
        """A coefficient in C: a number if it is the same everywhere, else an entry of a table."""
        if not _differs(row):
            return self._literal(row.flat[0])
        kind = "int16_t" if self.integers and abs(row).max() < 2**15 else self.number
        table = self._add_table(_identifier(f"{step.name}.{key}"), kind, row.ravel())
        return f"{table}[{'c' if step.positions > 1 and len(row) == 1 else 'n'}]"

    def _rows(self, rows: Rows, steps: list[Step], values: _Values) -> _Values:
        """Weights: the inputs that are not zero are listed, then their rows are added up."""
        w, (groups, inputs, outputs) = rows.windows, rows.weights.shape
        count = groups * outputs * math.prod(w.after[:2])
        reached = int((w.places >= 0).sum()) * w.before[2] * outputs
        self.additions += reached * rows.spikes
        self.products += reached * (not rows.spikes)
        self._reserve("at", self._place, inputs)
        if not rows.spikes:
            self._reserve("amount", "int16_t" if self.integers else self.number, inputs)
        table, stride = self._weights(rows)
        add = "add_rows" if rows.spikes else "add_products"
        amounts = "state->at, " if rows.spikes else "state->at, state->amount, "

        def listed(number: str, value: str) -> None:
            with self._block(f"if ({value} != 0)"):
                self._line(f"state->at[count] = ({self._place}){number};")
                if not rows.spikes:
                    kind = "(int16_t)" if self.integers else ""
                    self._line(f"state->amount[count] = {kind}{value};")
                self._line("count++;")

        if self.integers:  # whole words of the last row
            count += -outputs % _sums_at_once(rows.bits)
        if groups == 1 and w.before[:2] == (1, 1) and np.array_equal(w.places, [[0]]):
            there = self._other(values, count)
            self._line("count = 0;")
            self._loop(steps, values, inputs, lambda value: listed("n", value))
            self._line(f"/* {_plain(rows.name)}: {inputs} x {outputs} */")
            self._line(f"{add}({table}, {stride}, {amounts}count, {there.array});")
            return there

        values = self._stored(steps, values)
        there, (_, width, channels) = self._other(values, count), w.before
        own = channels // groups
        self._line(f"/* {_plain(rows.name)} */")
        with ExitStack() as loops:
            for name, side in (("i", 0), ("j", 1)):
                loops.enter_context(self._for(name, w.after[side]))
            loops.enter_context(self._for("g", groups))
            self._line("count = 0;")
            with self._window(w):
                place = f"(line * {width} + column) * {channels} + g * {own} + c"
                with self._for("c", own):
                    self._line(f"const {self.number} v = {values.at(place)};")
                    listed(f"((k * {w.size[1]} + l) * {own} + c)", "v")
            own_table = f"{table} + g * {inputs * stride}"
            to = f"{there.array} + ((i * {w.after[1]} + j) * {groups} + g) * {outputs}"
            self._line(f"{add}({own_table}, {stride}, {amounts}count, {to});")
        return there

    def _weights(self, rows: Rows) -> tuple[str, int]:
        """The table of weights, and the distance from one row to the next."""
        name = f"{_identifier(rows.name)}_weights"
        if not self.integers:
            self.helpers["add_products"] = ADD_FLOATS.format(number=self.number, at=self._place)
            return self._add_table(name, self.number, rows.weights.ravel()), rows.weights.shape[2]
        bits, bias, mask = rows.bits, 1 << (rows.bits - 1), (1 << rows.bits) - 1
        outputs, in_word, half = rows.weights.shape[2], 32 // bits, 16 // bits
        sums = _sums_at_once(bits)
        filled = np.zeros((*rows.weights.shape[:2], outputs + -outputs % sums), np.int64)
        filled[..., :outputs] = rows.weights
        packed = ((filled + bias).reshape(-1, in_word) << bits * np.arange(in_word)).sum(1)
        known = {
            "bits": bits,
            "bias": bias,
            "at": self._place,
            "sums": sums,
            "words": sums // in_word,
            "most": 0xFFFF // mask,
        }

        def text(depth: int, join: str, line: str, count: int) -> str:
            """A line for each of so many weights: number k, in word w, shifted by s."""
            places = ((k, *divmod(k, in_word)) for k in range(count))
            lines = (line.format(k=k, w=w, s=bits * place) for k, w, place in places)
            return join.join("    " * depth + one for one in lines)

        if rows.spikes:
            both = f"0x{mask | mask << 16:08X}U"
            parts = [(w, place) for w in range(sums // in_word) for place in range(half)]
            unpacks = (
                f"total_{w * in_word + place + half} += (int32_t)(part_{w}_{place} >> 16);\n"
                f"            total_{w * in_word + place} += (int32_t)(part_{w}_{place} & 0xFFFFU);"
                for w, place in parts
            )
            self.helpers["add_rows"] = ADD_ROWS.format(
                totals=text(0, ", ", f"total_{{k}} = -{bias} * count", sums),
                parts=", ".join(f"part_{w}_{place} = 0" for w, place in parts),
                adds="\n".join(
                    f"                part_{w}_{place} += row[{w}] >> {bits * place} & {both};"
                    for w, place in parts
                ),
                unpacks="\n".join(f"            {lines}" for lines in unpacks),
                stores=text(2, "\n", "sum[{k}] = total_{k};", sums),
                **known,
            )
        else:
            self.helpers["with_sign"] = SIGNED.format()
            self.helpers["add_products"] = ADD_PRODUCTS.format(
                totals=text(0, ", ", "total_{k} = all", in_word),
                adds=text(3, "\n", f"total_{{k}} += x * (word >> {{s}} & {mask}U);", in_word),
                stores=text(2, "\n", "sum[{k}] = with_sign(total_{k});", in_word),
                in_word=in_word,
                **known,
            )
        words = filled.shape[-1] // in_word
        return self._add_table(name, "uint32_t", packed), words

    def _pool(self, pool: Pool, values: _Values) -> _Values:
        """The largest value of each window, or their sum."""
        w = pool.windows
        channels, there = w.after[2], self._other(values, math.prod(w.after))
        self._line(f"/* {_plain(pool.name)} */")
        with ExitStack() as loops:
            for name, count in zip("ijc", w.after, strict=True):
                loops.enter_context(self._for(name, count))
            self._line(f"{self.number} pooled = 0;")
            self._line("int32_t found = 0;" if pool.largest else "")
            with self._window(w):
                place = f"(line * {w.before[1]} + column) * {channels} + c"
                self._line(f"const {self.number} v = {values.at(place)};")
                if pool.largest:
                    self._line("pooled = found++ && pooled > v ? pooled : v;")
                else:
                    self._line("pooled += v;")
            self._line(f"{there.at(f'(i * {w.after[1]} + j) * {channels} + c')} = pooled;")
        return there

    @contextmanager
    def _window(self, w: Windows) -> Iterator[None]:
        """Loops over the positions (line, column) of a window that lie inside the map."""
        with ExitStack() as loops:
            for side, (name, tap, out) in enumerate((("line", "k", "i"), ("column", "l", "j"))):
                loops.enter_context(self._for(tap, w.size[side]))
                first = f"{out} * {w.stride[side]} - {w.padding[side]}"
                self._line(f"const int32_t {name} = {first} + {tap} * {w.dilation[side]};")
                self._line(f"if ({name} < 0 || {name} >= {w.before[side]})")
                self._line("    continue;")
            yield

    # ---------------------------------------------------------------------------------------------
    # Text

    def _for(self, name: str, count: int) -> AbstractContextManager[None]:
        return self._block(f"for (int32_t {name} = 0; {name} < {count}; {name}++)")

    @contextmanager
    def _block(self, head: str) -> Iterator[None]:
        self._line(f"{head} {{")
        self._depth += 1
        yield
        self._depth -= 1
        self._line("}")

    def _line(self, text: str) -> None:
        if text:
            self._lines.append("    " * self._depth + text)

    def _add_table(self, name: str, kind: str, numbers: np.ndarray) -> str:
        name = self._unique(name)
        texts = [_number(number, kind) for number in numbers.tolist()]
        self.tables.append(_table(f"static const {kind} {name}[{len(texts)}]", texts))
        self.flash += SIZES[kind] * len(texts)
        return name

    def _unique(self, name: str) -> str:
        """The name, or one like it if it is taken."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


def _needed(stages: Iterable[Stage]) -> list[Stage]:
    """The same stages, without steps that do nothing, and two orders in a row as one."""
    needed: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Step) and stage.hands_on:
            continue
        before = needed[-1] if needed else None
        if isinstance(stage, Gather) and isinstance(before, Gather):
            needed[-1] = Gather(before.index[stage.index])
        else:
            needed.append(stage)
    return needed


def _sums_at_once(bits: int) -> int:
    """How many sums of spikes a loop adds up: eight, or those of a word if it holds more."""
    return max(8, 32 // bits)


def _differs(row: np.ndarray) -> bool:
    """Whether a coefficient is not the same number everywhere."""
    return bool((row != row.flat[0]).any())


def _plain(name: str) -> str:
    """The name of a layer in the module that was trained."""
    return _remark(name.removeprefix("model."))


def _remark(text: str) -> str:
    """A text as a comment may hold it."""
    return " ".join(re.sub(r"[*/]{2,}", "-", text).split())


def _identifier(name: str) -> str:
    """The name of a layer, such as layers.3, as a name in C."""
    name = re.sub(r"\W", "_", _plain(name), flags=re.ASCII)
    return name if name[:1].isalpha() else f"layer_{name}"


def _unsigned(largest: int) -> str:
    return "uint16_t" if largest < 2**16 else "uint32_t"


def _number(value: float, kind: str) -> str:
    """A number in C, with as few digits as tell it from others."""
    if kind == "float":
        return f"{np.format_float_scientific(np.float32(value), trim='0')}f"
    return repr(float(value)) if kind == "double" else str(int(value))


def _quoted(text: str) -> str:
    """A text in C; what is not ASCII as the bytes of UTF-8."""
    return (
        '"'
        + "".join(
            chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}"
            for byte in text.encode()
        )
        + '"'
    )


def _table(name: str, texts: Iterable[object]) -> str:
    """A constant array."""
    lines, line = [], "   "
    for text in texts:
        if len(line) + len(f"{text}") > 97:
            lines.append(line)
            line = "   "
        line += f" {text},"
    return "\n".join([f"\n{name} = {{", *lines, line, "};", ""])
