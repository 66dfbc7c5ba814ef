"""`measure_fidelity`: how far a candidate's predictions drift from the baseline's on a text, and in which layers.

Both models are streamed layer by layer, so that neither has to fit into memory. The baseline goes first and leaves its
hidden states behind, in files where they are many; then the candidate follows, and the predictions of both are compared
batch by batch. What comes out is a tripwire and a map of where to look, never a verdict on accuracy.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.errors import CheckpointError, Incomparable, UsageError
from k2quant.eval.drift.findings import Fidelity, LayerFidelity
from k2quant.eval.drift.layerwise import ComparingWatch, KeepingWatch, Watch, check_finite, early_kl, routing
from k2quant.eval.drift.predictions import Predictions
from k2quant.eval.gating.verdict import Side
from k2quant.eval.runs.identity import tokenizer_hash
from k2quant.ground.saying.meter import each
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.units import one_of
from k2quant.model import stream_forward
from k2quant.model.architecture import architecture
from k2quant.model.generation import load_tokenizer
from k2quant.model.loading import DTYPES
from k2quant.model.modules import Backend
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.texts import Text, read_text

Progress = Callable[[int, int], None]
"""Called with the layers that are done and all layers, of both passes together."""

_ALIKE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "n_routed_experts",
    "num_experts_per_tok",
)
"""What two models must share for their layers, routers and predictions to be comparable."""

_EARLY = 128
"""Places of the text at which every layer's output is read out: each costs a product with the whole head."""

_BUDGET = 1_000_000_000
"""Bytes of the baseline's hidden states to keep in memory; K2's for 4096 tokens are 3.6 GB in BF16."""


@barred("fidelity", each("layer", "layers"))
def measure_fidelity(
    base: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    context: int = 512,
    tokens: int = 4096,
    lines: bool = False,
    device: str | torch.device = "cpu",
    dtype: str = "bfloat16",
    backend: Backend = "decoded",
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Asked = None,
) -> Fidelity:
    """Compare two checkpoints' predictions, hidden states and routes on a text.

    Everything that names, shapes, configs and tokenizers can tell is checked before a weight is read.

    Args:
        base: folder of the baseline, in any format; its tokenizer is used.
        candidate: folder of the candidate, in any format.
        text: plain UTF-8, or JSON Lines (`.jsonl`) of `prompt` and `completion`, of which prompts are context and only
            completions are scored; None for the sample that k2quant brings.
        context: tokens of a chunk; chunks know nothing of each other.
        tokens: how much of the text to read.
        lines: whether each line is a text of its own.
        device: where layers compute.
        dtype: of activations and of what is not quantised.
        backend: `decoded` to multiply by the BF16 values that weights mean: what is equal in value then gives exactly
            no drift, in whatever formats the two are. `auto` for the fused kernels, as a model is run: their sums have
            another order than those of BF16, which is drift too. `reference` for plain torch.
        follow_links: whether links of both folders may lead out of them.
        trust_remote_code: whether the baseline's own tokenizer code may run.
        progress: called as the work goes on, with layers; True for a bar.

    Returns:
        the figures; two checkpoints of equal values give exactly none. The hashes of the models stay None: they would
        cost another reading of every byte.

    Raises:
        CheckpointError: one of them cannot be loaded, or has no tokenizer that can.
        Incomparable: they have other vocabularies, tokenizers, layers or experts.
        MalformedFile: the text is none.
        UsageError: an option makes no sense, or the text is too short.
        HarnessFault: a model gives NaN or infinity.
        OutputError: there is no room for temporary files.
    """
    folders = Path(base), Path(candidate)
    one_of("dtype", dtype, tuple(DTYPES))
    config, sides = _checked(*folders, follow_links=follow_links)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code, follow_links=follow_links)
    read = read_text(text, tokenizer, context=context, limit_tokens=tokens, lines=lines)
    _check_fits(read, config, folders[0])
    tick = _ticking(told(progress), 2 * config.num_hidden_layers)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "follow_links": follow_links}
    with tempfile.TemporaryDirectory(prefix="k2quant-") as place:
        shapes = [(*batch.shape, config.hidden_size) for batch in read.batches]
        kept = Activations(Path(place), shapes, DTYPES[dtype], budget=_BUDGET, identity={}, lasting=False)
        places = _places(read)
        first = KeepingWatch(folders[0], places, tick, kept)
        second = ComparingWatch(folders[1], places, tick, kept)
        passes = [
            cast("Generator[Tensor]", stream_forward(folder, read.batches, watch, **options))
            for folder, watch in zip(folders, (first, second), strict=True)
        ]
        with closing(passes[0]), closing(passes[1]):
            layers, predictions = _compared(first, second, passes, read, config, folders)
            return predictions.fidelity(read, sides, layers, backend)


def _checked(base: Path, candidate: Path, *, follow_links: bool) -> tuple[Any, tuple[Side, Side]]:
    """Return the config that both models share, and their names.

    Raises:
        Incomparable: they do not share it.
    """
    both = (base, candidate)
    one, other = (architecture(open_checkpoint(folder, follow_links=follow_links)) for folder in both)
    for key in _ALIKE:
        wanted, found = getattr(one, key), getattr(other, key)
        if found != wanted:
            raise Incomparable(
                f"{key} of two models that are to be compared",
                file=candidate,
                expected=f"{wanted}, as in {base}",
                found=found,
            )
    hashes = [tokenizer_hash(folder, follow_links=follow_links) for folder in both]
    if hashes[0] != hashes[1]:
        raise Incomparable(
            "another tokenizer, which reads another text",
            file=candidate,
            expected=f"the tokenizer's files of {base}",
            found="none" if hashes[1] is None else "files of other content",
            remedy="if they should be the same, copy those files",
        )
    return one, (_side(base, hashes[0]), _side(candidate, hashes[1]))


def _side(folder: Path, tokenizer: str | None) -> Side:
    return Side(folder=str(folder), model=folder.resolve().name, model_hash=None, tokenizer_hash=tokenizer)


def _check_fits(text: Text, config: Any, folder: Path) -> None:
    """Refuse a text that the model has no tokens or no positions for."""
    longest = max(batch.shape[1] for batch in text.batches)
    if longest > config.max_position_embeddings:
        raise UsageError(
            f"context: expected at most the {config.max_position_embeddings:,} tokens that the model has room for, "
            f"found {longest:,}"
        )
    highest = max(int(batch.max()) for batch in text.batches)
    if highest >= config.vocab_size:
        raise CheckpointError(
            "its tokenizer belongs to another model",
            file=folder,
            expected=f"tokens below {config.vocab_size}",
            found=highest,
        )


def _ticking(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return what counts layers."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    if progress:
        progress(0, total)
    return tick


def _places(text: Text) -> list[Tensor]:
    """Return where layers are read out, for each batch: some of the tokens that predict another, evenly spread."""
    numbers = [
        torch.arange(batch.numel()).reshape(batch.shape)[:, :-1][scored]
        for batch, scored in zip(text.batches, text.scored, strict=True)
    ]
    count = min(_EARLY, text.predictions)
    wanted = torch.arange(count) * text.predictions // count
    starts = torch.tensor([0, *(len(some) for some in numbers)]).cumsum(0)
    return [
        some[wanted[(wanted >= start) & (wanted < end)] - start]
        for some, start, end in zip(numbers, starts, starts[1:], strict=False)
    ]


def _compared(
    first: KeepingWatch,
    second: ComparingWatch,
    passes: list[Generator[Tensor]],
    text: Text,
    config: Any,
    folders: tuple[Path, Path],
) -> tuple[tuple[LayerFidelity, ...], Predictions]:
    """Run both passes and compare."""
    predictions = Predictions()
    layers: tuple[LayerFidelity, ...] = ()
    for ids, scored in zip(text.batches, text.scored, strict=True):
        logits = [next(run) for run in passes]  # the first round runs all the layers
        for folder, some in zip(folders, logits, strict=True):
            check_finite(some, folder, "the logits")
        layers = layers or _layers(first, second, config)
        predictions.add(ids, scored, *logits)
        del logits, some  # before the next ones are made: K2's are large
    return layers, predictions


def _layers(base: Watch, candidate: ComparingWatch, config: Any) -> tuple[LayerFidelity, ...]:
    found = []
    for layer, hidden in enumerate(candidate.hidden):
        routed = routing(base, candidate, layer, config.n_routed_experts)
        found.append(
            LayerFidelity(
                layer=layer,
                relative_mse=hidden.relative_mse,
                cosine=hidden.cosine,
                kl=early_kl(base, candidate, layer),
                same_experts=routed and routed.same_experts,
                overlap=routed and routed.overlap,
                load_shift=routed and routed.load_shift,
                never=routed.never if routed else (),
                starved=routed.starved if routed else (),
            )
        )
    return tuple(found)
