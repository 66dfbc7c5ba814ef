"""`k2quant eval tools`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from k2quant.cli.eval.arguments import header_option, headers, model_args, model_args_option
from k2quant.cli.eval.run import bars
from k2quant.cli.parts import options
from k2quant.cli.parts.screen import questions, remark, warn
from k2quant.cli.parts.terminal.tables import Column, paragraph, table


def _listed(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's signature
    if not value or ctx.resilient_parsing:
        return
    from k2quant.eval.tools.requests import BUILTIN, builtin

    requests = builtin()
    calls = sum(bool(one.expects) for one in requests)
    tools = {name for one in requests for name in one.tools}
    said = (
        f"{len(requests)} requests with {len(tools)} tools, a call is due in {calls}; written for k2quant, Apache-2.0"
    )
    click.echo(f"{BUILTIN}: {said}")
    for one in requests:
        due = ", ".join(one.expects or ()) or "no call"
        click.echo(paragraph(one.shown, indent=f"  {due:<16} ", hang=" " * 19))
    ctx.exit()


@click.command(name="tools")
@click.argument("model")
@click.option(
    "--requests", metavar="FILE", help="Requests in JSON Lines, or k2-tools, which ships.  [default: k2-tools]"
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="A run of this command, or results of K2-Vendor-Verifier, whose calls are right.  [default: what the "
    "requests expect]",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="RUN folder.")
@click.option(
    "--backend",
    type=options.words(["k2quant", "api", "answers"]),
    default="k2quant",
    show_default=True,
    help="Packed weights on our kernels, an OpenAI-style server, or answers that are there, in the run or file MODEL.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Answers to each request; more than one need --temperature, or requests with their own.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Requests.  [default: all]")
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="Draw answers.  [default: the request's own, or greedy]"
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Draw from the likeliest tokens.  [default: the request's own]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of all draws.  [default: the request's own, or 0]")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: the request's own, or 4096]"
)
@click.option("--base-url", help="Of a server, such as http://localhost:8000/v1; its key is in OPENAI_API_KEY.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Requests under way.")
@click.option(
    "--served-from",
    type=click.Path(path_type=Path),
    help="The checkpoint that answers, so that the run knows its hash.",
)
@header_option()
@model_args_option("What a server takes besides: concurrency, timeout (seconds) and retries; repeatable.")
@options.device(others=None)
@options.dtype()
@options.follow_links()
@options.trust_remote_code()
@options.soft_lock()
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_listed, help="The requests of k2-tools."
)
def command(output: Path, *, soft_lock: bool, as_json: bool, **given: Any) -> None:
    """Put requests with tools to MODEL, check each call by its JSON schema, and keep every answer in RUN.

    Needs the extra `eval`. Two such runs are compared by `k2quant eval gate`: whether a call was made where one is
    due, of the right functions, with valid arguments. The same command resumes a run that was stopped.

    \b
    Example:
        k2quant eval tools K2-Instruct -o runs/tools-base
        k2quant eval tools kimi-k2 --backend api --base-url http://localhost:8000/v1 -o runs/served
        k2quant eval tools vendor.jsonl --backend answers --reference official.jsonl -o runs/vendor
    """
    import json

    from k2quant.eval import run_tools
    from k2quant.eval.tools.settings import ToolsRequest

    given |= {"model_args": model_args(given["model_args"]), "headers": headers(given["headers"])}
    try:
        with bars(lambda: questions("answers")) as (reading, answered):
            manifest = run_tools(
                ToolsRequest(**given), output, soft_lock=soft_lock, reading=reading, progress=answered, remark=remark
            )
    except KeyboardInterrupt:
        remark(f"{output}: the same command resumes")
        raise
    found = json.loads(manifest.read_bytes())
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _show(found, output)


_DOUBTS = {
    "cut": "answers ended at the limit on new tokens; see --max-new-tokens",
    "failed": "requests have no answer and count as wrong",
    "unparsed": "answers have K2's own words for calls in their text: the server did not read them; it needs a parser, "
    "such as vLLM's --tool-call-parser kimi_k2",
    "unchecked": "answers could not be checked, because of a schema, and count as not valid",
    "without_reference": "answers are to requests that the reference did not decide, and count nowhere",
}


def _show(manifest: dict[str, Any], folder: Path) -> None:
    from k2quant.ground.units import duration

    calls = manifest["calls"]
    made, valid = calls["made"], calls["valid"]
    share = f" ({valid / made:.2%})" if made else ""
    click.echo(f"{calls['answers']:,} answers, {made:,} with calls, {valid:,} of them valid by schema{share}")
    click.echo()
    rows = [
        (
            name,
            f"{task['documents']:,}",
            f"{value['value']:.4f}",
            "" if value["stderr"] is None else f"{value['stderr']:.4f}",
        )
        for name, task in manifest["tasks"].items()
        for value in task["metrics"].values()
    ]
    click.echo(table(_COLUMNS, rows))
    for key, said in _DOUBTS.items():
        if calls[key]:
            warn(f"{calls[key]:,} of {calls['answers']:,} {said}")
    took, quoted = duration(manifest["seconds"]), shlex.quote(str(folder))
    remark(f"{folder}: {took}; compare with  k2quant eval gate BASELINE {quoted}")


_COLUMNS = (Column(head="task", left=True), *(Column(head=head) for head in ("n", "right", "stderr")))
