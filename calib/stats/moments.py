"""The moments of one input, and what they must be to be moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.calib.stats.layout import PARTS, inputs
from k2quant.errors import BadValue
from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.manifest import Manifest

_SLACK = 1.005
"""By how much a root of a mean square may exceed the largest value, and a mean that root: sums are rounded, and a
device may round its inputs."""

_TINY = 2.0**-50  # below it squares are lost: float32's least normal number is 2^-126


class Moments(NamedTuple):
    """What was measured of the input of one matrix."""

    mean_square: NDArray[np.float32]
    """`[K]`: the weighted mean of x_j^2 over the tokens; zeros where there are none."""
    tokens: int
    """Tokens that reached the matrix."""
    weight: float
    """Sum of the tokens' weights: p^2 for a routed expert, p being what the router gives it; else 1 for each."""
    largest: float
    """Largest |x_j| of all, unweighted."""
    mean: NDArray[np.float32]
    """`[K]`: the weighted mean of x_j, weighted as its square is."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def check_moments(arrays: Mapping[str, NDArray[Any]], manifest: Manifest, layer: int, *, file: object) -> None:
    """Refuse values that no pass can have measured.

    Args:
        arrays: the tensors of a layer, by name; of the shapes that they must have.
        manifest: of the folder; without a known count of tokens the counts are compared with one another alone.
        layer: of the model.
        file: for messages.

    Raises:
        BadValue: NaN, infinity, something negative, or counts that contradict each other.
    """
    for one in inputs(manifest.model, layer):
        for part in PARTS:
            for name, wrong in _faults(f"{one.name}.{part}", arrays):
                raise _bad(name, file, *wrong)
    for part in PARTS:
        _check_counts(arrays, manifest, layer, part, file)


def _faults(name: str, arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield what is wrong with one input: the tensor, what was expected and what was found."""
    import numpy as np

    squares, mean, weight, tokens, largest = (
        arrays[f"{name}.{kind}"] for kind in ("mean_square", "mean", "weight", "tokens", "largest")
    )
    for kind, values in (("mean_square", squares), ("mean", mean), ("weight", weight), ("largest", largest)):
        if not np.isfinite(values).all():
            yield f"{name}.{kind}", ("finite values", "NaN or infinity")
        elif kind != "mean" and (values < 0).any():
            yield f"{name}.{kind}", ("values from 0", f"{values.min():g}")
    if (tokens < 0).any():
        yield f"{name}.tokens", ("counts", f"{tokens.min()}")
    empty = tokens == 0
    for kind, values in (("weight", weight), ("largest", largest), ("mean_square", squares), ("mean", mean)):
        if values[empty].any():
            yield f"{name}.{kind}", ("zeros where no token came", "others")
    if (np.abs(mean) > _SLACK * np.sqrt(squares) + _TINY).any():
        yield f"{name}.mean", ("no more than the root of the mean square", "a larger mean")
    if (np.sqrt(squares.max(axis=-1, initial=0)) > _SLACK * largest + _TINY).any():
        yield f"{name}.mean_square", ("no more than the square of the largest value", "a larger mean")


def _check_counts(arrays: Mapping[str, NDArray[Any]], manifest: Manifest, layer: int, part: str, file: object) -> None:
    """Compare the counts of a layer's inputs: every token passes each of them, and has `top_k` routed experts."""
    wanted = manifest.data[part].tokens
    for one in inputs(manifest.model, layer):
        name = f"{one.name}.{part}.tokens"
        found = arrays[name]
        if one.experts is None and int(found) != wanted:
            raise _bad(name, file, f"{wanted} tokens, as the manifest says", f"{found}")
        if one.experts is None:
            continue
        if int(found.max()) > wanted or int(found.sum()) != manifest.model.top_k * wanted:
            expected = f"{manifest.model.top_k} experts for each of {wanted} tokens"
            raise _bad(name, file, expected, f"{found.sum()} tokens, {found.max()} of one expert")
    routed = [f"{one.name}.{part}.tokens" for one in inputs(manifest.model, layer) if one.experts is not None]
    for name in routed[1:]:
        if (arrays[name] != arrays[routed[0]]).any():
            raise _bad(name, file, "as many tokens as reach the expert's gate", "other counts")


def _bad(name: str, file: object, expected: str, found: str) -> BadValue:
    return BadValue(tensor=name, file=file, expected=expected, found=found, remedy="calibrate again")
