"""Writes a program's kernels in Triton's language, forward and backward over time.

The templates below are the kernels, but for the lines of the step and of its adjoint. States are
named ``s0``, ``s1`` ..., coefficients ``c0`` ..., the surrogate's numbers ``w0`` ..., constants
``k0`` ..., the gradients that arrive at the states ``_g1`` ..., and lines as in the trace. One
source serves all dtypes and shapes.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence

from snn_lib.kernels.inputs import BLOCK
from snn_lib.kernels.program import Adjoint, Product, Program
from snn_lib.kernels.trace import SIGNS, Line, Trace, Value

BEGIN = """
    b, n, lane, step, channels = locate_lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    place = b * channels + n
    dtype: tl.constexpr = coefficients.dtype.element_ty
    key, first = number_elements(seed, place)
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b, b < batch, 0), 0), steps)
    {constants}
    {coefficients}
"""
FORWARD = """
import triton.language as tl

from snn_lib.kernels.cuda.lanes import *
from snn_lib.kernels.cuda.launching import STAGES, UNROLL, jit


@jit
def kernel(
    x, coefficients, state, lengths, seed, output, last, checkpoints,
    KEEP: tl.constexpr, dropout: tl.float64, steps, batch, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):
    {begin}
    {load_state}
    x, x_step = address_of(x, 0, b, n, NEIGHBOURS)
    output += place
    last += place
    checkpoints += place
    index = first
    if lengths is not None:
        ends = lane & (length == 0)
        {store_last}
    for t in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if KEEP:
            if (t % {block} == 0) & (t > 0):
                {store_checkpoint}
        {step}
        tl.store(output, {output}, lane)
        {advance}
        if lengths is not None:
            ends = lane & (length == t + 1)
            {store_last}
        x += x_step
        output += step
        index += step.to(tl.uint32)
    if lengths is None:
        ends = lane
        {store_last}
"""
BACKWARD = """
import triton.language as tl

from snn_lib.kernels.cuda.lanes import *
from snn_lib.kernels.cuda.launching import STAGES, UNROLL, jit


@jit
def kernel(
    x, coefficients, state, lengths, seed, grad_output, grad_last, checkpoints, again,
    grad_x, sums, grad_state, {numbers}dropout: tl.float64, steps, batch, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):
    {begin}
    {load_numbers}
    {load_last}
    {begin_sums}
    blocks = tl.cdiv(steps, {block})
    for done in tl.range(blocks):
        # A block of steps, the last one first.
        block = (blocks - 1 - done).to(tl.int64)
        begin = block * {block}
        count = tl.minimum(steps - begin, {block}).to(tl.int32)
        end = begin + count
        {replay}
        x_at, x_step = address_of(x, end - 1, b, n, NEIGHBOURS)
        grad_at, grad_step = address_of(grad_output, end - 1, b, n, NEIGHBOURS)
        grad_x_at = grad_x + (end - 1) * step + place
        states = again + (count - 1) * {rows} * step + place
        index = first + ((end - 1) * step).to(tl.uint32)
        for t in tl.range(count, num_stages=STAGES, loop_unroll_factor=UNROLL):
            if lengths is not None:
                ends = length == end - t
                {add_last}
            {load_states}
            _g0 = tl.load(grad_at, lane, 0.0).to(dtype)
            {step}
            {add_sums}
            {store_x}
            {retreat}
            x_at -= x_step
            grad_at -= grad_step
            grad_x_at -= step
            states -= {rows} * step
            index -= step.to(tl.uint32)
        tl.debug_barrier()  # all threads have read the states before they are written again
    if lengths is not None:
        ends = length == 0
        {add_last}
    {store_sums}
    {store_gradients}
"""
# The states before each step of a block are computed again.
REPLAY = """
{load_first}
x_at, x_step = address_of(x, begin, b, n, NEIGHBOURS)
states = again + place
index = first + (begin * step).to(tl.uint32)
for _ in tl.range(count, num_stages=STAGES, loop_unroll_factor=UNROLL):
    {store_states}
    {step}
    {advance}
    x_at += x_step
    states += {rows} * step
    index += step.to(tl.uint32)
tl.debug_barrier()  # from here on all threads see what is written
"""
OWN = {"tanh": "tanh", "round": "rounded"}  # functions of ``lanes``


def forward_source(made: Program) -> str:
    """The kernel that runs a program over time."""
    text = _Text(made)
    output, *after = made.forward.results
    return _fill(
        FORWARD,
        load_state=text.states("{} = load_row(state, {}, b, n, lane)"),
        store_last=text.states("tl.store(last + {1} * step, {0}, ends)"),
        store_checkpoint=[
            *text.states("tl.store(checkpoints + {1} * step, {0}, lane)"),
            f"checkpoints += {len(made.states)} * step",
        ],
        step=text.step(made.forward, "x"),
        output=text.value(output),
        block=str(BLOCK),
        advance=text.assign(text.states(), after),
        begin=text.begin(),
    )


def backward_source(adjoint: Adjoint) -> str:
    """The kernel of a program's gradients, backward over time."""
    made, numbers = adjoint.program, adjoint.numbers
    text = _Text(made, numbers)
    read = [f"s{row}" for row, name in enumerate(made.states) if name in adjoint.states]
    arriving = list(enumerate(adjoint.arriving))
    sums = list(enumerate(adjoint.sums.values()))
    count = len(made.states)
    replay = _fill(
        REPLAY,
        load_first=text.states(
            f"{{}} = load_first(state, checkpoints, block, {{}}, {count}, b, n, lane, place, step)"
        ),
        store_states=[f"tl.store(states + {k} * step, {s}, lane)" for k, s in enumerate(read)],
        step=text.step(adjoint.again, "x_at"),
        advance=text.assign(text.states(), adjoint.again.results),
        rows=str(len(read)),
    )
    zeros = "tl.zeros((ROWS, COLUMNS), tl.float64)"
    return _fill(
        BACKWARD,
        numbers="".join(f"number{k}: tl.float64, " for k, _ in enumerate(numbers)),
        load_numbers=[
            f"w{k} = tl.full((ROWS, COLUMNS), number{k}, dtype)" for k, _ in enumerate(numbers)
        ],
        load_last=[
            line
            for row, g in arriving
            for line in (
                f"last{row} = load_row(grad_last, {row}, b, n, lane)",
                f"{g} = last{row} if lengths is None else tl.zeros((ROWS, COLUMNS), dtype)",
            )
        ],
        begin_sums=[f"sum{k} = {zeros}" for k, _ in sums],
        replay=replay.splitlines() if read else [],
        rows=str(len(read)),
        block=str(BLOCK),
        add_last=[f"{g} = tl.where(ends, {g} + last{row}, {g})" for row, g in arriving],
        load_states=[f"{s} = tl.load(states + {k} * step, lane, 0.0)" for k, s in enumerate(read)],
        step=text.step(adjoint.step, "x_at"),
        add_sums=[line for k, parts in sums for line in text.add_to(f"sum{k}", parts)],
        store_x=[f"tl.store(grad_x_at, {text.value(adjoint.x)}, lane)"] * adjoint.need_x,
        retreat=text.assign(adjoint.arriving, adjoint.carried),
        store_sums=[f"store_partial_sums(sums, sum{k}, {k}, batch, channels, n)" for k, _ in sums],
        store_gradients=[
            f"tl.store(grad_state + {row} * step + place, {g}, lane)" for row, g in arriving
        ],
        begin=text.begin(),
    )


class _Text:
    """Lines of Triton's language.

    Attributes:
        names: by its name in the trace, what an input is called here.
    """

    def __init__(self, made: Program, numbers: Sequence[str] = ()) -> None:
        groups = ("s", made.states), ("c", made.coefficients), ("w", numbers)
        self.names = {"x": "x_now", "dropout_scale": "dropout_scale"}
        self.names |= {own: f"{letter}{k}" for letter, g in groups for k, own in enumerate(g)}
        self._program = made
        self._constants: dict[float, str] = {}

    def states(self, template: str = "{}") -> list[str]:
        """A line for each state; the template is given its name and its number."""
        return [template.format(f"s{row}", row) for row, _ in enumerate(self._program.states)]

    def begin(self) -> list[str]:
        """The lines before the loop; to be asked for last, when all constants are known."""
        rows = range(len(self._program.coefficients))
        return _fill(
            textwrap.dedent(BEGIN),
            constants=[
                f"{name} = tl.full((ROWS, COLUMNS), {_number(value)}, dtype)"
                for value, name in self._constants.items()
            ],
            coefficients=[
                f"c{row} = load_coefficient(coefficients, {row}, n, channels, ROWS)" for row in rows
            ],
        ).splitlines()

    def value(self, value: Value) -> str:
        """The name of a value, or of a constant."""
        if isinstance(value, str):
            return self.names.get(value, value)
        return self._constants.setdefault(value, f"k{len(self._constants)}")

    def step(self, trace: Trace, x: str) -> list[str]:
        """The lines of a trace, and what they read at each step; ``x`` is the address of x."""
        reads_x, drops = trace.reads("x"), trace.reads("dropout_scale")
        return [
            *[f"x_now = tl.load({x}, lane, 0.0).to(dtype)"] * reads_x,
            *["dropout_scale = factor_of(seed, key, index, dropout, lane, dtype)"] * drops,
            *(f"{line.name} = {self._expression(line)}" for line in trace.lines),
        ]

    def _expression(self, line: Line) -> str:
        name, arguments = line.operation, [self.value(one) for one in line.arguments]
        if name in SIGNS:
            return f" {SIGNS[name]} ".join(arguments)
        if name in ("neg", "logical_not"):
            return ("-" if name == "neg" else "~") + arguments[0]
        if name in ("maximum", "minimum"):
            arguments.append("propagate_nan=tl.PropagateNan.ALL")
        return f"{OWN.get(name, f'tl.{name}')}({', '.join(arguments)})"

    def assign(self, names: Sequence[str], values: Iterable[Value]) -> list[str]:
        """Gives all names their new values at once."""
        values = ", ".join(map(self.value, values))
        return [f"{', '.join(names)} = {values}"] if names else []

    def add_to(self, total: str, products: Sequence[Product]) -> list[str]:
        """Adds a coefficient's gradient, in double precision, to its sum.

        A product of two floats is then exact, so it may be fused with the sum.
        """
        lines = []
        for negative, factors in products:
            sign = "-" if negative else ""
            a, *b = (f"{self.value(factor)}.to(tl.float64)" for factor in factors)
            lines.append(f"{total} = tl.fma({sign}{a}, {b[0] if b else '1.0'}, {total})")
        return lines


def _number(value: float) -> str:
    return repr(value) if value - value == 0 else f'float("{value}")'


def _fill(template: str, **blocks: str | Sequence[str]) -> str:
    """A template with its blocks: lists stand in lines of their own, and are indented as these."""

    def block(found: re.Match) -> str:
        return textwrap.indent("\n".join(blocks[found[2]] or ["pass"]), found[1])

    lists = "|".join(name for name, lines in blocks.items() if not isinstance(lines, str))
    text = re.sub(rf"^( *)\{{({lists})\}}$", block, template.strip("\n"), flags=re.MULTILINE)
    for name, inline in blocks.items():
        text = text.replace(f"{{{name}}}", inline) if isinstance(inline, str) else text
    return text + "\n"
