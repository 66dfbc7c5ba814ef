"""Who meets whom: a bank holds the weights, a problem adds inputs and truth, and `enter` makes a contestant's calls."""

from __future__ import annotations

from kernel_cases import Cell
from kernel_codecs import CodecProblem, our_codec
from kernel_experts import MOE, ExpertsProblem
from kernel_inputs import Bank, CodecBank, Entry, ExpertsBank
from kernel_linear import LINEAR, LinearProblem

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
