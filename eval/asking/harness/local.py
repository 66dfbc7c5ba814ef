"""transformers' models as lm-eval asks them, with the answers counted that ended at the limit."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessor

from k2quant.errors import HarnessFault
from k2quant.eval.asking.harness.faults import check_room, no_room


class Counting(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own transformers model; it also notes which answers ended at the limit on new tokens."""

    _contexts: list[str]
    _cut: dict[str, bool]

    def tok_batch_encode(self, strings: list[str], **kwargs: Any) -> Any:
        """Encode contexts, and remember which.

        Raises:
            HarnessFault: one is longer than the model has room for; lm-eval would cut its beginning off and go on.
        """
        self._contexts = list(strings)
        room = kwargs.pop("left_truncate_len", None)
        ids, mask = super().tok_batch_encode(strings, **kwargs)
        if room is not None and ids.shape[1] > room:
            raise no_room(ids.shape[1], room)
        return ids, mask

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        output = super()._model_generate(context, max_length, stop, logits_processor=[_Numbers()], **kwargs)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.eot_token_id}
        for text, row in zip(self._contexts, output[:, context.shape[1] :].tolist(), strict=True):
            written = self.tokenizer.decode(row)
            ended = ends & set(row) or any(word and word in written for word in stop)
            self._cut[text] = len(row) == max_length - context.shape[1] and not ended
        return output

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Write answers."""
        self._cut = {}
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        check_room(requests, self.max_length)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return scores

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:  # noqa: ARG002  others look at the answers
        """Return for each of the last requests whether its answer ended at the limit."""
        return [self._cut[request.args[0]] for request in requests]


class _Numbers(LogitsProcessor):
    """Refuses logits from which any token would be as good as another."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002  transformers' signature
        """Return the logits as they are.

        Raises:
            HarnessFault: one is NaN.
        """
        if scores.isnan().any():
            raise HarnessFault(
                "the model's logits are no numbers", found="NaN", remedy="is a weight NaN, or `dtype=` too narrow?"
            )
        return scores


def transformers_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int) -> Any:
    """Return lm-eval's model around a transformers model.

    Prompts begin as the tokenizer's own post-processor has them, with the BOS token or without.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: how many texts it is given at once.
        max_length: the most tokens of prompt and answer.
    """
    lm = Counting(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length)
    if model.device.type == "meta":  # its first weights lie on the disk
        lm._device = model.assembly.device  # noqa: SLF001  there is no other way to say it
    return lm
