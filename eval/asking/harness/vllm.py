"""vLLM's models as lm-eval asks them."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import get_model

from k2quant.errors import HarnessFault, MissingExtra, UsageError
from k2quant.eval.asking.harness.faults import said


class _Uncounted:
    """A model of lm-eval's of which nobody knows which answers were cut."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[None]:  # noqa: ARG002  see the others
        return [None] * len(requests)


def vllm_model(settings: dict[str, Any]) -> Any:
    """Return lm-eval's vLLM model.

    Args:
        settings: of that model, such as `pretrained` and `dtype`, and whatever vLLM's own engine takes.

    Raises:
        MissingExtra: vLLM is not installed.
        UsageError: vLLM has no such argument.
        HarnessFault: vLLM cannot load the model so.
    """
    try:
        kind = get_model("vllm")
    except ImportError as error:
        raise MissingExtra("vLLM is not installed", found=str(error)[:200], remedy="pip install vllm") from error
    try:
        return _Uncounted(kind(**settings))
    except TypeError as error:  # its engine's arguments are those of a dataclass
        raise UsageError(f"`model_args=`: vLLM does not take them so: {said(error)}") from error
    except Exception as error:
        raise HarnessFault("vLLM cannot load it", file=settings["pretrained"], found=said(error)) from error
