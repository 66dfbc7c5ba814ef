"""A server that answers requests with tools: many under way, each answer handed on as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from k2quant.errors import HarnessFault
from k2quant.eval.asking.endpoint.headers import hidden
from k2quant.eval.asking.endpoint.server import client_of
from k2quant.eval.asking.request import Request
from k2quant.eval.tools.calling import Answer, of_chat
from k2quant.eval.tools.requests import Asked

_SHOWN = 8  # requests in a message


def ask_server(
    request: Request,
    asked: Sequence[tuple[Asked, int]],
    each: Callable[[int, Answer], None],
    remark: Callable[[str], None],
) -> None:
    """Put requests to a server and hand on the answers in the order in which they come.

    Args:
        request: who is asked.
        asked: requests, each with the number of the repeat.
        each: called with the place of a request and its answer.
        remark: called with why the server keeps everybody waiting.

    Raises:
        UsageError: a variable of the environment that holds a header is not set, or holds what no header can.
        HarnessFault: the server gives no usable answer, or refuses a request.
    """
    client = client_of(request, remark)
    under_way: dict[int, str] = {}

    def bodies() -> Iterator[dict[str, Any]]:
        for place, (one, repeat) in enumerate(asked):
            under_way[place] = one.place
            yield _body(request.model, one, repeat)

    def came(place: int, body: dict[str, Any]) -> None:
        try:
            answer = of_chat(body)
        except ValueError as error:
            said = hidden(str(body), client.headers)  # before it is cut: half a key is one, too
            found = f"{str(error).partition(':')[0]}: {said}"[:200]
            raise HarnessFault("no answer of a chat", file=client.url, found=found) from error
        each(place, answer)
        under_way.pop(place)

    try:
        client.answers(bodies(), came)
    except HarnessFault as fault:
        among = ", ".join(list(under_way.values())[:_SHOWN])
        said = [] if fault.found is None else [str(fault.found)]
        found = "; ".join([*said, f"under way were {among}"])
        raise HarnessFault(fault.message, file=fault.file, found=found, remedy=fault.remedy) from fault


def _body(model: str, asked: Asked, repeat: int) -> dict[str, Any]:
    """Return what is posted; each repeat has a seed of its own, for a server that draws the same for the same seed."""
    return {"model": model, **asked.body, **asked.sampling, "seed": asked.sampling["seed"] + repeat, "stream": False}
