"""Small changes of a source, each a mistake that a test should notice.

The kept tools for this were looked at and left. mutmut 3 and mutatest have no operators of one's
own, and mutmut skips functions with a decorator, as `@torch.no_grad()`; cosmic-ray has them, but
changes the user's files in place and brings 13 packages; all three take any exit code that is not
0 for a kill, a crash too. None knows what a collective is.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = {
    *("all_reduce", "all_reduce_", "all_gather", "reduce_scatter", "broadcast_"),
    *("copy_to_tensor_parallel_region", "reduce_from_tensor_parallel_region"),
    *("gather_from_tensor_parallel_region", "scatter_to_tensor_parallel_region"),
    *("enter_tensor_parallel_region", "leave_tensor_parallel_region", "own_slice", "own_tokens"),
    *("_Copy.apply", "_Reduce.apply", "_Gather.apply", "_Scatter.apply"),
    *("_GatherTokens.apply", "_ScatterTokens.apply", "sum_over_dp"),
}
STARTED = {"start_all_reduce", "start_all_gather", "start_reduce_scatter"}
CONJUGATES = (
    ("all_gather", "reduce_scatter"),
    ("start_all_gather", "start_reduce_scatter"),
    ("copy_to_tensor_parallel_region", "reduce_from_tensor_parallel_region"),
    ("gather_from_tensor_parallel_region", "scatter_to_tensor_parallel_region"),
    ("enter_tensor_parallel_region", "leave_tensor_parallel_region"),
    ("_Copy.apply", "_Reduce.apply"),
    ("_Gather.apply", "_Scatter.apply"),
    ("_GatherTokens.apply", "_ScatterTokens.apply"),
)
FOR = {**dict(CONJUGATES), **{b: a for a, b in CONJUGATES}}
WORDS = {"forward": "backward", "backward": "forward", "F": "B", "B": "F", "I": "B"}
AXES = {"tp": "dp", "dp": "tp", "pp": "dp"}
OPERATORS: dict[type[ast.AST], tuple[Any, str]] = {
    ast.Lt: (ast.LtE, "<= for <"),
    ast.LtE: (ast.Lt, "< for <="),
    ast.Gt: (ast.GtE, ">= for >"),
    ast.GtE: (ast.Gt, "> for >="),
    ast.Eq: (ast.NotEq, "!= for =="),
    ast.NotEq: (ast.Eq, "== for !="),
    ast.Add: (ast.Sub, "- for +"),
    ast.Sub: (ast.Add, "+ for -"),
    ast.Mult: (ast.FloorDiv, "// for *"),  # a size stays an integer, so that it goes on
    ast.Div: (ast.Mult, "* for /"),
    ast.BitOr: (ast.BitAnd, "& for |"),
    ast.BitAnd: (ast.BitOr, "| for &"),
    ast.And: (ast.Or, "or for and"),
    ast.Or: (ast.And, "and for or"),
}
COMMUTATIVE = {"max", "min", "math.lcm", "torch.promote_types", "isinstance", "getattr", "hasattr"}
# Defaults are what callers leave out, and the rest runs once or says nothing.
SILENT = {"annotation", "returns", "decorator_list", "bases", "defaults", "kw_defaults"}
# What a mutant may call, at the end of its file.
HELPERS = """

def _all_ranks(axis):
    import dataclasses
    import torch.distributed
    ranks = torch.distributed
    if axis.size == 1:
        return axis
    size, rank, group = ranks.get_world_size(), ranks.get_rank(), ranks.group.WORLD
    return dataclasses.replace(axis, size=size, rank=rank, group=group)


def _not_started(tensor, axis):
    from rosetrainer.parallel.comm import Pending
    return Pending(None, axis.ledger, lambda: tensor)
"""


class Mutant(NamedTuple):
    """source[start:stop] of a file, in bytes, is `new`."""

    file: str
    line: int
    kind: str
    start: int
    stop: int
    new: str

    def applied(self, source: bytes) -> bytes:
        helpers = HELPERS if "_all_ranks(" in self.new or "_not_started(" in self.new else ""
        return source[: self.start] + self.new.encode() + source[self.stop :] + helpers.encode()

    def shown(self, source: bytes) -> str:
        """The line as it is and as it becomes, on one line each and without its comment."""
        before, after = source[: self.start], source[self.stop :]
        first, rest = before.rpartition(b"\n")[2], after.partition(b"\n")[0].partition(b"  # ")[0]
        old = first + source[self.start : self.stop] + rest
        new = first + self.new.encode() + rest
        return (
            f"{self.file}: `{' '.join(old.decode().split())}` is `{' '.join(new.decode().split())}`"
        )


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All of a file, each once."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node, kind, new in changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        if source[start:stop].decode() != new:
            found[start, stop, new] = Mutant(file, node.lineno, kind, start, stop, new)
    return list(found.values())


def drawn(mutants: list[Mutant], seed: int) -> list[Mutant]:
    """All, in an order by seed: each kind in its turn, so that rare ones come early too."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in sorted(mutants):
        kinds.setdefault(mutant.kind, []).append(mutant)
    draw = random.Random(seed)
    for some in kinds.values():
        draw.shuffle(some)
    return [some.pop() for _ in mutants for some in kinds.values() if some]


def changes(node: ast.AST) -> Iterator[tuple[Any, str, str]]:
    """(node, kind of change, its new text) of all that runs below a node."""
    yield from changes_of(node)
    for name, value in ast.iter_fields(node):
        if name in SILENT:
            continue
        for child in value if isinstance(value, list) else [value]:
            silent = isinstance(child, (ast.Raise, ast.Assert, ast.JoinedStr)) or is_strict(child)
            if isinstance(child, ast.AST) and not silent:
                yield from changes(child)


def changes_of(node: ast.AST) -> Iterator[tuple[Any, str, str]]:
    if isinstance(node, ast.Call):
        yield from changes_of_call(node)
    elif isinstance(node, ast.Compare):
        operator, kind = OPERATORS.get(type(node.ops[0]), (None, ""))
        if operator:
            ops = [operator(), *node.ops[1:]]
            yield node, kind, text(ast.Compare(node.left, ops, node.comparators))
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        operator, kind = OPERATORS.get(type(node.op), (None, ""))
        if operator:
            fields = {**dict(ast.iter_fields(node)), "op": operator()}
            yield node, kind, text(type(node)(**fields))
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield node, "off by one", str(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield node, "false for true", str(not node.value)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield node.test, "condition reversed", f"(not {ast.unparse(node.test)})"
    if removable(node):
        yield node, "line removed", "pass"


def is_strict(node: Any) -> bool:
    """zip's: an assertion that lengths are equal."""
    return isinstance(node, ast.keyword) and node.arg == "strict"


def removable(node: ast.AST) -> bool:
    """Whether the program goes on without the statement, and only does something else."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, (ast.Call, ast.YieldFrom, ast.Yield))
    if isinstance(node, ast.If):
        return not node.orelse
    if isinstance(node, ast.Assign):
        used = {ast.unparse(n) for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        return any(isinstance(t, ast.Subscript) or ast.unparse(t) in used for t in node.targets)
    return isinstance(node, ast.AugAssign)


def changes_of_call(call: ast.Call) -> Iterator[tuple[Any, str, str]]:
    name, arguments = ast.unparse(call.func), call.args
    if name in COLLECTIVES | STARTED and len(arguments) > 1:
        tensor, axis = map(ast.unparse, arguments[:2])
        left_out = f"_not_started({tensor}, {axis})" if name in STARTED else f"({tensor})"
        yield call, "collective dropped", left_out
        owner, _, last = axis.rpartition(".")
        if owner == "context" and last in AXES:
            yield arguments[1], "another axis", f"{owner}.{AXES[last]}"
        elif name != "sum_over_dp":
            yield arguments[1], "another axis", f"_all_ranks({axis})"
    if name in FOR:
        yield call.func, "forward for backward", FOR[name]
    for argument in arguments:
        if isinstance(argument, ast.Constant) and argument.value in WORDS:
            yield argument, "forward for backward", f'"{WORDS[argument.value]}"'
    if name not in COMMUTATIVE and not any(isinstance(a, ast.Starred) for a in arguments):
        for i in range(len(arguments) - 1):
            pair = arguments[i : i + 2]
            if not any(is_axis(a) or isinstance(a, ast.Constant) for a in pair):
                swapped = [*arguments[:i], pair[1], pair[0], *arguments[i + 2 :]]
                yield call, "argument swapped", text(ast.Call(call.func, swapped, call.keywords))


def is_axis(node: ast.expr) -> bool:
    return ast.unparse(node).rpartition(".")[2] in {"tp", "dp", "pp", "axis", "context"}


def text(node: ast.AST) -> str:
    """On one line; an expression in brackets, as it may have lost those around it."""
    unparsed = ast.unparse(ast.fix_missing_locations(node))
    return f"({unparsed})" if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare)) else unparsed
