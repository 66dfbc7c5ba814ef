"""K2's tokenizer without its code: ids as tiktoken and the published code give them, in every way it is asked."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from k2quant.checkpoint.files.tokenizer.splitting import PATTERN
from k2quant.cli import main
from k2quant.data.examples import examples_of
from k2quant.data.tokens import Reader
from k2quant.errors import CheckpointError, MalformedFile, MissingExtra, UnsafePath, UnsupportedFormat
from k2quant.eval.asking.models import _added_tokens, _tokenizer
from k2quant.model.generation import load_tokenizer, open_tokenizer
from k2quant.model.generation.kimi import pieces
from k2quant.model.passes.texts import read_text
from kimi_files import NAMED, code, write_files

PARTS = [
    *("a", "B", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x1c", "中", "文字abc", "é", "ß", "ǅ", "́", "1", "234"),
    *("'s", "'LL", "!", "…", "👍🏽", "\ud800", "<|im_", "|>", "<|im_end|>", "[BOS]", "<|tool_call_begin|>"),
]


def published(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Return tiktoken with the special tokens that K2's code gives it, reserved ones included."""
    first = len(ranks)
    special = {NAMED.get(place, f"<|reserved_token_{first + place}|>"): first + place for place in range(256)}
    return tiktoken.Encoding("made", pat_str="|".join(PATTERN), mergeable_ranks=ranks, special_tokens=special)


def cut(text: str, most: int, longest: int) -> Iterator[str]:
    """Cut a text as the published code says that it does, a character at a time."""
    for begin in range(0, len(text), most):
        piece, run, blank = "", 0, None
        for character in text[begin : begin + most]:
            run = run + 1 if character.isspace() is blank else 1
            blank = character.isspace()
            if run > longest:
                yield piece
                piece, run = "", 1
            piece += character
        yield piece


@given(st.text(st.sampled_from("ab \n\u3000\x1c\x85中"), max_size=80), st.integers(1, 30), st.integers(1, 9))
def test_long_texts_are_cut_where_its_code_cuts_them(text: str, most: int, longest: int) -> None:
    """Pieces of so many characters, and in them no longer run of blanks or of others."""
    assert list(pieces(text, most, longest)) == list(cut(text, most, longest))


def test_ids_are_those_of_tiktoken(kimi: Path, ranks: dict[bytes, int]) -> None:
    """Texts of all scripts, blanks and special tokens have tiktoken's ids, by each way to ask; decoding inverts it.

    The kind of fault: a good checkpoint whose tokenizer is code.
    """
    tokenizer, truth, draw = open_tokenizer(kimi), published(ranks), random.Random(3)  # noqa: S311  texts
    texts = ["".join(draw.choices(PARTS, k=draw.randrange(40))) for _ in range(300)] + ["", "<|reserved_token_500|>"]
    for text in texts:
        ids = truth.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == ids
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text, allow_special_tokens=False) == truth.encode(text, disallowed_special=())
        assert tokenizer.decode(ids) == truth.decode(ids)
    assert tokenizer(texts[:9])["input_ids"] == truth.encode_batch(texts[:9], allowed_special="all")
    odd = [draw.randrange(truth.n_vocab) for _ in range(500)]  # bytes that are no UTF-8
    assert tokenizer.decode(odd) == truth.decode(odd)
    assert tokenizer.vocab_size == len(tokenizer) == truth.n_vocab


def test_very_long_texts_have_the_ids_of_its_code(kimi: Path, ranks: dict[bytes, int]) -> None:
    """Beyond 400,000 characters and runs of 25,000 ids are those of the pieces, cut in a token or not."""
    tokenizer, truth = open_tokenizer(kimi), published(ranks)
    for text in ("the" * 20_000 + " " * 60_001 + "quick", "say it " * 60_000, "x" * 24_995 + "<|im_end|>" + "z"):
        wanted = [place for part in cut(text, 400_000, 25_000) for place in truth.encode(part, allowed_special="all")]
        assert tokenizer.encode(text) == wanted
    assert truth.encode("the" * 20_000) != tokenizer.encode("the" * 20_000)


def test_special_tokens_have_their_tasks(kimi: Path, ranks: dict[bytes, int]) -> None:
    """BOS, EOS, UNK and PAD are those of the file; those that it calls additional are left out of answers."""
    tokenizer, first = open_tokenizer(kimi), len(ranks)
    found = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id]
    assert found == [first, first + 1, first + 254, first + 255]
    ids = [first, ranks[b"a"], first + 2, first + 11, first + 99, first + 255]
    shown = f"a<|tool_call_begin|><|reserved_token_{first + 99}|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == shown
    short, long = tokenizer(["a", "a, b: c"], padding=True)["input_ids"]
    assert short == [ranks[b"a"], *[first + 255] * (len(long) - 1)]
    assert _added_tokens(tokenizer) == []


def test_chats_are_rendered_as_its_code_renders_them(kimi: Path, ranks: dict[bytes, int]) -> None:
    """Special tokens in what a user says count as such, and the keys of tools are put in order."""
    tokenizer, truth = open_tokenizer(kimi), published(ranks)
    chat = [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "中文"}]
    text = "<|im_user|>user<|im_middle|>hi <|im_end|><|im_end|><|im_assistant|>assistant<|im_middle|>中文<|im_end|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == truth.encode(text + "<|im_assistant|>assistant<|im_middle|>", allowed_special="all")
    (kimi / "chat_template.jinja").write_text("{{ tools | tojson }}")
    shown = open_tokenizer(kimi).apply_chat_template(chat, tools=[{"b": 1, "a": [{"d": 2, "c": 3}]}], tokenize=False)
    assert json.dumps(json.loads(shown)) == json.dumps([{"a": [{"c": 3, "d": 2}], "b": 1}])


def test_tools_that_need_code_are_refused(kimi: Path) -> None:
    """A template that takes tools as TypeScript, written by code of the checkpoint, does without tools only."""
    chat = [{"role": "user", "content": "hi"}]
    (kimi / "chat_template.jinja").write_text("{% if tools_ts_str %}{{ tools_ts_str }}{% else %}{{ tools }}{% endif %}")
    tokenizer = open_tokenizer(kimi)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "None"
    with pytest.raises(CheckpointError, match=r"tools as code of the checkpoint .*`trust_remote_code=True`"):
        tokenizer.apply_chat_template(chat, tools=[{"a": 1}], tokenize=False)


def filled(ranks: dict[bytes, int], count: int) -> dict[bytes, int]:
    """Return ranks with tokens that no text has behind them, so that with special tokens there are so many."""
    more = range(count - 256 - len(ranks))
    return ranks | {b"\xff\xfe" + number.to_bytes(2): len(ranks) + number for number in more}


def test_all_that_reads_text_reads_it(ranks: dict[bytes, int], k2_thinking: Path, tmp_path: Path) -> None:
    """generate, chats to learn from and texts to compare models on take it without code of the checkpoint."""
    folder, ranks = tmp_path / "K2", filled(ranks, 2048)  # rows of the small model's embedding
    shutil.copytree(k2_thinking, folder)
    write_files(folder, ranks)
    (folder / "tokenization_kimi.py").write_text(code())
    command = ["generate", str(folder), "--prompt", "The quick 中文", "--max-new-tokens", "2", "--json"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.stderr
    truth = published(ranks)
    assert json.loads(shown.stdout)["prompt_tokens"] == len(truth.encode("The quick 中文"))
    tokenizer = load_tokenizer(folder)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "世界"}]}
    reader = Reader(tokenizer=tokenizer, vocabulary=2048)
    [document] = reader.documents(examples_of(row, "here", tokenizer))
    said = [int(token) for token in document.tokens[document.learnt]]
    assert truth.decode(said) == "世界<|im_end|>"
    assert reader.unread() == ""
    (tmp_path / "text.txt").write_text("it's 12345 and 世界")
    text = read_text(tmp_path / "text.txt", tokenizer)
    assert text.batches[0][0].tolist() == truth.encode("it's 12345 and 世界")
    assert text.unread == ""


def test_a_folder_of_a_tokenizer_alone_will_do(kimi: Path, ranks: dict[bytes, int]) -> None:
    """Where a server has the model, --tokenizer names a folder without weights; one that lies is still named."""
    request: Any = SimpleNamespace(trust_remote_code=False, follow_links=False)
    assert _tokenizer(kimi, request).encode("it's") == published(ranks).encode("it's")
    (kimi / "tiktoken.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: not every byte"):
        _tokenizer(kimi, request)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4998123456\n"


def test_a_clone_for_the_tokenizer_alone_will_do(kimi: Path, tmp_path: Path) -> None:
    """Where shards and pictures are pointers the tokenizer is read; its own files may be none, nor links out.

    The kind of fault: a good folder that is refused.
    """
    for name in ("model-00001-of-000062.safetensors", "model.safetensors.index.json", "figure.png"):
        (kimi / name).write_bytes(LFS)
    assert open_tokenizer(kimi).encode("a")
    (tmp_path / "outside").write_bytes(b"1")
    (kimi / "figure2.png").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath, match=r"figure2\.png: a link that leaves the folder"):
        open_tokenizer(kimi)
    (kimi / "figure2.png").unlink()
    os.mkfifo(kimi / "pipe")
    with pytest.raises(MalformedFile, match="pipe: not a regular file"):
        open_tokenizer(kimi)
    (kimi / "pipe").unlink()
    for name in ("tiktoken.model", "config.json", "tokenization_kimi.py", "vocabulary.tiktoken"):
        before = (kimi / name).read_bytes() if (kimi / name).exists() else None
        (kimi / name).write_bytes(LFS)
        with pytest.raises(MalformedFile, match=f"{re.escape(name)}: a git-lfs pointer"):
            open_tokenizer(kimi)
        (kimi / name).unlink()
        if before is not None:
            (kimi / name).write_bytes(before)


def test_the_cause_is_not_lost_to_the_model_beside_it(kimi: Path) -> None:
    """What is wrong with a tokenizer is said, not that the model in its folder is of another family."""
    request: Any = SimpleNamespace(trust_remote_code=False, follow_links=False)
    (kimi / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (kimi / "tiktoken.model").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: a git-lfs pointer"):
        _tokenizer(kimi, request)


# --- what is missing or old -------------------------------------------------------------------------------------------


def test_without_tiktoken_the_extra_is_named(kimi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tiktoken is not installed, the message has the command that installs it.

    The kind of fault: a message that does not name what helps.
    """
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(MissingExtra, match=r"tiktoken\.model: .* not installed; pip install 'k2quant\[tokenizer\]'"):
        open_tokenizer(kimi)


CODE = {
    "an import that moved": (
        "from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode\n",
        CheckpointError,
        r"tokenization_kimi\.py: imports bytes_to_unicode .*; take tokenization_kimi\.py anew .* leave out `trust",
    ),
    "a package that is not there": (
        "import tiktoken_of_some_other_kind\n",
        MissingExtra,
        r"needs tiktoken, found .*tiktoken_of_some_other_kind.*; pip install 'k2quant\[tokenizer\]'",
    ),
    "another package": ("import blobfile_of_old\n", MissingExtra, r"found .*blobfile_of_old.*; install the package"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_that_does_not_load_is_named(
    case: str, kimi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --trust-remote-code the checkpoint's own code runs; what it lacks, or the file to renew, is named."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    text, kind, said = CODE[case]
    (kimi / "tokenization_kimi.py").write_text(text + "class TikTokenTokenizer: pass\n")
    with pytest.raises(kind, match=said) as caught:
        open_tokenizer(kimi, trust_remote_code=True)
    assert "tokenizer.json" not in str(caught.value)


def test_code_without_its_ranks_names_the_missing_file(kimi: Path) -> None:
    """tokenization_kimi.py alone reads nothing: the file to fetch is tiktoken.model, never a tokenizer.json."""
    (kimi / "tokenization_kimi.py").write_text('VOCAB_FILES_NAMES = {"vocab_file": "tiktoken.model"}\n')
    (kimi / "tiktoken.model").unlink()
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: is not there.*take it from the model's") as caught:
        open_tokenizer(kimi)
    assert "tokenizer.json" not in str(caught.value)


OTHER_PATTERNS = {
    "a part less": code(PATTERN[1:]),
    "a part more": code([*PATTERN[:4], r"[/]+", *PATTERN[4:]]),
    "another order": code([PATTERN[1], PATTERN[0], *PATTERN[2:]]),
    "one that is K2's no longer": code([*PATTERN[:3], r"\p{N}", *PATTERN[4:]]),
    "under another name": 'import tiktoken\nPATTERN = r"\\p{L}+|\\s+"\n',
    "none that can be seen": "import tiktoken\nfrom somewhere import pattern\n",
    "two": code(more='OTHER = r"""\\p{L}+|\\s+"""\n'),
    "two of K2's": code(more=code()),
    "something joined to it": code().replace("    )\n", '    ) + r"|x"\n', 1),
    "something else between": code().replace('"|".join', '"".join'),
    "in comments alone": "import tiktoken\n" + "".join(f"# {line}\n" for line in code().splitlines()),
    "no code": code() + "(" * 9,
    "strings without an end": code() + 'x = """',
    "brackets without an end": "import tiktoken\n" + "[" * 20_000,
}


@pytest.mark.parametrize("case", OTHER_PATTERNS)
def test_a_tokenizer_of_another_pattern_is_refused(case: str, kimi: Path) -> None:
    """Code in the folder that does not split text as K2's does says that ids would not be equal; it is read, not run.

    The kind of fault: ids that are wrong without a word.
    """
    (kimi / "tokenization_kimi.py").write_text(OTHER_PATTERNS[case])
    with pytest.raises(UnsupportedFormat, match=r"tokenization_kimi\.py: splits text by another pattern.*if you trust"):
        open_tokenizer(kimi)


WHERE_IT_IS_NAMED: dict[str, Any] = {
    "a list": {"AutoTokenizer": ["bpe.TikTokenTokenizer", None]},
    "text": {"AutoTokenizer": "bpe.TikTokenTokenizer"},
    "the old way": ["bpe.TikTokenTokenizer", None],
    "a repository": {"AutoTokenizer": ["somebody/model--bpe.TikTokenTokenizer", None]},
    "through another": {"AutoTokenizer": ["wrapped.TikTokenTokenizer", None]},
}


@pytest.mark.parametrize("case", WHERE_IT_IS_NAMED)
def test_code_counts_under_whatever_name_the_settings_have_for_it(case: str, kimi: Path) -> None:
    """The file that auto_map names is looked at as tokenization*.py is, and what either imports of the folder."""
    path = kimi / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": WHERE_IT_IS_NAMED[case]}))
    (kimi / "wrapped.py").write_text("from .bpe import TikTokenTokenizer\n")
    (kimi / "bpe.py").write_text("from .wrapped import more\n" + code())
    assert open_tokenizer(kimi).encode("a")
    (kimi / "bpe.py").write_text(code(PATTERN[1:]))
    with pytest.raises(UnsupportedFormat, match=r"bpe\.py: splits text by another pattern"):
        open_tokenizer(kimi)


def test_code_is_found_by_the_models_config_too(kimi: Path) -> None:
    """Where the tokenizer's settings name no code, transformers goes by config.json, and so do we."""
    path = kimi / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["auto_map"]
    path.write_text(json.dumps(settings))
    (kimi / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["bpe.TikTokenTokenizer", None]}}))
    (kimi / "bpe.py").write_text(code(PATTERN[1:]))
    with pytest.raises(UnsupportedFormat, match=r"bpe\.py: splits"):
        open_tokenizer(kimi)


@pytest.mark.parametrize("named", ["x/bpe.Class", "/etc/bpe.Class", "a\x00b.Class"])
def test_code_out_of_the_folder_is_not_looked_at(named: str, kimi: Path) -> None:
    """A name in auto_map that is no plain file name is refused."""
    path = kimi / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [named, None]}}))
    with pytest.raises(UnsafePath, match="not a plain file name"):
        open_tokenizer(kimi)


LAID_OUT = {
    "as K2's": code(),
    "in one line": "import tiktoken\nPATTERN='|'.join([" + ",".join(f'r"{part}"' for part in PATTERN) + "])\n",
    "another end of line": code().replace("\n", "\r\n"),
    "a comma behind the list": code().replace("        ]\n", "        ],\n"),
    "without tiktoken": "class TikTokenTokenizer: pass\n",
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_the_layout_of_its_code_plays_no_part(case: str, kimi: Path) -> None:
    """K2's pattern is found however the lines of the code are broken, and code that splits nothing is no trouble."""
    (kimi / "tokenization_kimi.py").write_bytes(LAID_OUT[case].encode())
    assert open_tokenizer(kimi).encode("a")


def test_a_tokenizer_of_another_class_is_left_to_transformers(kimi: Path) -> None:
    """A tiktoken.model beside a tokenizer that is not K2's is not read as if it were."""
    changes: dict[str, Any] = json.loads((kimi / "tokenizer_config.json").read_text())
    (kimi / "tokenizer_config.json").write_text(json.dumps(changes | {"tokenizer_class": "OtherTokenizer"}))
    with pytest.raises(CheckpointError, match="`trust_remote_code=True`"):
        open_tokenizer(kimi)
