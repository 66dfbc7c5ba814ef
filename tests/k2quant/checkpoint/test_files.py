"""Files as clones, editors and hubs leave them: pointers, links written as text, byte-order marks, names of models."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.files.paths import open_regular, write_all
from k2quant.checkpoint.files.sources import check_folder, no_folder
from k2quant.checkpoint.reader import CONFIG, INDEX, open_checkpoint
from k2quant.cli import main
from k2quant.errors import (
    CheckpointError,
    CheckpointWarning,
    DestinationStale,
    K2QuantError,
    MalformedFile,
    UnsafePath,
    UsageError,
)
from k2quant.report import write_html

BOM = b"\xef\xbb\xbf"


def pointer(size: int = 4_998_123_456) -> bytes:
    """Return what git-lfs leaves in the place of a file."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + f"\nsize {size}\n".encode()


@pytest.fixture
def source(k2_source: Path, tmp_path: Path) -> Path:
    """A copy of the small K2, with all that a release has beside its weights."""
    folder = tmp_path / "K2"
    shutil.copytree(k2_source, folder)
    for name in ("tokenizer.json", "tiktoken.model", "tokenization_kimi.py", "preprocessor_config.json", "LICENSE"):
        (folder / name).write_text("{}")
    return folder


# --- pointers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model-1-of-3.safetensors",
        INDEX,
        CONFIG,
        "tokenizer.json",
        "tokenizer_config.json",
        "tiktoken.model",
        "tokenization_kimi.py",
        "preprocessor_config.json",
        "LICENSE",
    ],
)
def test_a_pointer_of_git_lfs_is_named_wherever_it_stands(source: Path, tmp_path: Path, name: str) -> None:
    """Field fault, wrong without a word: a pointer was copied as if it were the file. Now nothing is written."""
    shard = next(source.glob("*1-of-3*"))
    path = shard if "safetensors" in name and name != INDEX else source / name
    path.write_bytes(pointer())
    with pytest.raises(MalformedFile, match="a git-lfs pointer, not the file itself") as caught:
        k2quant.convert(source, tmp_path / "out", to="bf16")
    assert path.name in str(caught.value)
    assert "git lfs pull" in str(caught.value)
    assert "hf download" in str(caught.value)
    assert "4,998,123,456 bytes" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_inspect_names_a_pointer_beside_the_weights(source: Path) -> None:
    """What stops a conversion is a problem for `inspect` too, though no weight is concerned."""
    (source / "tokenizer.json").write_bytes(pointer())
    (problem,) = k2quant.inspect(source).problems
    assert "tokenizer.json: a git-lfs pointer" in problem


def test_inspect_concludes_nothing_from_what_it_cannot_read(source: Path) -> None:
    """Where a weight cannot be read, the problem is said, and not that experts or quantised weights are missing."""
    index = json.loads((source / INDEX).read_text())
    lost = next(name for name in index["weight_map"] if name.endswith("weight_scale_inv"))
    del index["weight_map"][lost]
    (source / INDEX).write_text(json.dumps(index))
    found = k2quant.inspect(source)
    assert any(lost in problem for problem in found.problems)
    assert found.remarks == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_an_adapter_is_named(k2_source: Path, tmp_path: Path, name: str) -> None:
    """The kind's brother in merge: neither of an adapter's files may be a pointer."""
    update = tmp_path / "adapter"
    update.mkdir()
    (update / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []}')
    (update / "adapter_model.safetensors").write_bytes(bytes(8))
    (update / name).write_bytes(pointer())
    with pytest.raises(MalformedFile, match=rf"{name}: a git-lfs pointer"):
        k2quant.merge(k2_source, update, tmp_path / "out", to="bf16")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pointer(10**9), "stand for 1,000,000,000 bytes"),
        (pointer(10**18), "a git-lfs pointer"),
        (b"version https://git-lfs.github.com/spec/v1\nsize " + b"9" * 500, "a git-lfs pointer"),
        (b"version https://hawser.github.com/spec/v1\noid sha256:0\nsize 3\n", "a git-lfs pointer"),
        (b"# xet version 0\nfilesize = 3\nhash = '0'\n", "a git-xet pointer"),
        (b"/annex/objects/SHA256E-s3--0123.safetensors\n", "a git-annex pointer.*git annex get"),
        (b"../../blobs/0123abcd", "a link that a checkout wrote as text.*found ../../blobs/0123abcd"),
        (b"./\xff\xfe", "a link that a checkout wrote as text"),
    ],
)
def test_every_kind_of_pointer_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    """Pointers of git-lfs, git-xet, git-annex, and links that a checkout wrote as text, whatever they claim."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(MalformedFile, match=words) as caught:
        open_regular(tmp_path / "file")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"../data\nis where it lies\n",
        b"../data/notes.txt\n",
        b"a file about version https://git-lfs.github.com/spec/v1",
        pointer() + bytes(2000),
        b"/annex/objects/key and more",
    ],
)
def test_what_only_looks_like_a_pointer_is_a_file(source: Path, tmp_path: Path, content: bytes) -> None:
    """Text that speaks of pointers, or is too large to be one, is copied as it is."""
    (source / "notes.txt").write_bytes(content)
    k2quant.convert(source, tmp_path / "out", to="bf16")
    assert (tmp_path / "out" / "notes.txt").read_bytes() == content


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, INDEX])
def test_a_link_to_nothing_is_named(source: Path, tmp_path: Path, name: str) -> None:
    """The kind's brother: tokenizer or config, links to files that were not fetched, were left out without a word."""
    (source / name).unlink()
    (source / name).symlink_to("what.is.not.there")
    with pytest.raises(CheckpointError, match=rf"{name}: a link to a file that is not there"):
        k2quant.convert(source, tmp_path / "out", to="bf16")
    assert not (tmp_path / "out").exists()


# --- byte-order marks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
def test_a_config_with_a_byte_order_mark_is_read_and_written_without(source: Path, tmp_path: Path, to: Any) -> None:
    """Field fault, a good checkpoint refused: a mark before config.json and index; none is written."""
    for name in (CONFIG, INDEX):
        (source / name).write_bytes(BOM + (source / name).read_bytes())
    k2quant.convert(source, tmp_path / "out", to=to)
    for name in (CONFIG, INDEX):
        json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
    assert k2quant.verify(source, tmp_path / "out").passed


def test_a_config_that_is_carried_along_loses_its_mark_alone(k2_bf16: Path, tmp_path: Path) -> None:
    """Where nothing of a config changes, all of it stays but the mark, with which transformers would not read it."""
    source = tmp_path / "K2"
    shutil.copytree(k2_bf16, source)
    content = (source / CONFIG).read_bytes().replace(b"{", b"{ \t", 1)
    (source / CONFIG).write_bytes(BOM + content)
    (source / "tokenizer_config.json").write_bytes(BOM + b"{}")
    k2quant.convert(source, tmp_path / "out", to="bf16", shard_size=2**20)
    assert (tmp_path / "out" / CONFIG).read_bytes() == content
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == BOM + b"{}"  # a copy is a copy


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_another_encoding_is_refused_by_name(source: Path, encoding: str) -> None:
    """A config in UTF-16 or UTF-32 is no config, and the message says what it is."""
    text = (source / CONFIG).read_text()
    (source / CONFIG).write_bytes(("\ufeff" + text).encode(encoding))
    with pytest.raises(MalformedFile, match=f"config.json: the encoding, expected UTF-8, found {encoding[:6].upper()}"):
        open_checkpoint(source)


# --- what is named where a folder is expected -------------------------------------------------------------------------

HUB = "moonshotai/Kimi-K2-Instruct"
GET = "hf download moonshotai/Kimi-K2-Instruct --local-dir Kimi-K2-Instruct"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (HUB, GET),
        (f"{HUB}/", GET),
        (f"hf://{HUB}", GET),
        (f"https://huggingface.co/{HUB}", GET),
        (f"https://huggingface.co/{HUB}/tree/main", GET),
        (f"huggingface.co/{HUB}?library=transformers", GET),
        (f"hf://{HUB}@0905", "hf download moonshotai/Kimi-K2-Instruct --revision 0905 --local-dir Kimi-K2-Instruct"),
        (f"https://huggingface.co/{HUB}/blob/v2/config.json", "--revision v2 --local-dir"),
        ("s3://bucket/K2", "an address, not a folder; copy the checkpoint"),
        ("no/such/folder", "no such folder"),
        ("/nowhere", "no such folder"),
        ("a\0b/c", "no such folder"),
    ],
)
def test_a_name_of_the_hub_is_told_how_to_get_it(
    given: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field fault, a message that helps nobody: a hub id where a folder is expected, in all its spellings."""
    monkeypatch.chdir(tmp_path)
    for one in (given, str(Path(given))):
        said = no_folder(one)
        assert said is not None
        assert words in said
        assert ("hf download" in said) == (words != "no such folder" and "s3:" not in given)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"hf://{HUB}@0905", f"hf://{HUB}@0905"),
        ("s3://bucket/K2", "s3://bucket/K2"),
        ("s3://KEY:SECRET@bucket/K2", "s3://...@bucket/K2"),
        ("hf://user:SECRET@org/K2", "hf://...@org/K2"),
        ("gs://bucket/K2?token=SECRET", "gs://bucket/K2"),
    ],
)
def test_an_address_where_only_a_folder_will_do_is_shown_as_it_was_written(given: str, shown: str) -> None:
    """A path has one slash where the address had two; what may be secret in it is left out."""
    with pytest.raises(CheckpointError) as refused:
        check_folder(Path(given))
    assert str(refused.value).startswith(f"{shown}: an address")
    assert "SECRET" not in str(refused.value)


def test_an_address_with_one_slash_is_told_the_right_one() -> None:
    """Where addresses are taken, nobody has to download."""
    with pytest.raises(CheckpointError, match=f"^hf:/{HUB}: an address .*; name hf://{HUB}, or download it first"):
        check_folder(Path(f"hf:/{HUB}"), addresses=True)


@pytest.mark.parametrize("name", ["model-00001.safetensors", "config.json", "fp9"])
def test_a_slip_in_a_folder_that_is_there_is_no_name_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that helps nobody: a mistyped file is not to be downloaded; where both may be meant, both are said."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    said = no_folder(f"models/{name}")
    assert said is not None
    assert said.startswith(f"no such folder; models is there, but has no {name}")
    assert ("hf download" in said) == (name == "fp9")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model_type": "\xe9"}', "not valid JSON, expected UTF-8, found byte 0xe9; save it as UTF-8"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON, found brackets within brackets, .*from its release again"),
    ],
)
def test_a_config_that_no_reader_takes_says_what_to_do(source: Path, content: bytes, words: str) -> None:
    """A message that helps nobody: Latin-1 and endless nesting are named in words, not in Python's."""
    (source / CONFIG).write_bytes(content)
    with pytest.raises(MalformedFile, match=words):
        open_checkpoint(source)


def test_a_link_to_what_cannot_be_read_is_named(linked: Path, tmp_path: Path) -> None:
    """A message that helps nobody: of a file that opens and gives an error the path is said, not its folder's."""
    (linked / "x.json").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"linked/x\.json: cannot be read, found Input/output error"):
        k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)
    (linked / "x.json").unlink()
    (linked / "x.json").symlink_to("x.json")
    with pytest.raises(CheckpointError, match=r"x\.json: .*; (remove or mend the link|fetch that file, or remove)"):
        k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)


def test_a_gguf_file_is_no_source(tmp_path: Path) -> None:
    """Its folder is none either: what it was made from is asked for."""
    (tmp_path / "k2.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"written and never read; name the checkpoint that it was made from$"):
        open_checkpoint(tmp_path / "k2.gguf")


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", INDEX, CONFIG])
def test_a_file_of_the_checkpoint_points_to_its_folder(tmp_path: Path, name: str) -> None:
    """A shard, the index or the config in place of the folder: the folder is named."""
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=rf"a file, not a folder; name the folder that it lies in: {tmp_path}$"):
        open_checkpoint(tmp_path / name)


def test_the_cache_folder_of_a_model_points_to_its_revision(tmp_path: Path) -> None:
    """`models--org--name` of the hub's cache holds no checkpoint itself: the message names a snapshot."""
    (tmp_path / "models--a--b" / "snapshots" / "0123").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"name the folder of a revision: .*/models--a--b/snapshots/0123"):
        open_checkpoint(tmp_path / "models--a--b")


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", HUB, "out", "--to", "bf16"],
        ["convert", HUB, "out", "--to", "bf16", "--dry-run"],
        ["merge", HUB, HUB, "out", "--to", "bf16"],
        ["inspect", HUB],
        ["verify", HUB, "out"],
        ["verify", "--checksums", HUB],
        ["diff", HUB, "out"],
        ["report", HUB],
        ["generate", HUB, "--prompt", "a"],
        ["qat", "init", HUB, "-o", "new.yaml"],
        ["qat", "plan", "job.yaml"],
        ["qat", "train", "job.yaml"],
        ["qat", "export", "job.yaml", "out"],
        ["eval", "run", HUB, "--tasks", "gsm8k", "-o", "run"],
        ["eval", "fidelity", HUB, HUB],
        ["eval", "blame", HUB, HUB],
    ],
    ids=lambda arguments: "-".join(word.strip("-") for word in arguments[:2]),
)
def test_every_command_says_how_to_get_a_model(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that takes a checkpoint's folder says `hf download` where it is given a hub id."""
    (tmp_path / "job.yaml").write_text(f"model: {HUB}\noutput: run\ndata: {{path: a.jsonl}}\ntraining: {{steps: 1}}\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in {1, 2}, result.output
    assert GET in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: k2quant.convert(HUB, "out", to="bf16"),
        lambda: k2quant.inspect(HUB),
        lambda: k2quant.verify_checksums(HUB),
        lambda: k2quant.load_model(HUB),
        lambda: write_html(Path(HUB)),
    ],
)
def test_python_says_so_too(call: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sentence comes from Python."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(K2QuantError, match=GET):
        call()


@pytest.mark.parametrize("option", ["served_from", "tokenizer"])
def test_a_server_s_folders_are_told_so_too(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--served-from` and `--tokenizer` of `eval run` take folders, and say what to do with a hub id."""
    pytest.importorskip("lm_eval")
    from k2quant.eval.asking.models import describe
    from k2quant.eval.asking.request import Request

    monkeypatch.chdir(tmp_path)
    request = Request(model="k2", tasks=("gsm8k",), backend="api", base_url="http://x/v1")
    request = dataclasses.replace(request, **{option: Path(HUB)})  # type: ignore[arg-type]  # either is a path
    with pytest.raises(UsageError, match=GET):
        describe(request, None)


# --- links out of the folder ------------------------------------------------------------------------------------------


@pytest.fixture
def linked(source: Path, tmp_path: Path) -> Path:
    """A folder of links to the shards, index and tokenizer of another, with a config of its own."""
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != CONFIG:
            (folder / path.name).symlink_to(path)
    (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
    return folder


def test_a_folder_of_links_is_read_with_the_switch_alone(source: Path, linked: Path, tmp_path: Path) -> None:
    """Field fault, a good checkpoint refused: one set of shards, two configs. Off by default; the refusal names it."""
    with pytest.raises(UnsafePath, match=r"a link that leaves the folder.*copy the file.*`follow_links=True`"):
        k2quant.convert(linked, tmp_path / "out", to="bf16")
    assert not (tmp_path / "out").exists()
    k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)
    k2quant.convert(source, tmp_path / "plain", to="bf16")
    for path in (tmp_path / "plain").iterdir():
        apart = path.name in {"k2quant_report.json", "README.md"}  # which name the source
        assert apart or (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_conversion_of_links_resumes_with_the_switch_alone(linked: Path, tmp_path: Path) -> None:
    """What asked for the switch asks for it again: a resumed run and a finished one check links as the first did."""
    stopped = RuntimeError("stopped")

    def stop(done: int, _total: int) -> None:
        if done:
            raise stopped

    with pytest.raises(RuntimeError, match="stopped"):
        k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True, progress=stop)
    with pytest.raises(UnsafePath):
        k2quant.convert(linked, tmp_path / "out", to="bf16")
    assert not k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True).already_done
    with pytest.raises(UnsafePath):
        k2quant.convert(linked, tmp_path / "out", to="bf16")
    assert k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True).already_done


def remarks_of(folder: Path, out: Path, *, follow_links: bool = False) -> list[str]:
    """Convert a folder and return what is said of it."""
    report = k2quant.convert(folder, out, to="bf16", follow_links=follow_links).report
    return [str(text) for text in report["remarks"] if "links to folders" in text]


def test_links_to_folders_are_named_or_followed(source: Path, tmp_path: Path) -> None:
    """Silent wrong, a file that is dropped: linked folders are folders with the switch, and else are named."""
    assets = tmp_path / "elsewhere" / "assets"
    (assets / "deep").mkdir(parents=True)
    (assets / "deep" / "vocab.txt").write_text("a")
    (assets / "again").symlink_to(assets)
    (assets / "up").symlink_to(tmp_path)
    (source / "assets").symlink_to(assets)
    (source / "more").symlink_to(assets)
    (said,) = remarks_of(source, tmp_path / "named")
    assert said.endswith("links to folders: assets, more")
    assert not (tmp_path / "named" / "assets").exists()
    (said,) = remarks_of(source, tmp_path / "followed", follow_links=True)
    assert said.endswith("links to folders: more, assets/again, assets/up")
    assert list((tmp_path / "followed").rglob("*.txt")) == [tmp_path / "followed/assets/deep/vocab.txt"]
    assert not (tmp_path / "followed" / "assets").is_symlink()


def test_a_link_between_the_sources_own_folders_is_named(source: Path, tmp_path: Path) -> None:
    """Silent wrong, a file that is dropped: of a link that does not lead out of the folder a word is said too."""
    (source / "assets").mkdir()
    (source / "assets" / "vocab.txt").write_text("a")
    (source / "same").symlink_to("assets")
    (said,) = remarks_of(source, tmp_path / "out")
    assert said.endswith("links to folders: same")
    assert (tmp_path / "out" / "assets" / "vocab.txt").read_text() == "a"


def test_what_is_no_file_is_named(source: Path, tmp_path: Path) -> None:
    """Silent wrong, a file that is dropped: a pipe in a tokenizer's place is not read, but named."""
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")
    (source / "x.json").symlink_to("/dev/zero")
    (said,) = remarks_of(source, tmp_path / "out", follow_links=True)
    assert said.endswith("links to folders: tokenizer.json, x.json")


def test_a_folder_that_cannot_be_read_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent wrong, a file that is dropped: what lies in a locked folder is not just left out."""
    real = os.scandir

    def locked(path: Any) -> Any:
        if str(path).endswith("assets"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (source / "assets").mkdir()
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(CheckpointError, match=r"assets: cannot be read, found Permission denied"):
        k2quant.convert(source, tmp_path / "out", to="bf16")
    assert not (tmp_path / "out").exists()


def test_a_save_names_what_it_leaves_out(source: Path, tmp_path: Path) -> None:
    """Silent wrong, a file that is dropped: a saved model warns of each kind."""
    (source / "extra.safetensors").write_bytes(b"")
    (source / "assets").symlink_to(tmp_path)
    model = k2quant.load_model(source)
    with pytest.warns(CheckpointWarning) as caught:
        model.save_pretrained(tmp_path / "saved")
    words = [str(warning.message).partition(": ")[2] for warning in caught]
    assert words[0] == "left out, for the index does not name them: extra.safetensors"
    assert words[1].endswith("links to folders: assets")


def test_a_link_that_leads_elsewhere_since_is_another_source(linked: Path, k2_bf16: Path, tmp_path: Path) -> None:
    """A finished output of one set of shards is not taken for that of the set to which the links lead now."""
    k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)
    config = json.loads((k2_bf16 / CONFIG).read_text())
    for path in list(linked.glob("*.safetensors*")):
        path.unlink()
        path.symlink_to(k2_bf16 / path.name)
    (linked / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DestinationStale):
        k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)


@pytest.mark.parametrize("name", ["model-1-of-3.safetensors", INDEX, CONFIG, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["loop", "pipe", "device", "nowhere", "folder"])
def test_a_link_that_leads_to_no_file_is_an_error(linked: Path, tmp_path: Path, name: str, kind: str) -> None:
    """With the switch too, a loop, a pipe, a device or nothing behind a link neither hangs nor goes unsaid."""
    path = next(linked.glob("*1-of-3*")) if name.startswith("model-") else linked / name
    path.unlink()
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "/nowhere", "folder": "/"}[kind])
    begun = time.monotonic()
    if name == "tokenizer.json" and kind in {"pipe", "device", "folder"}:  # no file, so nothing to copy
        k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)
        assert not (tmp_path / "out" / name).exists()
        return
    with pytest.raises(CheckpointError):
        k2quant.convert(linked, tmp_path / "out", to="bf16", follow_links=True)
    assert time.monotonic() - begun < 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["../K2/model.safetensors", "/etc/passwd.safetensors", ".."])
def test_names_of_the_index_never_leave_the_folder(linked: Path, source: Path, file: str) -> None:
    """The switch is about links of the folder: a path in the index is refused as ever."""
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    (linked / INDEX).unlink()
    (linked / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_checkpoint(linked, follow_links=True)


def test_every_reader_has_the_switch(linked: Path, source: Path, tmp_path: Path) -> None:
    """Commands that read a checkpoint refuse the links without `--follow-links` and follow them with it."""
    k2quant.convert(source, tmp_path / "out", to="bf16")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "out" / path.name).symlink_to(path)
    for arguments, code in (
        (["inspect", str(linked)], 0),
        (["convert", str(linked), str(tmp_path / "new"), "--to", "int4", "--dry-run"], 0),
        (["verify", str(source), str(tmp_path / "out")], 0),
        (["verify", "--checksums", str(tmp_path / "out")], 0),
        (["diff", str(source), str(tmp_path / "out")], 3),
    ):
        refused = CliRunner().invoke(main, arguments)
        assert refused.exit_code == 1, refused.output
        assert "--follow-links" in refused.output
        followed = CliRunner().invoke(main, [*arguments, "--follow-links"])
        assert followed.exit_code == code, followed.output
        assert "leaves the folder" not in followed.output
    for command in (
        ["merge"],
        ["generate"],
        ["qat", "init"],
        ["qat", "plan"],
        ["qat", "train"],
        ["qat", "export"],
        ["eval", "run"],
        ["eval", "fidelity"],
        ["eval", "blame"],
    ):
        assert "--follow-links" in CliRunner().invoke(main, [*command, "--help"]).output


def test_a_model_of_links_is_loaded_and_hashed(linked: Path, source: Path) -> None:
    """`load_model`, `qat.load` and the hashes of evaluations follow links where they are asked to, and only there."""
    from k2quant.eval.asking.models import describe
    from k2quant.eval.asking.request import Request
    from k2quant.eval.runs.identity import model_hash, tokenizer_hash
    from k2quant.qat import load

    for reads in (k2quant.load_model, load):
        with pytest.raises(UnsafePath):
            reads(linked)
        assert reads(linked, follow_links=True).checkpoint.follow_links
    for hashes in (model_hash, tokenizer_hash):
        with pytest.raises(UnsafePath):
            hashes(linked)
        assert hashes(linked, follow_links=True) == hashes(source)
    request = Request(model="k2", tasks=("gsm8k",), backend="api", base_url="http://x/v1", served_from=linked)
    with pytest.raises(UnsafePath):
        describe(request, None)
    assert describe(dataclasses.replace(request, follow_links=True), None).model_hash == model_hash(source)


@pytest.mark.parametrize("most", [1 << 30, 300_001])
def test_all_bytes_are_written_however_few_the_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A system may take fewer bytes than it is given: the next write begins behind those."""
    real = os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        return real(descriptor, data[:most], offset)

    monkeypatch.setattr(os, "pwrite", short)
    data = os.urandom(2_000_003)
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), data, 7)
    assert (tmp_path / "file").read_bytes() == bytes(7) + data
