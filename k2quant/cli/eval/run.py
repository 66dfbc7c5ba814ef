"""`k2quant eval run`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from k2quant.cli.eval.arguments import header_option, headers, model_args, model_args_option
from k2quant.cli.parts import options
from k2quant.cli.parts.screen import progress, questions, remark, warn
from k2quant.cli.parts.terminal.tables import Column, paragraph, table

Progress = Callable[[int, int], None]


def _presets(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's signature
    if not value or ctx.resilient_parsing:
        return
    from k2quant.eval.asking.presets import PRESETS

    for number, (preset, benchmarks) in enumerate(PRESETS.items()):
        click.echo(("\n" if number else "") + preset)
        for each in benchmarks:
            said = f"{each.name}: {each.here}; in the report: {each.report}"
            click.echo(paragraph(said, indent=f"  {each.task:<26} ", hang=" " * 29))
    ctx.exit()


@click.command(name="run")
@click.argument("model")
@click.option("--tasks", required=True, help="Tasks, groups or tags of lm-eval, or presets of ours, with commas.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="RUN folder.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task.  [default: all]")
@click.option("--shots", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's own]")
@click.option(
    "--backend",
    type=options.words(["k2quant", "hf", "vllm", "api"]),
    default="k2quant",
    show_default=True,
    help="Packed weights on our kernels, transformers, vLLM, or an OpenAI-style server.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Texts at once; of a server, requests under way, unless --model-args concurrency says how many.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: the task's own, or 1024]")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of prompt and answer.  [default: the model's]")
@click.option(
    "--think-end",
    metavar="TEXT",
    help="What ends the model's reasoning; '' for none.  [default: </think> where the chat template has it]",
)
@click.option("--temperature", type=click.FloatRange(min=0), help="Draw answers.  [default: the task's own, greedy]")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Draw from the likeliest tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all draws.")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Answers to each question; more than one need --temperature.",
)
@options.device(others=None)
@options.dtype()
@click.option(
    "--include",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with task YAML of your own; repeatable. Task YAML can run code: take none that you do not trust.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="TASK=PATH",
    help="Local JSON or JSON Lines for a task or group instead of the hub's data; repeatable.",
)
@click.option("--base-url", help="Of a server, such as http://localhost:8000/v1; its key is in OPENAI_API_KEY.")
@click.option("--chat", is_flag=True, help="Ask the server by chat messages.")
@click.option(
    "--served-from",
    type=click.Path(path_type=Path),
    help="The checkpoint that the server serves, so that the run knows its hash.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder of a served model's tokenizer, to score text.  [default: that of --served-from]",
)
@header_option()
@model_args_option(
    "What the engine takes besides: tensor_parallel_size=8 for vllm; concurrency, timeout (seconds) and retries for "
    "api; repeatable."
)
@click.option("--chat-template", is_flag=True, help="Put prompts through the tokenizer's chat template.")
@options.follow_links()
@click.option("--reread", is_flag=True, help="Hash every byte of the model, also if it was hashed before.")
@options.trust_remote_code(more=" With hf and vllm the model's code, too.")
@click.option(
    "--confirm-unsafe-code", "unsafe_code", is_flag=True, help="Let tasks run the code that the model writes."
)
@options.soft_lock()
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option(
    "--list-presets", is_flag=True, is_eager=True, expose_value=False, callback=_presets, help="What presets hold."
)
def command(output: Path, *, tasks: str, data: tuple[str, ...], soft_lock: bool, as_json: bool, **given: Any) -> None:
    """Ask MODEL, a checkpoint in any format, the questions of lm-eval's benchmarks and keep every answer in RUN.

    Needs the extra `eval`. With --backend api, MODEL is what the server calls it. The same command
    resumes a run that was stopped, with the same numbers to the last bit.

    Benchmarks on local files, without a network: --data names, for a task, a file with its questions, or a folder with
    one file for each split (`test.jsonl`, `gsm8k_test.jsonl`), and for a group a folder with a file for each part
    (`date_understanding.json`). The rest is lm-eval's own definition; shots come from the split that it names.

    \b
    Example:
        k2quant eval run K2-INT4 --tasks k2-quick -o runs/int4
        k2quant eval run K2-INT4 --tasks gsm8k --data gsm8k=data/ -o runs/gsm8k
        k2quant eval run kimi-k2 --backend api --base-url http://localhost:8000/v1 --tasks gsm8k -o runs/served
        k2quant eval run K2-Thinking --chat-template --temperature 1 --repeats 4 --max-new-tokens 32768 ...
    """
    import gc
    import json

    gc.enable()  # hours of tensors
    from k2quant.eval import run
    from k2quant.eval.asking.request import Request

    given |= {"model_args": model_args(given["model_args"]), "headers": headers(given["headers"])}
    names = tuple(filter(None, map(str.strip, tasks.split(","))))
    request = Request(tasks=names, data=_data(data), **given)
    try:
        with bars(lambda: questions("answers")) as (reading, answered):
            manifest = run(request, output, soft_lock=soft_lock, reading=reading, progress=answered, remark=remark)
    except KeyboardInterrupt:
        remark(f"{output}: the same command resumes")
        raise
    found = json.loads(manifest.read_bytes())
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _show(found, output)


@contextlib.contextmanager
def bars(
    after: Callable[[], AbstractContextManager[Progress | None]],
) -> Iterator[tuple[Progress | None, Progress | None]]:
    """Show one bar while models are read, then another while they work.

    Args:
        after: gives the second bar, which stands from its first step on.
    """
    with contextlib.ExitStack() as stack:
        reading = stack.enter_context(progress("reading"))
        shown: list[Progress | None] = []

        def worked(done: int, total: int) -> None:
            if not shown:
                stack.close()
                shown.append(stack.enter_context(after()))
            if shown[0]:
                shown[0](done, total)

        yield reading, worked if reading else None


def _data(pairs: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for pair in pairs:
        task, equals, path = pair.partition("=")
        if not (task and equals and path):
            raise click.UsageError(f"--data: expected TASK=PATH, found {pair!r}")
        found[task] = Path(path)
    return found


_ROOM = "; see --max-new-tokens"


def _show(manifest: dict[str, Any], folder: Path) -> None:
    from k2quant.ground.units import duration

    rows = []
    for name, task in manifest["tasks"].items():
        rows += _rows(name, task["metrics"], str(task["documents"]))
    for name, metrics in manifest["groups"].items():
        rows += _rows(name, metrics, "")
    click.echo(table(_COLUMNS, rows))
    for name, task in manifest["tasks"].items():
        lost = task.get("cut_in_thought", 0)
        if task["truncated"] and task["truncated"] != lost:  # else they are the same, and the next line says more
            asked = task["documents"] * task.get("repeats", 1)
            warn(f"{name}: {task['truncated']:,} of {asked:,} answers ended at the limit on new tokens{_ROOM}")
        if lost:
            _warn_of_thoughts(name, task)
    took, quoted = duration(manifest["seconds"]), shlex.quote(str(folder))
    remark(f"{folder}: {took}; compare with  k2quant eval gate BASELINE {quoted}")


def _warn_of_thoughts(name: str, task: dict[str, Any]) -> None:
    lost, asked = task["cut_in_thought"], task["documents"] * task.get("repeats", 1)
    all_of_them = "; does this model reason at all? see --think-end" if lost == asked else _ROOM
    warn(f"{name}: {lost:,} of {asked:,} answers never left their reasoning and count as wrong{all_of_them}")


_COLUMNS = (
    Column(head="task", left=True),
    Column(head="metric", left=True),
    *(Column(head=head) for head in ("n", "value", "stderr")),
)


def _rows(name: str, metrics: dict[str, Any], count: str) -> list[tuple[str, str, str, str, str]]:
    return [
        (name, metric, count, _number(found["value"]), _number(found["stderr"])) for metric, found in metrics.items()
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
