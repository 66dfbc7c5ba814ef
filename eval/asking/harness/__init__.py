"""lm-eval, the one folder that imports it: its task definitions, its models and its scoring, none of them rewritten.

What is changed, and why: log lines are kept off the screen; local data are read without the cache of `datasets`; the
default limit on generated tokens and a run's sampling are written into each task's settings, where they can be seen and
compared; answers that ended at the limit are counted; a model that reasons is stopped behind its reasoning, and what
never left it is wrong; a question that is asked several times is scored each time by itself.
"""

from __future__ import annotations

import lm_eval.models.api_models  # noqa: F401  where lm-eval is not whole, this fails, and before torch is loaded

from k2quant.eval.asking.harness.asking import as_written, ask, plain
from k2quant.eval.asking.harness.local import transformers_model
from k2quant.eval.asking.harness.naming import own_tasks
from k2quant.eval.asking.harness.screen import quiet
from k2quant.eval.asking.harness.served import served_model
from k2quant.eval.asking.harness.tasks import Tasks, load_tasks
from k2quant.eval.asking.harness.version import VERSION
from k2quant.eval.asking.harness.vllm import vllm_model

__all__ = [
    "VERSION",
    "Tasks",
    "as_written",
    "ask",
    "load_tasks",
    "own_tasks",
    "plain",
    "quiet",
    "served_model",
    "transformers_model",
    "vllm_model",
]
