"""vLLM's models as lm-eval asks them: no prompt is cut, and answers are counted that ended at the limit."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import get_model

from k2quant.errors import HarnessFault, MissingExtra, UsageError
from k2quant.eval.asking.harness.faults import check_room, no_room
from k2quant.ground.saying.faults import said


class _Counting:
    """A model of lm-eval's on vLLM; two of its own steps pass through here."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ends: dict[tuple[tuple[int, ...], int | None], Any] = {}
        self._generate, self._score = model._model_generate, model._loglikelihood_tokens  # noqa: SLF001  its steps
        model._model_generate, model._loglikelihood_tokens = self._generated, self._scored  # noqa: SLF001  the same

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Write answers.

        Raises:
            HarnessFault: a prompt leaves no room for its answer; lm-eval would cut its beginning off and go on.
        """
        self._ends = {}
        for tokens, request in zip(self._tokens(requests), requests, strict=True):
            room = self._model.max_length - request.args[1].get("max_gen_toks", self._model.max_gen_toks)
            if len(tokens) > room:
                raise no_room(len(tokens), room)
        answers: list[str] = self._model.generate_until(requests, disable_tqdm=True)
        return answers

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:  # noqa: ARG002  see the others
        """Return for each of the last requests whether its answer ended at the limit, and not at a stop string."""
        return [self._was_cut(*each) for each in zip(self._tokens(requests), requests, strict=True)]

    def _was_cut(self, tokens: tuple[int, ...], request: Any) -> bool:
        settings = request.args[1]
        end, until = self._ends[tokens, settings.get("seed")], settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        return end.finish_reason == "length" and not any(stop and stop in end.text for stop in stops)

    def _tokens(self, requests: list[Any]) -> list[tuple[int, ...]]:
        return [tuple(tokens) for tokens in self._model.tok_encode([request.args[0] for request in requests])]

    def _generated(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:  # noqa: FBT001, FBT002  its signature
        outputs = self._generate(requests, generate, sampling_params)
        if generate:
            for tokens, sampling, output in zip(requests, sampling_params, outputs, strict=True):
                self._ends[tuple(tokens), getattr(sampling, "seed", None)] = output.outputs[0]
        return outputs

    def _scored(self, requests: Any, **options: Any) -> Any:
        check_room(list(requests), self._model.max_length - 2)  # vLLM writes a token behind each text, too
        return self._score(requests, **options)


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
        raise MissingExtra("vLLM is not installed", found=said(error), remedy="pip install vllm") from error
    try:
        return _Counting(kind(**settings))
    except TypeError as error:  # its engine's arguments are those of a dataclass
        raise UsageError(f"`model_args=`: vLLM does not take them so: {said(error)}") from error
    except Exception as error:
        raise HarnessFault("vLLM cannot load it", file=settings["pretrained"], found=said(error)) from error
