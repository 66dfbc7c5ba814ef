"""What `fidelity` and `blame` find: how far a candidate's numbers drift from the baseline's, and where from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from k2quant.eval.gating.verdict import Side
from k2quant.ground.intervals import Estimate
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import counted

SCHEMA = 1
"""Version of the JSON of `Fidelity` and `Blame`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """One decoder layer's output, candidate against baseline, both behind their own earlier layers."""

    layer: int
    relative_mse: float
    """Squared error of the hidden states over their energy in the baseline, summed over all tokens."""
    cosine: float
    """Mean cosine between the hidden states of a token."""
    kl: float
    """Mean KL divergence, in nats, of what each model's norm and head would predict from this layer's output."""
    same_experts: float | None
    """Share of tokens whose set of routed experts is the same; None for a dense layer."""
    overlap: float | None
    """Mean share of a token's experts that both chose; None for a dense layer."""
    load_shift: float | None
    """Half the sum over experts of the change of their share of the load, 0 to 1; None for a dense layer."""
    never: tuple[int, ...]
    """Experts that no token of the text visited in the baseline."""
    starved: tuple[int, ...]
    """Experts that the baseline visited and the candidate never."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How far the candidate's predictions drift from the baseline's on one text. A tripwire, never a verdict."""

    base: Side
    candidate: Side
    text: str
    """The text's name."""
    text_hash: str
    """SHA-256 of its token ids."""
    tokens: int
    """Tokens whose prediction was compared."""
    chunks: int
    kl: Estimate
    """KL divergence of the candidate from the baseline, nats a token."""
    kl_median: float
    kl_99: float
    """99% of the tokens lie below."""
    kl_max: float
    reverse_kl: Estimate
    same_top: Estimate
    """Share of tokens whose likeliest next token is the same."""
    base_perplexity: float
    candidate_perplexity: float
    log_ratio: Estimate
    """ln(candidate's perplexity / baseline's), paired token by token."""
    layers: tuple[LayerFidelity, ...]
    unread: str = ""
    """Characters of the text that the tokenizer passes over in silence, each once."""
    completions: bool = False
    """Whether the text has prompts: predictions of completions alone were compared then, layers on every token."""
    backend: str = "auto"
    """Who multiplied; only with `decoded` do equal values in two formats give exactly no drift."""

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        drift = {"kl": f"{self.kl.value:.4g} nats", "same_top": f"{self.same_top.value:.1%}"}
        models = {"base": self.base.model, "candidate": self.candidate.model}
        return {**models, **drift, "tokens": self.tokens, "text": self.text, "layers": len(self.layers)}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return {"schema": SCHEMA, "kind": "fidelity"} | dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """What a part came to that was not the last: others have batches of the text still to measure."""

    part: str
    """Such as `2/8`."""
    missing: tuple[int, ...]
    """The batches that are still to come, counted from 0."""
    batches: int
    """All batches of the text."""

    @property
    def still_to_come(self) -> str:
        """What other parts have still to measure, such as `3 of 8 batches`."""
        return f"{len(self.missing)} of {counted(self.batches, 'batch', 'batches')}"

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        return {"part": self.part, "still_to_come": self.still_to_come}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A group of tensors whose return to the baseline takes damage away."""

    name: str
    """Such as `layer 3 routed experts`, or a tensor's base name."""
    tensors: int
    share: float
    """Of the whole damage, what goes when this group alone is put back, 0 to 1; groups may overlap in effect."""
    interval: tuple[float, float]
    """95%, from resampled chunks of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Where a candidate's damage comes from."""

    base: Side
    candidate: Side
    text: str
    text_hash: str
    damage: Estimate
    """KL divergence of the candidate from the baseline, nats a token: what is being explained."""
    noise: Estimate
    """The same of the baseline from itself when activations round otherwise: damage near it cannot be explained."""
    changed: int
    """Weights that are stored otherwise in the candidate; with none there is nothing to explain."""
    passes: int
    """Forward passes that it took."""
    classes: tuple[Suspect, ...]
    """Tensor classes, largest share first; only those whose interval lies above nothing."""
    suspects: tuple[Suspect, ...]
    """The finest groups that were found, largest share first; empty where no damage could be told from none."""
    together: Suspect | None
    """All suspects put back at once; None without suspects."""
    completions: bool = False
    """Whether the text has prompts: damage is that of completions alone then."""
    backend: str = "auto"
    """Who multiplied, as in `Fidelity`."""

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        models = {"base": self.base.model, "candidate": self.candidate.model}
        shares = {one.name: f"{one.share:.0%}" for one in self.suspects[:3]}
        return {**models, "damage": f"{self.damage.value:.4g} nats", "suspects": len(self.suspects), **shares}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return {"schema": SCHEMA, "kind": "blame"} | dataclasses.asdict(self)
