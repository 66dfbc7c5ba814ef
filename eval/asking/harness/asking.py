"""All questions asked and scored by lm-eval's own code, and its samples as its own command line writes them."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable, sanitize_list

from k2quant.errors import EvaluationError, K2QuantError
from k2quant.eval.asking.harness.rounds import together, wrong_without_answer
from k2quant.eval.asking.harness.tasks import Tasks
from k2quant.eval.asking.thoughts import Thoughts
from k2quant.ground.saying.faults import said


def ask(
    lm: Any,
    tasks: Tasks,
    *,
    chat_template: bool,
    unsafe_code: bool,
    repeats: int = 1,
    thoughts: Thoughts | None = None,
) -> dict[str, Any]:
    """Ask a model all questions and score its answers, with lm-eval's own code and seeds.

    Args:
        lm: the model; it gives the answers of the first repeat when it is asked first, and so on.
        tasks: what is asked.
        chat_template: whether prompts go through a chat template.
        unsafe_code: whether tasks may run the code that the model writes.
        repeats: how often each question is scored whose answer is written.
        thoughts: what `lm` keeps its reasoning in; an answer that never left it is wrong whatever its metrics say.

    Returns:
        lm-eval's results, samples included. With repeats its metrics are means over them, and its standard errors those
        of means of items.

    Raises:
        EvaluationError: lm-eval gave up.
    """
    rounds: list[dict[str, Any]] = []
    written = {name: task for name, task in tasks.by_name.items() if task.OUTPUT_TYPE == "generate_until"}
    for repeat in range(repeats if written else 1):
        # Groups are put together once, from means; what is scored and not written is asked once.
        loaded = tasks.loaded if repeat == 0 else {**tasks.loaded, "tasks": written, "groups": {}}
        rounds.append(_once(lm, loaded, tasks, chat_template=chat_template, unsafe_code=unsafe_code, thoughts=thoughts))
    return together(rounds, tasks) if len(rounds) > 1 else rounds[0]


def _once(
    lm: Any,
    loaded: dict[str, Any],
    tasks: Tasks,
    *,
    chat_template: bool,
    unsafe_code: bool,
    thoughts: Thoughts | None,
) -> dict[str, Any]:
    import numpy as np
    import torch

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  lm-eval's tasks use it
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # each time the same shots
    try:
        with wrong_without_answer(loaded["tasks"], thoughts):
            results: dict[str, Any] = evaluate(
                lm,
                loaded,
                limit=tasks.limit,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                confirm_run_unsafe_code=unsafe_code,
            )
    except (K2QuantError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise EvaluationError("lm-eval stopped", found=said(error)) from error
    if thoughts:
        for name, rows in results["samples"].items():
            for row in rows:
                thoughts.note(name, row)
            thoughts.count(name, [row for row in rows if row["filter"] == rows[0]["filter"]])
    return results


def as_written(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample as lm-eval's own command line writes it: every response a string."""
    row = dict(sample)
    row["arguments"] = {
        f"gen_args_{number}": {f"arg_{place}": part for place, part in enumerate(request)}
        for number, request in enumerate(copy.deepcopy(sample["arguments"]))
    }
    row["resps"] = sanitize_list(sample["resps"])
    row["filtered_resps"] = sanitize_list(sample["filtered_resps"])
    row["target"] = str(sample["target"])
    return row


plain = handle_non_serializable
"""Turns what JSON does not have, such as numpy's numbers, into what it has: lm-eval's own way."""
