"""Nothing of lm-eval on the screen: it has log lines and progress bars that no switch turns off."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.api_models
import lm_eval.models.huggingface


def quiet() -> None:
    """Keep log lines and progress bars of lm-eval and `datasets` off the screen; what breaks is raised."""
    for name in ("lm_eval", "datasets", "evaluate", "httpx", "filelock", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(lm_eval.models.api_models.__name__).setLevel(logging.CRITICAL)  # a line for every retry
    lm_eval.api.task.datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface, lm_eval.models.api_models):
        module.tqdm = _NoBar  # lm-eval has no switch for them
    lm_eval.models.api_models.tqdm_asyncio = SimpleNamespace(gather=_gather)


async def _gather(*tasks: Any, **_: Any) -> list[Any]:
    return await asyncio.gather(*tasks)


class _NoBar(lm_eval.api.task.tqdm):  # type: ignore[misc]  # lm-eval has no types
    """A progress bar that is not shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
