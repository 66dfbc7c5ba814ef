"""`qat plan --show`: the first examples with what is learnt, for people to check; and what a plan says of them all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from k2quant.cli import main
from places import ROOT

HEAD = "<|im_assistant|>assistant<|im_middle|>"
DEFAULT = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
ASKED = f"{DEFAULT}<|im_user|>user<|im_middle|>q<|im_end|>{HEAD}"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
USER = {"role": "user", "content": "q"}
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [USER, {"role": "assistant", "content": "a\nb", "reasoning": "r"}]},
    {"messages": [USER, {"role": "assistant", "tool_calls": CALLS, "reasoning": "r"}], "tools": [TOOL]},
    {"messages": [USER, {"role": "assistant", "content": "n", "weight": 0}, {"role": "assistant", "content": "e"}]},
    {"text": "long " * 300},
    {"prompt": "p\x1b[31m", "completion": "c" * 700},
)


@pytest.fixture
def plan(thinker: Path, tmp_path: Path) -> Callable[..., Result]:
    """Return what plans a job on rows, with options."""

    def run(
        *options: str,
        rows: tuple[dict[str, Any], ...] = ROWS,
        environment: dict[str, str | None] | None = None,
        **data: Any,
    ) -> Result:
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = {
            "model": str(thinker / "model"),
            "output": str(tmp_path / "run"),
            "data": {"path": str(tmp_path / "data.jsonl"), "length": 512, "held_out": 0, **data},
            "training": {"steps": 2, "batch": 1},
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        arguments = ["qat", "plan", str(tmp_path / "job.yaml"), "--no-measure", *options]
        return CliRunner().invoke(
            main, arguments, env={"NO_COLOR": None, "FORCE_COLOR": None, **(environment or {})}, color=True
        )

    return run


def test_what_is_learnt_stands_between_marks(plan: Callable[..., Result]) -> None:
    """Where there is no colour; special tokens are seen, line breaks too, and codes for terminals do no harm."""
    shown = plan("--show", "5", reasoning="split")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0] == "The first 5 examples; what is learnt stands between « and », ↵ is a line break."
    assert f"{ASKED}«<think>r</think>a↵" in lines
    assert "b<|im_end|>»" in lines
    call = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert any(line.endswith(f"{HEAD}«<think>r</think>{call}<|tool_calls_section_end|><|im_end|>»") for line in lines)
    assert any(line.endswith(f"{HEAD}<think></think>n<|im_end|>{HEAD}<think></think>«e<|im_end|>»") for line in lines)
    assert any(line.startswith("p\\x1b[31m«ccc") for line in lines)
    assert "\x1b" not in shown.stdout
    assert plan("--show", "1", reasoning="split").stdout.startswith("The first example; what is learnt")


def test_long_pieces_are_shortened_and_a_row_has_an_end(plan: Callable[..., Result]) -> None:
    """Of a long piece its two ends are shown; what a row cuts off is set apart, and a text goes on in the next row."""
    lines = plan("--show", "9", reasoning="split").stdout.splitlines()
    assert any(re.search(r"long.*\[…\d+ characters…\].*long", line) for line in lines)
    assert any(line.startswith("4. ") and "longer than a row, goes on in the next" in line for line in lines)
    assert any(line.startswith("5. ") and "cut off" in line for line in lines)
    end = lines.index("--- a row of 512 tokens ends here; what follows is cut off ---")
    assert lines[end - 1].endswith("c»")
    assert "«" not in lines[end + 1]


def test_colour(plan: Callable[..., Result]) -> None:
    """Green where colours are wanted, and then no marks; NO_COLOR has the last word."""
    green = plan("--show", "1", reasoning="split", environment={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[32m<think>r</think>a↵\x1b[0m\n\x1b[32mb<|im_end|>\x1b[0m\n" in green
    assert "«" not in green
    plain = plan("--show", "1", reasoning="split", environment={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout
    assert "\x1b" not in plain
    assert "«<think>r</think>a↵" in plain


def test_marks_that_the_data_hold_are_not_used(plan: Callable[..., Result]) -> None:
    """Quotes of French would be taken for them."""
    shown = plan("--show", "1", rows=({"prompt": "«p»", "completion": "c"}, {"text": "abc"}))
    assert "«p»⟦c" in shown.stdout


def test_as_json(plan: Callable[..., Result]) -> None:
    """Pieces whole, with what is learnt and what is cut, and their tokens add up; a plan's counts beside them."""
    facts = json.loads(plan("--show", "5", "--json", reasoning="split").stdout)
    first, *_, last = facts["examples"]
    assert "".join(piece["text"] for piece in first["pieces"] if piece["learnt"]) == "<think>r</think>a\nb<|im_end|>"
    assert first["tokens"] == sum(piece["tokens"] for piece in first["pieces"])
    assert first["where"].endswith("data.jsonl, line 1")
    kept = sum(piece["tokens"] for piece in last["pieces"] if not piece["cut"])
    assert (kept, last["tokens"] - kept) == (513, last["cut"])
    census = facts["census"]
    assert {name: census[name] for name in ("rows", "chats", "tools", "tool_calls", "reasoning", "losing")} == {
        "rows": 5,
        "chats": 3,
        "tools": 1,
        "tool_calls": 1,
        "reasoning": 2,
        "losing": 1,
    }
    assert (census["weightless"], census["renamed"], census["unthinking"], census["left_out"]) == (1, 1, 1, 0)
    assert "examples" not in json.loads(plan("--json", reasoning="split").stdout)


def test_a_plan_counts_conversations(plan: Callable[..., Result]) -> None:
    """As text too, and with notes of what people should know."""
    said = " ".join(plan(reasoning="skip").stdout.split())
    assert "conversations 3: 1 with tools, 1 with calls, 2 with reasoning (in 1 the chat template drops some)" in said
    assert "1 message of weight 0" in said
    assert "note left out, since no turn of theirs is to be learnt: 1 row" in said
    assert "conversations" not in plan(rows=ROWS[3:]).stdout


def test_lost_reasoning_is_refused_and_seen_before(plan: Callable[..., Result]) -> None:
    """A plan says how many rows lose theirs, and where the first is, behind the examples that show it."""
    refused = plan("--show", "1")
    assert refused.exit_code == 1
    assert f"{ASKED}<think></think>«a↵" in refused.stdout
    assert "line 1, message 2, found 1 of 5 rows; say in the job what then" in refused.stderr


def test_the_guides_example(plan: Callable[..., Result]) -> None:
    """What docs/qat.md shows of its row is what is shown, but for the lines that it breaks by hand."""
    guide = (ROOT / "docs" / "qat.md").read_text()
    [row] = re.findall(r"^```json\n(.*?)^```", guide[guide.index("## Chat, tools") :], re.DOTALL | re.MULTILINE)[:1]
    [told] = re.findall(r"^```text\n(.*?)^```", guide[guide.index("## Chat, tools") :], re.DOTALL | re.MULTILINE)[:1]
    shown = plan("--show", "1", rows=(json.loads(row),), reasoning="split", length=1024).stdout
    expected = told.replace("\n", "").replace("↵", "↵\n")
    assert expected in shown
