"""Who meets whom: a bank holds the weights, a problem adds inputs and truth, and `enter` makes a contestant's calls."""

from __future__ import annotations

from suites.products.cases import Cell
from suites.products.experts import MOE, ExpertsProblem
from suites.products.gpu_codecs import CodecProblem, our_codec
from suites.products.inputs import Bank, CodecBank, Entry, ExpertsBank
from suites.products.linear import LINEAR, LinearProblem

AnyBank = Bank | ExpertsBank | CodecBank
Problem = LinearProblem | ExpertsProblem | CodecProblem


def bank_for(cell: Cell, device: str, rotate_bytes: int) -> AnyBank:
    """Make the weights of a cell."""
    if cell.section == "codecs":
        return CodecBank(cell.size, device)
    if cell.section.startswith("moe"):
        return ExpertsBank(cell.section, cell.size, device)
    return Bank(cell.section, cell.size, device, rotate_bytes)


def problem_for(bank: AnyBank, cell: Cell) -> Problem:
    """Make the inputs of a cell."""
    if isinstance(bank, CodecBank):
        return CodecProblem(bank, cell)
    return ExpertsProblem(bank, cell) if isinstance(bank, ExpertsBank) else LinearProblem(bank, cell)


def enter(problem: Problem, name: str) -> Entry:
    """Make the calls of a contestant; raises whatever its library raises."""
    if isinstance(problem, CodecProblem):
        return our_codec(problem)
    return MOE[name](problem) if isinstance(problem, ExpertsProblem) else LINEAR[name](problem)
