"""vLLM's models as lm-eval asks them."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import get_model


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
        settings: of that model, such as `pretrained` and `dtype`.
    """
    return _Uncounted(get_model("vllm")(**settings))
