"""transformers' models as lm-eval asks them, with the answers counted that ended at the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

from k2quant.eval.asking.harness.faults import check_room, no_room
from k2quant.eval.asking.harness.writing import NARROWING, BehindReasoning, Draws, Numbers
from k2quant.eval.asking.thinking import Thinking


class Local(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own transformers model, but for how it writes: it gives whole answers of models that reason.

    Those end at a stop string behind the reasoning, which is not taken off; draws have a seed each; and it is noted
    which answers ended at the limit on new tokens.
    """

    thinking: Thinking | None = None
    """How to tell reasoning from answers; None where there is none."""
    _cut: list[bool]

    def tok_batch_encode(self, strings: list[str], **kwargs: Any) -> Any:
        """Encode contexts.

        Raises:
            HarnessFault: one is longer than the model has room for; lm-eval would cut its beginning off and go on.
        """
        room = kwargs.pop("left_truncate_len", None)
        ids, mask = super().tok_batch_encode(strings, **kwargs)
        if room is not None and ids.shape[1] > room:
            raise no_room(ids.shape[1], room)
        return ids, mask

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Write answers to requests of one batch, whose settings are the same but for the seed."""
        prompts = [request.args[0] for request in requests]
        seen = [self.thinking.prompt(request) for request in requests] if self.thinking else prompts
        settings = dict(normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks))
        seeds = [request.args[1].get("seed", 0) for request in requests]
        settings.pop("seed", None)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(settings.pop("until"), eos=None) if stop]
        most = settings.pop("max_gen_toks")
        ids, mask = self.tok_batch_encode(prompts, left_truncate_len=self.max_length - most)
        written = self._write(ids, mask, seen, until, eos, most, _drawn(settings, seeds) | settings)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.eot_token_id}
        self._cut, texts = [], []
        for row in written:
            stopped = not self.thinking and any(stop in self.tokenizer.decode(row) for stop in until)
            self._cut.append(len(row) == most and not ends & set(row) and not stopped)
            stops = [eos] if self.thinking else [*until, eos]
            texts.append(postprocess_generated_text(self._text(row), stops, None))
        return texts

    def _write(
        self,
        ids: Any,
        mask: Any,
        prompts: Sequence[str],
        until: list[str],
        eos: str,
        most: int,
        settings: dict[str, Any],
    ) -> list[list[int]]:
        """Return the tokens that are written in each row."""
        begin = ids.shape[1]
        stops = [] if self.thinking else until
        criteria = stop_sequences_criteria(self.tokenizer, [*stops, *filter(None, [eos])], begin, len(ids))
        if self.thinking:
            criteria.append(BehindReasoning(self.tokenizer, until, self.thinking, prompts, begin))
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_length=begin + most,
            stopping_criteria=criteria,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **settings,
        )
        rows: list[list[int]] = output[:, begin:].tolist()
        return rows

    def _text(self, row: list[int]) -> str:
        """Return what tokens say without special ones; what opens and ends reasoning stays even if it is special."""
        tags = self._tags()
        parts, begin = [], 0
        for place, token in enumerate(row):
            if token in tags:
                parts += [self.tok_decode(row[begin:place]), tags[token]]
                begin = place + 1
        return "".join([*parts, self.tok_decode(row[begin:])])

    def _tags(self) -> dict[int, str]:
        """Return what opens and ends reasoning, by token, where that is a special one."""
        if self.thinking is None:
            return {}
        named = [tag for tag in (self.thinking.start, self.thinking.end) if tag]
        spelled = {tag: self.tokenizer.encode(tag, add_special_tokens=False) for tag in named}
        # `all_special_ids` does not have every token that decoding leaves out.
        return {ids[0]: tag for tag, ids in spelled.items() if len(ids) == 1 and not self.tok_decode(ids)}

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        check_room(requests, self.max_length)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return scores

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:  # noqa: ARG002  others look at them
        """Return for each of the last requests whether its answer ended at the limit."""
        return self._cut


def _drawn(settings: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Take what belongs to a draw out of the settings, and return what transformers is to be told of it."""
    narrowing = {name: settings.pop(name) for name in NARROWING if name in settings}
    draws = settings.pop("do_sample") and narrowing.get("temperature") != 0
    # Greedily, what narrows a draw does not change what is likeliest.
    return {"do_sample": False, "logits_processor": [Numbers(), *([Draws(narrowing, seeds)] if draws else [])]}


def transformers_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int) -> Any:
    """Return lm-eval's model around a transformers model.

    Prompts begin as the tokenizer's own post-processor has them, with the BOS token or without.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: how many texts it is given at once.
        max_length: the most tokens of prompt and answer.
    """
    lm = Local(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length)
    if model.device.type == "meta":  # its first weights lie on the disk
        lm._device = model.assembly.device  # noqa: SLF001  there is no other way to say it
    return lm
