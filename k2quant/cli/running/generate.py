"""`k2quant generate`."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.screen import progress, remark
from k2quant.errors import MalformedFile, UsageError

_STDIN = "-"
_LIMIT = 2**24  # bytes of a prompt; the 256k tokens that K2 has room for are some 1 MB of text


@click.command(name="generate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue, as it is, or with --chat to answer; - reads it from stdin.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Read the text from a file in UTF-8, or from stdin (-). One line break at its end is left out.",
)
@click.option("--chat", is_flag=True, help="Answer the text as a user's turn, by the checkpoint's chat template.")
@click.option("--system", metavar="TEXT", help="What the system says before it; means --chat.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Where to stop.")
@options.device()
@options.dtype()
@options.backend()
@options.follow_links()
@options.trust_remote_code()
@click.option("--json", "as_json", is_flag=True, help="Print text and times as JSON, all at the end.")
def command(
    path: Path,
    *,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    device: str,
    dtype: str,
    backend: str,
    follow_links: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Continue a prompt with the checkpoint PATH, in whatever format it is: the smallest proof that it is alive.

    Greedy decoding with the KV cache; the text goes to stdout as it comes, times to stderr. In a chat, what a thinking
    model writes before </think> is dimmed on a terminal, and is `reasoning` beside `answer` in the JSON.

    \b
    Example:
        k2quant generate K2-INT4 --prompt "The capital of France is" --max-new-tokens 16
        k2quant generate K2-Thinking --chat --prompt "What is 17 + 25?" --max-new-tokens 2000
        k2quant generate K2-INT4 --prompt-file question.txt
    """
    from k2quant.checkpoint.beside import check_tokenizer

    text = _prompt(prompt, prompt_file)
    options.check_early(path, follow_links=follow_links)
    check_tokenizer(path)
    from k2quant.model import load_model  # only now: it loads torch and transformers
    from k2quant.model.generation import Telling, chat_prompt, generate, load_tokenizer, silence

    silence()
    gc.enable()  # decoding makes tensors for as long as it runs
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, follow_links=follow_links)
    turn = chat_prompt(tokenizer, text, system=system) if chat or system is not None else None
    with progress("loading") as show:
        model = load_model(
            path,
            device=device,
            dtype=dtype,
            backend=backend,  # type: ignore[arg-type]  # click checked it
            follow_links=follow_links,
            progress=show,
        )
    tell = Telling(_show, thinks=turn.thinks) if turn else None
    show_piece = tell or (lambda piece: _show(piece, reasoning=False))
    done = generate(model, tokenizer, turn or text, max_new_tokens=max_new_tokens, show=None if as_json else show_piece)
    if as_json:
        found = done._asdict()
        if turn is None:
            found = {name: value for name, value in found.items() if name not in {"reasoning", "answer"}}
        click.echo(json.dumps({**found, "tokens_per_second": done.rate}))
        return
    if tell:
        tell.end()
    click.echo()
    if turn and not done.finished:
        remark(f"cut at {done.new_tokens} tokens; `max_new_tokens=` gives the answer more")
    remark(
        f"{done.prompt_tokens} tokens of prompt in {done.prompt_seconds:.2f} s, "
        f"{done.new_tokens} new, {done.rate:.1f} tokens/s"
    )


def _show(piece: str, reasoning: bool) -> None:  # noqa: FBT001  as `Telling` calls it
    """Print a piece as it comes, reasoning dimmed where a terminal shows that."""
    click.echo(click.style(piece, dim=True) if reasoning and piece else piece, nl=False)


def _prompt(given: str | None, file: Path | None) -> str:
    """Return the text to continue.

    Raises:
        UsageError: none is named, or two are, or it is empty or no text.
        MalformedFile: the file is none, or too large.
        OSError: it cannot be read.
    """
    from k2quant.ground.units import check_prompt

    if (given is None) == (file is None):
        raise UsageError("name one text to continue: with --prompt, --prompt-file, or --prompt - to read it from stdin")
    text = given if given is not None and given != _STDIN else _read(file)
    check_prompt(text)
    return text


def _read(file: Path | None) -> str:
    """Return what stands in a file, or comes from stdin where none is named, less one line break at the end.

    An editor and `echo` put it there, and a model that finds it begins another line.
    """
    from k2quant.checkpoint.files.paths import read_limited

    if file is None or str(file) == _STDIN:
        name, data = "stdin", sys.stdin.buffer.read(_LIMIT + 1)
        if len(data) > _LIMIT:
            raise MalformedFile("too large", file=name, expected=f"at most {_LIMIT:,} bytes")
    else:
        name, data = str(file), read_limited(file, _LIMIT)
    try:
        text = data.decode("utf-8-sig")  # what an editor put before the text is no part of it either
    except UnicodeDecodeError as error:
        raise MalformedFile("no text", file=name, expected="UTF-8", found=f"a wrong byte at {error.start:,}") from error
    return text.removesuffix("\n").removesuffix("\r")
