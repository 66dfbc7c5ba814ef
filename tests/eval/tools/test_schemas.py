"""Arguments against schemas: what is right and wrong, and that no schema of a file can hang, fetch or break a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.errors import MalformedFile
from k2quant.eval.tools import checking
from k2quant.eval.tools.requests import builtin, check_schemas, read_requests
from k2quant.eval.tools.schemas import Schemas

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}

LAUGHS = {f"l{level}": {"anyOf": [{"$ref": f"#/$defs/l{level + 1}"}] * 2} for level in range(30)}
"""Thirty lines that mean a thousand million checks."""


@pytest.fixture(scope="module")
def schemas() -> Iterator[Schemas]:
    """One process for all checks, with little patience."""
    with Schemas(patience=3.0) as process:
        yield process


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ([], "no JSON object"),
        ({"type": "any"}, "no JSON schema"),
        ({"properties": {"a": {"pattern": "("}}}, "no JSON schema"),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:9/a.json"}}}, "leads out of it: http://127.0.0.1:9/a.json"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "leads out of it"),
        ({"anyOf": [{"$dynamicRef": "other.json#a"}]}, "leads out of it"),
        ({"$schema": "http://example.com/mine"}, "a draft that is not known"),
        ({"$schema": ["http://json-schema.org/draft-04/schema#"]}, "a draft that is not known"),
        ({"$schema": {}}, "a draft that is not known"),
        ({"$schema": 7}, "a draft that is not known"),
        ({"$ref": "#"}, "in a circle"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "in a circle"),
        ({"properties": {"a": {"items": {"$ref": "#/$defs/b"}}}}, "$ref leads nowhere: #/$defs/b"),
        ({"$ref": "#nowhere"}, "the schema breaks"),
        ({"$ref": "#/$defs/l0", "$defs": {**LAUGHS, "l30": {"type": "string"}}}, "cannot be checked within 3 s"),
        ({"description": "a" * checking.LARGEST}, "more than 262,144 bytes"),
        (json.loads('{"not":' * 70 + "{}" + "}" * 70), "more than 64 levels deep"),
    ],
)
def test_a_schema_that_is_of_no_use(schema: Any, why: str, schemas: Schemas) -> None:
    """It is refused with its reason; nothing is fetched, and what never ends is ended."""
    found = schemas.unusable(schema)
    assert found is not None
    assert why in found
    assert schemas.unusable(PLACE) is None  # the process lives on, or a new one does


@pytest.mark.parametrize(
    ("schema", "arguments", "why"),
    [
        (PLACE, '{"place": "Oslo"}', None),
        (PLACE, "{}", "'place' is a required property at $"),
        (PLACE, '{"place": 3}', "3 is not of type 'string' at $.place"),
        (PLACE, "", "no JSON"),
        (PLACE, '{"place": "Oslo"', "no JSON"),
        (PLACE, '{"place": NaN}', "NaN is not JSON"),
        (PLACE, '"Oslo"', "no JSON object but str"),
        (PLACE, "[" * 100_000, "no JSON"),
        ({"properties": {"a": {"multipleOf": 0.1}}}, '{"a": 1e400}', "a number beyond what computers reckon with"),
        ({"properties": {"a": {"multipleOf": 0.1}}}, f'{{"a": 1{"0" * 400}}}', "a number beyond"),
        (PLACE, '{"place":' * 99 + '"a"' + "}" * 99, "more than 64 levels deep"),
        ({"$defs": {"a": PLACE}, "$ref": "#/$defs/a"}, "{}", "'place' is a required property"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minProperties": 1}, "{}", "at $"),
        ({"properties": {"a": {"pattern": "^(a+)+$"}}}, json.dumps({"a": "a" * 60 + "!"}), "cannot be checked within"),
        ({"properties": {"a": {"$ref": "#nowhere"}}}, '{"a": 1}', "cannot be checked: the schema breaks"),
        ({"properties": {"a": {"$ref": "#/$defs/b~1c"}}, "$defs": {"b/c": {"type": "null"}}}, '{"a": null}', None),
        ({"properties": {"day": {"type": "string", "format": "date"}}}, '{"day": "soon"}', None),
    ],
)
def test_arguments(schema: dict[str, Any], arguments: str, why: str | None, schemas: Schemas) -> None:
    """Right, or what is wrong and where; a schema at fault says so, and a pattern that never ends is ended."""
    begun = time.monotonic()
    found = schemas.fault(schema, arguments)
    assert found is why is None or (found is not None and why is not None and why in found)
    assert time.monotonic() - begun < 60


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.text() | VALUES.map(json.dumps))
@settings(max_examples=200, deadline=None)
def test_whatever_a_model_writes_is_judged(arguments: str) -> None:
    """No text of arguments raises: it is right or has a fault."""
    found = checking.fault(PLACE, arguments)
    try:
        value = json.loads(arguments)
    except ValueError:
        value = None
    right = isinstance(value, dict) and isinstance(value.get("place"), str)
    assert (found is None) == right


def test_a_file_names_its_bad_schema(tmp_path: Path, schemas: Schemas) -> None:
    """By line and function, before anything is asked."""
    tools = [{"type": "function", "function": {"name": "fly", "parameters": {"$ref": "https://example.com/fly"}}}]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n" + json.dumps({"messages": [{"role": "user", "content": "Fly!"}], "tools": tools}) + "\n")
    with pytest.raises(MalformedFile, match=r"line 2: the schema of 'fly' is of no use, found \$ref leads out of it"):
        check_schemas(read_requests(str(path)), schemas.unusable)


def test_the_set_that_ships(schemas: Schemas) -> None:
    """Its schemas are of use, each request says what it expects, none stands twice, and all kinds are there."""
    requests = builtin()
    check_schemas(requests, schemas.unusable)
    assert len({one.digest for one in requests}) == len(requests) >= 60
    assert all(one.expects is not None for one in requests)
    due = sum(bool(one.expects) for one in requests)
    assert 0.3 < due / len(requests) < 0.8
    assert any(len(one.expects or ()) > 1 for one in requests)
    assert sum(any(message["role"] == "tool" for message in one.body["messages"]) for one in requests) >= 10
    assert sum("天" in one.shown or "的" in one.shown for one in requests) >= 5
    for one in requests:  # the calls in its conversations are right themselves
        for message in one.body["messages"]:
            for made in message.get("tool_calls", []):
                function = made["function"]
                assert schemas.fault(one.tools[function["name"]], function["arguments"]) is None
