"""`k2quant generate`."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.screen import progress, remark


@click.command(name="generate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue, as it is.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Where to stop.")
@options.device()
@options.dtype()
@options.backend()
@options.follow_links()
@options.trust_remote_code()
@click.option("--json", "as_json", is_flag=True, help="Print text and times as JSON, all at the end.")
def command(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    device: str,
    dtype: str,
    backend: str,
    *,
    follow_links: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Continue a prompt with the checkpoint PATH, in whatever format it is: the smallest proof that it is alive.

    Greedy decoding with the KV cache; the text goes to stdout as it comes, times to stderr.

    \b
    Example:
        k2quant generate K2-INT4 --prompt "The capital of France is" --max-new-tokens 16
    """
    from k2quant.model import load_model
    from k2quant.model.generation import generate, load_tokenizer, silence

    silence()
    gc.enable()  # decoding makes tensors for as long as it runs
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, follow_links=follow_links)
    with progress("loading") as show:
        model = load_model(
            path,
            device=device,
            dtype=dtype,
            backend=backend,  # type: ignore[arg-type]  # click checked it
            follow_links=follow_links,
            progress=show,
        )
    done = generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        show=None if as_json else lambda text: click.echo(text, nl=False),
    )
    if as_json:
        click.echo(json.dumps({**done._asdict(), "tokens_per_second": done.rate}))
        return
    click.echo()
    remark(
        f"{done.prompt_tokens} tokens of prompt in {done.prompt_seconds:.2f} s, "
        f"{done.new_tokens} new, {done.rate:.1f} a second"
    )
