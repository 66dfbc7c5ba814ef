"""Every change of one place that may be made to a module: cosmic-ray's operators, and what they lack."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators import (
    binary_operator_replacement,
    boolean_replacer,
    break_continue,
    comparison_operator_replacement,
    number_replacer,
    unary_operator_replacement,
    zero_iteration_for_loop,
)

_COMPARISONS = (
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
    *("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),  # the edge, and the other side
)
_BINARY = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul"),
    *("RShift_LShift", "LShift_RShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitAnd"),
)
_UNARY = ("Delete_USub", "Delete_Not", "Delete_Invert")

_SKIPPED_TYPES = {"decorator", "raise_stmt", "import_from", "import_name"}
_SKIPPED_ARGUMENTS = {"strict"}  # of `zip`: that two lengths agree is true wherever it stands


class Mutant(NamedTuple):
    """A module with one change."""

    module: str
    """Its path."""
    line: int
    """Where the change is, from 1."""
    first: int
    """First line of the statement that holds it: who ran a line from here to `line` may have met the change."""
    names: tuple[str, ...]
    """Where it is outside all functions: the private names that the statement binds; they are used nowhere else."""
    everywhere: bool
    """Whether it is outside all functions, so that importing the module runs it."""
    before: str
    """The line as it is, without indent."""
    after: str
    """The line with the change."""
    code: str
    """The whole module with the change."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is called in the list of equivalent ones: it goes stale when the line changes."""
        return self.module, self.before, self.after

    @property
    def rank(self) -> str:
        """Its place in a sample: the same for the same change, whatever else there is."""
        return hashlib.sha256("\0".join((*self.key, str(self.line))).encode()).hexdigest()


class _Floats:
    """Half as much again, and half as much, of a number that is not whole; an offset of one would be another size."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "number" and not _whole(node):
            yield from [(node.start_pos, node.end_pos)] * 2

    def mutate(self, node: Any, index: int) -> Any:
        value = float(node.value)
        node.value = repr(value * (1.5, 0.5)[index] if value else (1.0, -1.0)[index])
        return node


class _Whole(number_replacer.NumberReplacer):  # type: ignore[misc]  # cosmic-ray has no types
    """One more and one less, of whole numbers."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "number" and _whole(node):
            yield from super().mutation_positions(node)


class _Negation(boolean_replacer.AddNot):  # type: ignore[misc]  # cosmic-ray has no types
    """`not` before a condition; where that is one comparison or a `not`, others turn it round already."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        for start, stop in super().mutation_positions(node):
            condition = node.children[2 if node.type == "test" else 1]
            if condition.type not in {"comparison", "not_test"}:
                yield start, stop


class _Membership:
    """`in` for `not in`, and the other way round."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "comparison":
            for word in node.children[1::2]:
                if word.get_code().split() in (["in"], ["not", "in"]):
                    yield word.start_pos, word.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        places = [at for at, word in enumerate(node.children) if word.get_code().split() in (["in"], ["not", "in"])]
        was = node.children[places[index]].get_code().split()
        node.children[places[index]] = parso.parse(" in" if len(was) == 2 else " not in")
        return node


def _whole(node: Any) -> bool:
    return bool(node.value.lower().startswith("0x") or node.value.replace("_", "").isdigit())


def _operators() -> list[Any]:
    """Return the operators: those whose changes a rule of arithmetic or a check must notice."""
    chosen = [
        *(getattr(comparison_operator_replacement, f"ReplaceComparisonOperator_{name}") for name in _COMPARISONS),
        *(getattr(binary_operator_replacement, f"ReplaceBinaryOperator_{name}") for name in _BINARY),
        *(getattr(unary_operator_replacement, f"ReplaceUnaryOperator_{name}") for name in _UNARY),
        boolean_replacer.ReplaceTrueWithFalse,
        boolean_replacer.ReplaceFalseWithTrue,
        boolean_replacer.ReplaceAndWithOr,
        boolean_replacer.ReplaceOrWithAnd,
        break_continue.ReplaceBreakWithContinue,
        break_continue.ReplaceContinueWithBreak,
        zero_iteration_for_loop.ZeroIterationForLoop,
        *(_Whole, _Floats, _Negation, _Membership),
    ]
    return [operator() for operator in chosen]


def mutants(module: str, source: str) -> list[Mutant]:
    """Return all changes of a module, in the order of its lines.

    Left alone are annotations, decorators, imports, blocks for type checkers, what `raise` says, and `strict=` of zip.
    """
    found: dict[str, Mutant] = {}
    tree = parso.parse(source)
    nodes = list(ast_nodes(tree))
    for operator in _operators():
        count = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not _left_alone(node):
                    code = MutationVisitor.mutate_code(source, operator, count)
                    if code is not None and code != source and code not in found and _compiles(code):
                        found[code] = _mutant(module, source, code, node, start[0])
                count += 1
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.after))


def _compiles(code: str) -> bool:
    """Tell whether a change is still Python; one that is not would be noticed by anything."""
    try:
        compile(code, "", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def _mutant(module: str, source: str, code: str, node: Any, line: int) -> Mutant:
    before, after = source.splitlines(), code.splitlines()
    line = next((at for at, pair in enumerate(zip(before, after, strict=False), 1) if pair[0] != pair[1]), line)
    statement, function = _around(node)
    names = () if function else tuple(_bound(statement))
    return Mutant(
        module=module,
        line=line,
        first=statement.start_pos[0],
        names=names if names and all(name.startswith("_") for name in names) else (),
        everywhere=not function,
        before=before[line - 1].strip(),
        after=after[line - 1].strip(),
        code=code,
    )


def _parents(node: Any) -> Iterator[Any]:
    while node is not None:
        yield node
        node = node.parent


def _around(node: Any) -> tuple[Any, bool]:
    """Return the statement that a node stands in, and whether a function runs it."""
    parents = list(_parents(node))
    at = next(at for at, each in enumerate(parents) if at + 1 == len(parents) or _is_statement(each))
    statement = parents[at]
    inside = any(
        each.type in {"suite", "lambdef"} for each in parents[:-1] if each.parent.type in {"funcdef", "lambdef"}
    )
    return statement, inside


def _is_statement(node: Any) -> bool:
    return node.parent.type in {"simple_stmt", "suite", "file_input"} and node.type not in {"simple_stmt", "suite"}


def _bound(statement: Any) -> Iterable[str]:
    """Return the names that an assignment binds."""
    if statement.type != "expr_stmt" or statement.children[0].type != "name":
        return ()
    return (statement.children[0].value,)


def _left_alone(node: Any) -> bool:
    if node.type == "if_stmt" and _for_types(node):
        return True
    return any(_says_nothing(child, parent) for child, parent in itertools.pairwise(_parents(node)))


def _says_nothing(child: Any, parent: Any) -> bool:
    """Tell whether a part of the tree is an annotation, or another place whose changes are not to be tried."""
    first, kind = parent.children[0], parent.type
    return (
        child.type in _SKIPPED_TYPES
        or (kind == "annassign" and child is parent.children[1])
        or (kind in {"param", "funcdef"} and child is parent.annotation)
        or (kind == "tfpdef" and child is not first)
        or (kind == "parameters" and child.type == "operator")  # the star before keywords
        or (kind == "argument" and first.type == "name" and first.value in _SKIPPED_ARGUMENTS)
        or (kind == "if_stmt" and _for_types(parent))
    )


def _for_types(statement: Any) -> bool:
    return bool(statement.children[1].get_code().strip() == "TYPE_CHECKING")
