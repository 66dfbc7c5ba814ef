"""A tokenizer as GGUF has it: tokens with their types, and merges, in GPT-2's spelling of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.exports.gguf.key import Key

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens (`TokenType`, gguf-py): of text; never shown; found whole in any text; a row that stands for none."""
ENDS = ("eos", "eot", "eom")
"""What llama.cpp calls tokens that end an answer (`special_eog_ids`, llama-vocab.cpp)."""


class Tokens(NamedTuple):
    """What a tokenizer consists of."""

    file: Path
    """Which was read."""
    pre: str
    """What llama.cpp calls the way in which text is split before pairs are merged."""
    texts: dict[int, str]
    """Each token as it is spelled, by its id."""
    added: dict[int, bool]
    """Those that are found in a text before it is split, and whether they are special, that is never shown."""
    merges: list[str]
    """Pairs with a blank between them, in the order in which they are merged."""
    tasks: dict[str, int]
    """Ids by task, such as `bos`."""
    begins: bool
    """Whether every text begins with `bos`."""

    def keys(self, rows: int) -> Iterator[Key]:
        """Yield what GGUF says of them.

        Args:
            rows: of the embedding; those beyond the tokens are told to be unused.

        Raises:
            MalformedFile: there are more tokens than rows, or two that are spelled alike.
        """
        if (last := max(self.texts)) >= rows:
            raise MalformedFile(
                f"token {last}, for which the model has no row",
                file=self.file,
                expected=f"ids below vocab_size, {rows}",
                found=self.texts[last][:100],
                remedy="take config.json and the tokenizer's files from one release of the model",
            )
        words = [self.texts.get(place, f"[PAD{place}]") for place in range(rows)]
        self._check_unique(words)
        yield Key("tokenizer.ggml.model", "gpt2", "string")
        yield Key("tokenizer.ggml.pre", self.pre, "string")
        yield Key("tokenizer.ggml.tokens", words, "array:string")
        yield Key("tokenizer.ggml.token_type", [self._type(place) for place in range(rows)], "array:int32")
        yield Key("tokenizer.ggml.merges", self.merges, "array:string")
        for task, place in self.tasks.items():
            yield Key(f"tokenizer.ggml.{_NAMES[task]}_token_id", place, "uint32")
        yield Key("tokenizer.ggml.add_bos_token", self.begins, "bool")

    def _type(self, place: int) -> int:
        if place not in self.texts:
            return UNUSED
        return NORMAL if place not in self.added else CONTROL if self.added[place] else USER_DEFINED

    def _check_unique(self, words: list[str]) -> None:
        """Refuse tokens that are spelled alike: llama.cpp stops at them (llama-vocab.cpp)."""
        seen: dict[str, int] = {}
        for place, word in enumerate(words):
            if seen.setdefault(word, place) != place:
                what = f"tokens {seen[word]} and {place} are spelled alike, which llama.cpp does not take"
                raise UnsupportedFormat(what, file=self.file, found=word[:100])

    def ending(self, ids: list[int]) -> Tokens:
        """Return them with further tokens that end an answer.

        Raises:
            UnsupportedFormat: there are more than llama.cpp has names for.
            MalformedFile: one is no token.
        """
        tasks = dict(self.tasks)
        for place in dict.fromkeys(ids):
            if place in (tasks.get(task) for task in ENDS):
                continue
            if place not in self.texts:
                raise MalformedFile(f"token {place} ends an answer, and is none of its tokens", file=self.file)
            free = next((task for task in ENDS if task not in tasks), None)
            if free is None:
                raise UnsupportedFormat(
                    "more tokens end an answer than llama.cpp has names for",
                    file=self.file,
                    expected=f"at most {len(ENDS)}",
                    found=[self.texts[each][:50] for each in dict.fromkeys(ids) if each in self.texts][:10],
                    remedy="leave those out of generation_config.json that no answer ends with",
                )
            tasks[free] = place
        return self._replace(tasks=tasks)


_NAMES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding", "unk": "unknown"}
"""By task, what GGUF's keys call it."""


def tasks_of(named: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of tokens by task, from those that tokenizer_config.json names, such as `bos_token`.

    Others than these have no meaning to a model that writes text.
    """
    return {task: named[f"{task}_token"] for task in _NAMES if f"{task}_token" in named}


def templates(file: Path, template: str | Mapping[str, str] | None) -> Iterator[Key]:
    """Yield what GGUF says of chat templates: one, or several by name, of which `default` is the one.

    Raises:
        UnsupportedFormat: a name has other letters than llama.cpp's keys may.
    """
    if isinstance(template, str):
        template = {"default": template}
    others = []
    for name, text in (template or {}).items():
        if name == "default":
            yield Key("tokenizer.chat_template", text, "string")
            continue
        if not name.isascii() or not name.replace("_", "").isalnum():
            raise UnsupportedFormat(
                "a chat template whose name GGUF cannot say",
                file=file,
                expected="letters, digits and underscores",
                found=name[:100],
            )
        others.append(name)
        yield Key(f"tokenizer.chat_template.{name}", text, "string")
    if others:
        yield Key("tokenizer.chat_templates", others, "array:string")
