"""tokenizer.json for GGUF: byte pairs that are merged as llama.cpp merges them, and text that is split as it splits it.

llama.cpp's converter knows a way to split by the hash of an example's ids (convert_hf_to_gguf_update.py); here it is
known by the expressions that tokenizer.json itself has. One that is not among them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.json_kinds import mapping, text, truth, values, whole
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.files.tokenizer.spelling import spelled
from k2quant.checkpoint.files.tokenizer.splitting import PATTERN
from k2quant.checkpoint.files.tokenizer.words import FAST, settings_of, template_of
from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.exports.gguf.vocabulary.ranks import PRE as KIMI
from k2quant.exports.gguf.vocabulary.tokens import Tokens, tasks_of

_LIMIT = 2**26
"""Bytes of the file; that of DeepSeek-V3 has 7.8 million."""
_REMEDY = "take tokenizer.json and tokenizer_config.json from one release of the model"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "|".join(  # noqa: FLY002  a part to a line
        (
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
            "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
            " ?[\\p{P}\\p{S}]+[\r\n]*",
            "\\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
)
"""Of DeepSeek-V3's tokenizer.json, as llama.cpp has it, too (llama-vocab.cpp, `DEEPSEEK3_LLM`)."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` splits by itself (huggingface/tokenizers, byte_level.rs)."""
PRES = {_DEEPSEEK: "deepseek-v3", ("|".join(PATTERN),): KIMI, (_GPT2,): "gpt-2"}
"""By the expressions by which text is split, one behind the other, what llama.cpp calls it (llama-vocab.cpp)."""
_UNSPLIT = "gpt-2"
"""Where nothing is merged, every way to split text gives the same tokens."""
_PLAIN = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "byte_fallback": False,
}
"""What a model of byte pairs has beside tokens and merges, and what of it llama.cpp does as well."""
_STRIPPING = ("lstrip", "rstrip", "single_word")


def read(folder: Path) -> tuple[Tokens, str | dict[str, str] | None]:
    """Return the tokens of a folder with a tokenizer.json, and its chat template.

    Raises:
        MalformedFile: it lies.
        UnsupportedFormat: it does what llama.cpp does not.
    """
    path, settings = folder / FAST, settings_of(folder)
    content = parse_object(read_limited(path, _LIMIT), file=path)
    try:
        return _tokens(path, content, settings), template_of(folder, settings)
    except (KeyError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise MalformedFile("no tokenizer of byte pairs", file=path, found=said[:300], remedy=_REMEDY) from error


def _tokens(path: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> Tokens:
    model = mapping(content["model"])
    _check_model(path, content, model)
    added = _added(path, content, settings)
    own: dict[int, str] = {}
    for word, place in mapping(model["vocab"]).items():
        if own.setdefault(whole(place), word) != word:
            raise ValueError(f"token {place} is {own[place]!r:.50} and {word!r:.50}")
    merges = [_pair(entry) for entry in values(model["merges"])]
    pre = _pre(path, content)
    if pre is None:
        pre = _check_characters(path, own.keys() - added.keys(), own, merges)
        own = {place: spelled(word.encode()) for place, word in own.items()}
    if truth(model.get("ignore_merges", False)):
        _check_reached(path, own.keys() - added.keys(), own, merges)
    texts = own | {place: word for place, (word, _) in added.items()}
    places = {word: place for place, (word, _) in added.items()} | {word: place for place, word in own.items()}
    named = {
        task: places[word] for task, word in _named(settings) if word in places or _refuse(f"{task} {word!r:.100}")
    }
    return Tokens(
        file=path,
        pre=pre,
        texts=texts,
        added={place: special for place, (_, special) in added.items()},
        merges=merges,
        tasks=tasks_of(named),
        begins=_begins(path, content, settings, named),
    )


def _refuse(what: str) -> bool:
    raise ValueError(f"{what}, which is none of its tokens")


def _check_model(path: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse a model that does what llama.cpp does not."""
    if model.get("type", "BPE") != "BPE":
        raise _unsupported(path, "the kind of its model", "BPE", model.get("type"))
    for key, value in _PLAIN.items():
        if (model.get(key) or None) != (value or None):
            raise _unsupported(path, f"{key} of its model", value, model[key])
    normalizer = content.get("normalizer")
    if normalizer is not None and _parts(normalizer, "normalizers"):
        raise _unsupported(path, "its normalizer", "none", normalizer)


def _parts(entry: object, name: str) -> list[dict[str, Any]]:
    """Return the parts of a step, which is one by itself or a sequence."""
    step = mapping(entry)
    return [mapping(part) for part in values(step[name])] if step.get("type") == "Sequence" else [step]


def _pre(path: Path, content: Mapping[str, Any]) -> str | None:
    """Return what llama.cpp calls the way in which text is split; None where it is neither split nor made bytes of."""
    found = content.get("pre_tokenizer")
    if found is None:
        return None
    parts = _parts(found, "pretokenizers")
    last = parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unsupported(path, "how it splits text", "bytes at the end, and no blank put before them", found)
    splits = [_expression(path, part) for part in parts[:-1]]
    if last.get("use_regex", True):
        splits.append(_GPT2)
    if (pre := PRES.get(tuple(splits))) is None:
        raise _unsupported(path, "how it splits text", f"as llama.cpp's {', '.join(PRES.values())}", splits)
    return pre


def _expression(path: Path, part: Mapping[str, Any]) -> str:
    plain = part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert")
    pattern = part.get("pattern")
    if not plain or not isinstance(pattern, dict) or set(pattern) != {"Regex"}:
        raise _unsupported(path, "how it splits text", "by expressions, each match by itself", part)
    return text(pattern["Regex"])


def _check_characters(path: Path, normal: set[int], own: Mapping[int, str], merges: list[str]) -> str:
    """Return how text is split that is not split, for it is characters: a token each, and a byte, as nano-K2's are."""
    for place in sorted(normal):
        if merges or len(own[place]) != 1 or not own[place].isascii():
            what = "merges" if merges else f"token {place}, {own[place][:50]!r}"
            raise _unsupported(
                path, "no way to split text, with merges or tokens of more than a byte", "ByteLevel", what
            )
    return _UNSPLIT


def _check_reached(path: Path, normal: set[int], own: Mapping[int, str], merges: list[str]) -> None:
    """Refuse tokens that only a whole word becomes, which llama.cpp looks for in a few vocabularies alone."""
    made = {merge.replace(" ", "") for merge in merges}
    for place in sorted(normal):
        if len(own[place]) > 1 and own[place] not in made:
            raise _unsupported(path, "ignore_merges, with a token that no merge makes", "false", own[place])


def _pair(entry: object) -> str:
    """Return a merge as GGUF writes it."""
    parts = text(entry).split(" ") if isinstance(entry, str) else [text(part) for part in values(entry)]
    if len(parts) != len("ab") or not all(parts) or any(" " in part for part in parts):
        raise ValueError(f"merge {entry!r:.100}")
    return " ".join(parts)


def _added(path: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Return the tokens that are found before text is split, by id, and whether they are special."""
    decoder = mapping(settings.get("added_tokens_decoder") or {})
    more = [{"id": int(key), **mapping(value)} for key, value in decoder.items()]
    found: dict[int, tuple[str, bool]] = {}
    for entry in (*values(content.get("added_tokens") or []), *more):
        token = mapping(entry)
        place, word = whole(token["id"]), text(token["content"])
        if stripping := [name for name in _STRIPPING if token.get(name)]:
            raise _unsupported(path, f"{stripping[0]} of token {place}", "false", word)
        if place in found and found[place][0] != word:
            raise ValueError(f"token {place} is {found[place][0]!r:.50} and {word!r:.50}")
        found[place] = word, token.get("special") is True
    return found


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the tokens that tokenizer_config.json names for a task."""
    for task in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if (found := settings.get(task)) is not None:
            yield task, text(found["content"] if isinstance(found, dict) else found)


def _begins(path: Path, content: Mapping[str, Any], settings: Mapping[str, Any], named: Mapping[str, int]) -> bool:
    """Tell whether every text begins with `bos`: a template says so, or else tokenizer_config.json."""
    found = content.get("post_processor")
    for step in _parts(found, "processors") if found is not None else []:
        if step.get("type") == "TemplateProcessing":
            words = [mapping(part["SpecialToken"])["id"] if "SpecialToken" in part else "" for part in step["single"]]
            if words == [""]:
                return False
            if len(words) == len("ab") and words[1] == "" and dict(_named(settings)).get("bos_token") == words[0]:
                return True
            raise _unsupported(path, "what it puts around a text", "bos_token before it, or nothing", words)
        if step.get("type") != "ByteLevel":
            raise _unsupported(path, "what it puts around a text", "TemplateProcessing or nothing", step.get("type"))
    return settings.get("add_bos_token") is True and "bos_token" in named


def _unsupported(path: Path, what: str, expected: object, found: object) -> UnsupportedFormat:
    message = f"{what}, which llama.cpp does not do alike"
    return UnsupportedFormat(message, file=path, expected=expected, found=repr(found)[:200])
