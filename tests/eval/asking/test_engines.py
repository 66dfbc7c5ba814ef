"""What engines take besides reaches them as it was meant, and nothing is said twice or in vain."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lm_eval.api.registry
import pytest
import torch
from click.testing import CliRunner, Result

from k2quant.cli import main
from k2quant.errors import DestinationStale, HarnessFault, UsageError
from k2quant.eval.asking.harness import vllm as ours
from k2quant.eval.asking.request import Request, check
from k2quant.eval.asking.running import run
from k2quant.eval.runs.folder import MANIFEST
from k2quant.nano import architecture, writing
from k2quant.nano.benchmark import write_tasks


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 with random weights, named after the architecture that transformers knows."""
    folder = tmp_path_factory.mktemp("model") / "nano"
    torch.manual_seed(7)
    with writing.claimed(folder):
        writing.write(folder, architecture.build(), {})
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano-K2's own tasks, three items each."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, 1)
    return folder


class Engine:
    """vLLM's `LLM` as far as lm-eval uses it: notes what it is given, and takes no argument that vLLM has not."""

    given: dict[str, Any]
    taken = frozenset({
        "model", "revision", "dtype", "tokenizer", "tokenizer_mode", "tokenizer_revision", "trust_remote_code",
        "tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "max_num_seqs", "quantization", "seed",
        "enable_lora", "max_lora_rank", "gpu_memory_utilization", "enable_expert_parallel", "kv_cache_dtype",
        "hf_overrides", "compilation_config",
    })  # fmt: skip
    """Of vLLM 0.11's EngineArgs, what lm-eval passes itself and what a large model needs."""

    def __init__(self, **given: Any) -> None:
        if strange := given.keys() - self.taken:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {strange.pop()!r}")
        if given.get("gpu_memory_utilization") == 0.01:
            raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")
        Engine.given = given
        self.llm_engine = SimpleNamespace(model_config=None)

    def generate(self, prompts: list[Any], *, sampling_params: list[Any], **_: Any) -> list[Any]:
        """Answer each prompt with how many tokens it has and may have; at an odd number, at the limit."""
        sizes = [len(prompt["prompt_token_ids"]) for prompt in prompts]
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(text=f"{size} {each.max_tokens}", finish_reason=("stop", "length")[size % 2])]
            )
            for size, each in zip(sizes, sampling_params, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Engine]]:
    """lm-eval's own class for vLLM, on a stand-in for vLLM, which needs a GPU."""
    from transformers import AutoTokenizer

    def open_tokenizer(name: str, *, tokenizer_mode: str, **options: Any) -> Any:  # noqa: ARG001  vLLM's signature
        return AutoTokenizer.from_pretrained(name, **options)

    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": Engine, "SamplingParams": SimpleNamespace, "TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": object},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda **_: None},
        "vllm.tokenizers": {"get_tokenizer": open_tokenizer},
    }
    for name, holds in parts.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0" if name == "vllm" else version(name))
    monkeypatch.setattr(lm_eval.api.registry, "register_model", lambda *_: lambda kind: kind)  # it would stay there
    kind = importlib.import_module("lm_eval.models.vllm_causallms").VLLM
    monkeypatch.setattr(ours, "get_model", lambda _: kind)
    yield Engine
    del sys.modules["lm_eval.models.vllm_causallms"]


BIG = {
    "tensor_parallel_size": 8,
    "pipeline_parallel_size": 2,
    "gpu_memory_utilization": 0.93,
    "enable_expert_parallel": True,
    "kv_cache_dtype": "fp8",
    "quantization": "compressed-tensors",
    "hf_overrides": {"num_experts_per_tok": 8},
    "max_model_len": 96,
}


def cli(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, ["eval", "run", *map(str, arguments)])


@pytest.mark.usefixtures("vllm")
def test_vllm_is_given_what_was_typed(nano: Path, tasks: Path, tmp_path: Path) -> None:
    """From the command line through lm-eval's class to vLLM's own arguments, each with its type; the run records them.

    How many tokens fit is one number: that of `max_model_len` is what vLLM is given, and the run's `max_length`.
    """
    typed = (
        "tensor_parallel_size=8,pipeline-parallel-size=2,gpu_memory_utilization=0.93",
        "enable_expert_parallel=true,kv_cache_dtype=fp8,quantization=compressed-tensors,max_model_len=96",
        'hf_overrides={"num_experts_per_tok": 8}',
    )
    options = [part for text in typed for part in ("--model-args", text)]
    found = cli(nano, "--backend", "vllm", "--tasks", "nano_add", "--include", tasks, "-o", tmp_path / "run", *options)
    assert found.exit_code == 0, found.output
    assert {name: Engine.given[name] for name in BIG} == BIG
    assert {name: type(Engine.given[name]) for name in BIG} == {name: type(value) for name, value in BIG.items()}
    assert (Engine.given["model"], Engine.given["dtype"], Engine.given["seed"]) == (str(nano), "bfloat16", 1234)
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_bytes())
    settings = manifest["settings"]
    assert settings["max_length"] == 96
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_nano_add.jsonl").read_bytes().splitlines()]
    cut = [int(row["resps"][0][0].split()[0]) % 2 for row in rows]
    assert 0 < sum(cut) < len(cut)
    assert manifest["tasks"]["nano_add"]["truncated"] == sum(cut)
    assert settings["model_args"] == {name: BIG[name] for name in sorted(BIG) if name != "max_model_len"}


@pytest.mark.usefixtures("vllm")
def test_vllm_says_what_it_does_not_take(nano: Path, tasks: Path, tmp_path: Path) -> None:
    """An argument that it has not, and one that it cannot work with; once it is right, the folder is still good."""
    request = Request(model=str(nano), tasks=("nano_add",), include=(tasks,), backend="vllm")
    with pytest.raises(UsageError, match="unexpected keyword argument 'tensor_paralel_size'"):
        run(replace(request, model_args={"tensor_paralel_size": 8}), tmp_path / "run")
    with pytest.raises(HarnessFault, match=r"vLLM cannot load it.*No available memory"):
        run(replace(request, model_args={"gpu_memory_utilization": 0.01}), tmp_path / "run")
    run(replace(request, model_args={"gpu_memory_utilization": 0.9}), tmp_path / "run")


@pytest.mark.usefixtures("vllm")
def test_answers_of_vllm_depend_on_its_arguments(nano: Path, tasks: Path, tmp_path: Path) -> None:
    """Another tensor parallelism adds up in another order: no part of one run. The same length by two names is."""
    request = Request(model=str(nano), tasks=("nano_add",), include=(tasks,), backend="vllm")
    run(replace(request, model_args=BIG), tmp_path / "run")
    same = {name: value for name, value in BIG.items() if name != "max_model_len"}
    run(replace(request, model_args=same, max_length=96), tmp_path / "run")
    with pytest.raises(DestinationStale):
        run(replace(request, model_args=same | {"tensor_parallel_size": 4}, max_length=96), tmp_path / "run")


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("task", "room"), [("nano_add", 24), ("nano_choice", 6)])
def test_no_prompt_for_vllm_is_cut(nano: Path, tasks: Path, tmp_path: Path, task: str, room: int) -> None:
    """lm-eval's class would drop its beginning and go on, whether answers are written or scored."""
    request = Request(model=str(nano), tasks=(task,), include=(tasks,), backend="vllm", max_length=room)
    with pytest.raises(HarnessFault, match="a prompt is too long"):
        run(request, tmp_path / "run")


def asking(backend: str, **given: Any) -> Request:
    """Return a request for an engine with arguments."""
    url = "http://localhost:1/v1" if backend == "api" else None
    request: Any = {"backend": backend, "base_url": url, "model_args": given}
    return Request(model="m", tasks=("t",), **request)


@pytest.mark.parametrize(
    ("backend", "given", "said"),
    [
        ("k2quant", {"attn_implementation": "sdpa"}, "takes none"),
        ("vllm", {"pretrained": "x"}, "argument MODEL"),
        ("vllm", {"dtype": "auto"}, "`dtype=`"),
        ("vllm", {"seed": 1}, "`seed=`"),
        ("vllm", {"trust_remote_code": True}, "`trust_remote_code=True`"),
        ("vllm", {"max_length": 9}, "`max_length=`"),
        ("vllm", {"max_model_len": "9"}, "number of tokens"),
        ("vllm", {"max_model_len": True}, "number of tokens"),
        ("vllm", {"max_gen_toks": 9}, "`max_new_tokens=`"),
        ("vllm", {"device": "cuda"}, "CUDA_VISIBLE_DEVICES"),
        ("vllm", {"hf_token": "hf_secret"}, "HF_TOKEN"),
        ("vllm", {"lora_local_path": "x"}, "k2quant merge"),
        ("vllm", {"think_end_token": "</think>"}, "`think_end=`"),
        ("vllm", {"tensor parallel": 1}, "a name, and a value"),
        ("vllm", {"hf_overrides": object()}, "a name, and a value"),
        ("vllm", {"gpu_memory_utilization": float("nan")}, "a name, and a value"),
        ("hf", {"device_map": "auto"}, "`device=auto`"),
        ("hf", {"attention_implementation": "sdpa"}, "did you mean attn_implementation?"),
        ("hf", {"tensor_parallel_size": 8}, "expected attn_implementation, "),
        ("api", {"concurency": 8}, "did you mean concurrency?"),
        ("api", {"max_model_len": 8}, "expected concurrency, timeout, retries"),
        ("api", {"num_concurrent": 8}, "concurrency"),
        ("api", {"api_key": "sk-secret"}, "OPENAI_API_KEY"),
        ("api", {"concurrency": 0}, "1 to 4096"),
        ("api", {"concurrency": True}, "1 to 4096"),
        ("api", {"concurrency": "8"}, "1 to 4096"),
        ("api", {"timeout": 0}, "seconds above 0"),
        ("api", {"timeout": float("nan")}, "a name, and a value"),
        ("api", {"retries": -1}, "0 to 1000"),
        ("api", {"retries": 2.5}, "0 to 1000"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(backend: str, given: dict[str, Any], said: str) -> None:
    """Before anything is read: by name, with what says it instead; a secret that stands there is not repeated."""
    with pytest.raises(UsageError) as caught:
        check(asking(backend, **given))
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "given"),
    [
        ("vllm", BIG),
        ("hf", {"attn_implementation": "eager", "max_memory": {"0": "70GiB"}}),
        ("api", {"concurrency": 256, "timeout": 0.5, "retries": 0}),
        ("k2quant", {}),
    ],
)
def test_arguments_that_make_sense(backend: str, given: dict[str, Any]) -> None:
    """What engines have themselves is taken as it is."""
    check(asking(backend, **given))


def test_a_length_is_said_once() -> None:
    """By `max_model_len` or by `max_length`."""
    with pytest.raises(UsageError, match="give one of them"):
        check(replace(asking("vllm", max_model_len=9), max_length=9))


def test_transformers_is_given_its_arguments(nano: Path, tasks: Path, tmp_path: Path) -> None:
    """It refuses an attention that it has not; one that it has is part of the run's identity."""
    request = Request(model=str(nano), tasks=("nano_add",), include=(tasks,), backend="hf", limit=1, max_new_tokens=2)
    with pytest.raises(Exception, match="no_such_attention"):
        run(replace(request, model_args={"attn_implementation": "no_such_attention"}), tmp_path / "run")
    run(replace(request, model_args={"attn_implementation": "eager"}), tmp_path / "other")
    settings = json.loads((tmp_path / "other" / MANIFEST).read_bytes())["settings"]
    assert settings["model_args"] == {"attn_implementation": "eager"}
