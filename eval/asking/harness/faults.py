"""What goes wrong in or around lm-eval, in words of ours."""

from __future__ import annotations

from typing import Any

from k2quant.errors import HarnessFault


def check_room(requests: list[Any], room: int) -> None:
    """Refuse texts to score that lm-eval would cut the beginning off.

    Raises:
        HarnessFault: one has more tokens than that.
    """
    longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
    if longest > room + 1:  # the last token is predicted, never read
        raise no_room(longest, room)


def no_room(found: int, room: int) -> HarnessFault:
    """Return what to raise for a prompt of more tokens than there is room for."""
    remedy = "fewer `shots=` or `max_new_tokens=`, or a larger `max_length=` if the model can take it"
    return HarnessFault("a prompt is too long", expected=f"at most {room} tokens", found=found, remedy=remedy)
