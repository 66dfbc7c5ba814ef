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
from k2quant.eval.asking.harness.faults import said
from k2quant.eval.asking.harness.tasks import Tasks


def ask(lm: Any, tasks: Tasks, *, chat_template: bool, unsafe_code: bool) -> dict[str, Any]:
    """Ask a model all questions and score its answers, with lm-eval's own code and seeds.

    Returns:
        lm-eval's results, samples included.

    Raises:
        EvaluationError: lm-eval gave up.
    """
    import numpy as np
    import torch

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  lm-eval's tasks use it
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        results: dict[str, Any] = evaluate(
            lm,
            tasks.loaded,
            limit=tasks.limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=unsafe_code,
        )
    except (K2QuantError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise EvaluationError("lm-eval stopped", found=said(error)) from error
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
