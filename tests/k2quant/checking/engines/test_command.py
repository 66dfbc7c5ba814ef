"""`k2quant check`: what it prints, how it exits, what it reads of an address, and what `convert` says at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2quant.checking.engines import check_engine, check_written
from k2quant.cli import main
from k2quant.cli.parts import conversion
from k2quant.errors import CheckpointError
from rewritten import Hollow
from served.hub import hub

Make = Callable[[str], Hollow]


def k2quant(*words: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def test_what_passes_exits_0_and_what_fails_3(made: Make, tmp_path: Path) -> None:
    """Failures come first, with what was found, what the engine does, and the file that says so."""
    found = made("int4")
    done = k2quant("check", "--engine", "vLLM", "--memory", "1GB", found.write(tmp_path / "good"))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("vLLM 0.33.0, tensor parallel 1: ")
    assert ", 0 failed, 0 cannot be told" in done.stdout
    found.block["ignore"] = ["lm_head"]
    done = k2quant("check", "--engine", "sglang", "--memory", "1GB", found.write(tmp_path / "bad"))
    assert done.exit_code == 3
    assert done.stderr == "k2quant: SGLang 0.5.23 would not run it: 1 of its rules fails\n"
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("FAILED lists: `model.layers.0.self_attn.q_a_proj.weight`: the engine takes")
    assert "sglang/srt/layers/quantization" in second


def test_what_cannot_be_told_is_said_and_fails_nothing(made: Make, tmp_path: Path) -> None:
    """Without a size of memory the command cannot tell whether it is enough, names the option, and exits 0."""
    folder = made("int4").write(tmp_path / "out")
    done = k2quant("check", "--engine", "vllm", folder)
    assert done.exit_code == 0
    assert "memory  cannot tell" in done.stdout
    assert "what a device has was not said (--memory)" in done.stdout
    assert "tokenizer" not in done.stdout
    assert "tokenizer" in k2quant("check", "--engine", "vllm", "--all", folder).stdout


def test_json_has_every_finding_and_the_memory(made: Make, tmp_path: Path) -> None:
    """One document: what each rule came to, why, by which file, and the bytes of each device."""
    folder = made("fp8").write(tmp_path / "out")
    done = k2quant("check", "--engine", "vllm", "--tensor-parallel", 2, "--context", 1000, "--json", folder)
    said = json.loads(done.stdout)
    own = check_engine(folder, "vllm", tensor_parallel=2, context=1000)
    assert said["passed"] is own.passed
    assert [finding["rule"] for finding in said["findings"]] == [finding.rule for finding in own.findings]
    assert said["memory"]["needed"] == own.memory.needed
    assert said["tensor_parallel"] == 2


@pytest.mark.parametrize("words", [["--memory", "much"], ["--tensor-parallel", "0"], ["--engine", "ollama"], []])
def test_a_request_without_sense_exits_2(words: list[str], k2_source: Path) -> None:
    """An option that is none, or a missing engine."""
    engine = [] if "--engine" in words or not words else ["--engine", "vllm"]
    assert k2quant("check", *engine, *words, k2_source).exit_code == 2


def test_what_is_no_checkpoint_exits_1(tmp_path: Path) -> None:
    """As with every command."""
    assert k2quant("check", "--engine", "vllm", tmp_path).exit_code == 1


def test_a_gguf_file_is_no_checkpoint(tmp_path: Path) -> None:
    """Who names one hears what `check` is about, with exit code 2."""
    done = k2quant("check", "--engine", "llama.cpp", tmp_path / "K2.gguf")
    assert (done.exit_code, "check what it is made from" in done.stderr) == (2, True)


def test_a_result_shows_itself_in_a_line(made: Make, tmp_path: Path) -> None:
    """Engine, version and counts, however many rules there are."""
    done = check_engine(made("int4").write(tmp_path / "out"), "vllm")
    assert repr(done).startswith("EngineCheck(engine='vLLM 0.33.0', folder=")
    assert "failed=0, cannot_tell=1" in repr(done)
    assert "\n" not in repr(done.memory)
    assert "<table>" in done._repr_html_()


def test_a_conversion_asks_the_engines_that_its_formats_are_for(made: Make, tmp_path: Path) -> None:
    """By what a format says of itself; of files that were copied, and of memory, nothing is said."""
    found = made("mxfp4")
    found.files = {}
    checks = check_written(found.write(tmp_path / "mxfp4"))
    assert [each.engine for each in checks] == ["vllm", "transformers"]
    assert [finding for each in checks for finding in each.failures] == []
    assert check_written(made("bf16").write(tmp_path / "bf16")) == []


def test_what_engines_say_ends_no_conversion(k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the output cannot be read once more, a conversion that is done stays done."""

    def fails(_: Path) -> None:
        raise CheckpointError("gone")

    monkeypatch.setattr("k2quant.checking.engines.check_written", fails)
    done = k2quant("convert", "--to", "int4", k2_source, tmp_path / "out")
    assert (done.exit_code, done.stderr) == (0, "")
    assert conversion.tell_engines.__doc__


def test_an_address_is_checked_by_headers_alone(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint in a hub no weight comes; of scales of whole matrices, which are data, nothing can be told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = made("nvfp4").write(tmp_path / "out")
    with hub(tmp_path / "hub") as server:
        server.repo("org/small", folder)
        server.here(monkeypatch)
        away = check_engine("hf://org/small", "vllm", memory=10**9)
    here = check_engine(folder, "vllm", memory=10**9)
    told = {finding.rule: finding.result for finding in away.findings}
    assert told == {finding.rule: finding.result for finding in here.findings} | {"whole scales": "cannot tell"}
    assert away.folder.startswith("hf://org/small@")
