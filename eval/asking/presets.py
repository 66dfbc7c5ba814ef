"""Names for sets of tasks: the benchmarks of the Kimi K2 report that lm-eval has, and where the two differ.

The report's tables are those of the model cards of Kimi-K2-Instruct and Kimi-K2-Base, and of the technical report
(arXiv 2507.20534, sections 4.1 and 4.2), which lists more; all answers may have 8k tokens there, but for one. In no
preset, because lm-eval 0.4.13 does not have them: SimpleQA, SuperGPQA, LiveCodeBench, OJBench, MultiPL-E, SWE-bench,
SWE-Lancer, PaperBench, TerminalBench, Aider-Polyglot, Tau2, AceBench, HMMT, CNMO, PolyMath, ZebraLogic, AutoLogi,
Humanity's Last Exam, MRCR, FRAMES, FACTS Grounding, Multi-Challenge, LiveBench, CMATH and Chinese SimpleQA. Nor is
CRUXEval: lm-eval draws ten answers of each item there, and a gate wants one that is right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Benchmark(NamedTuple):
    """A benchmark of the report and lm-eval's task for it."""

    name: str
    """As the report calls it."""
    task: str
    """As lm-eval calls it."""
    here: str
    """How lm-eval asks and scores it."""
    report: str
    """How the report does."""


_GSM8K = Benchmark("GSM8k", "gsm8k", "5 shots, 1,024 new tokens", "Base: 8 shots")
_TRIVIA = Benchmark("TriviaQA", "triviaqa", "0 shots, without context", "Base: 5 shots")
_STEM = Benchmark("MMLU, science only", "mmlu_stem", "log-likelihood of A to D, 0 shots", "all subjects; see mmlu")
_MMLU = Benchmark("MMLU", "mmlu", "log-likelihood of A to D, 0 shots", "Base: EM, 5 shots; Instruct: EM of an answer")
_CEVAL = Benchmark("C-Eval", "ceval-valid", "log-likelihood, 0 shots, validation split", "Base: EM, 5 shots")
_IFEVAL = Benchmark("IFEval", "ifeval", "prompt and instruction, strict and loose; 1,280 new tokens", "prompt strict")
_MATH_500 = Benchmark("MATH-500", "minerva_math500", "4 shots, 1,024 new tokens, EM and math-verify", "no shots named")
_MATH = Benchmark("MATH", "minerva_math", "4 shots, 1,024 new tokens, EM and math-verify", "Base: EM, 4 shots")
_PRO = Benchmark("MMLU-Pro", "mmlu_pro", "5 shots with reasoning, 2,048 new tokens", "Base: 5 shots; Instruct: EM")
_REDUX = Benchmark("MMLU-Redux", "mmlu_redux_generative", "a letter, 0 shots, EM", "Base: 5 shots; Instruct: EM")
_GPQA = Benchmark(
    "GPQA-Diamond",
    "gpqa_diamond_cot_zeroshot",
    "0 shots with reasoning, once, 1,024 new tokens",
    "avg@8; Base: 5 shots",
)
_AIME_24 = Benchmark("AIME 2024", "aime24", "greedy, once; 32,768 new tokens", "avg@64")
_AIME_25 = Benchmark("AIME 2025", "aime25", "greedy, once; 32,768 new tokens", "avg@64")
_HUMANEVAL = Benchmark("EvalPlus, HumanEval+", "humaneval_plus", "pass@1, greedy; runs the model's code", "avg@k")
_MBPP = Benchmark("EvalPlus, MBPP+", "mbpp_plus", "pass@1, greedy; runs the model's code", "avg@k")
_BBH = Benchmark("BBH", "bbh", "3 shots with reasoning, 1,024 new tokens, EM", "Base; shots not named")
_PLATINUM = Benchmark("GSM8K-Platinum", "gsm8k_platinum", "5 shots, 1,024 new tokens", "Base; shots not named")
_HELLASWAG = Benchmark("HellaSwag", "hellaswag", "log-likelihood, 0 shots, acc", "Base; shots not named")
_ARC = Benchmark("ARC-Challenge", "arc_challenge", "log-likelihood, 0 shots, acc", "Base; shots not named")
_WINOGRANDE = Benchmark("WinoGrande", "winogrande", "log-likelihood, 0 shots, acc", "Base; shots not named")
_AGIEVAL = Benchmark("AGIEval", "agieval", "log-likelihood or EM, 0 shots", "Base; shots not named")
_CMMLU = Benchmark("CMMLU", "cmmlu", "log-likelihood of A to D, 0 shots", "Base; shots not named")
_DROP = Benchmark("DROP", "drop", "0 shots, EM", "Instruct, long context; shots not named")
_LONG = Benchmark("LongBench v2", "longbench2", "log-likelihood of A to D, 0 shots", "Instruct; an answer")

_STANDARD = (_GSM8K, _TRIVIA, _MMLU, _CEVAL, _IFEVAL, _MATH_500)

PRESETS: dict[str, tuple[Benchmark, ...]] = {
    "k2-quick": (_GSM8K, _STEM),
    "k2-standard": _STANDARD,
    "k2-full": (
        *_STANDARD[:-1],
        *(_MATH, _PLATINUM, _AIME_24, _AIME_25),
        *(_PRO, _REDUX, _GPQA, _BBH, _HELLASWAG, _ARC, _WINOGRANDE, _AGIEVAL, _CMMLU),
        *(_DROP, _LONG),
        *(_HUMANEVAL, _MBPP),
    ),
}
"""By name, what to give to `tasks`; the last needs `unsafe_code`."""


def expand(names: Iterable[str]) -> list[str]:
    """Return names of tasks in which each preset is replaced by its tasks; each stands once."""
    tasks = [name for given in names for name in _tasks(given)]
    return list(dict.fromkeys(tasks))


def _tasks(name: str) -> list[str]:
    return [benchmark.task for benchmark in PRESETS[name]] if name in PRESETS else [name]
