"""Statistics belong to one model: another's are refused by name, other bytes by the digests of what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from k2quant.calib.stats.digests import base_of, digest_of, digests_of
from k2quant.calib.stats.matching import check_bytes, check_source
from k2quant.calib.stats.reading import Stats
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.errors import CheckpointError, MissingTensor, ShapeMismatch
from rewritten import respelled

LAST = "model.layers.2.mlp.experts.15.down_proj"


def weights_of(checkpoint: Checkpoint) -> list[StoredWeight]:
    """Return the weights of a checkpoint."""
    return group_tensors(checkpoint.tensors).weights


@pytest.fixture(scope="module")
def stats(standing: Any, k2_source: Path) -> Stats:
    """Return statistics that nobody measured, with the digests of every weight of the small K2."""
    source = open_checkpoint(k2_source)
    digests = digests_of(source, weights_of(source))
    found: Stats = standing.stats("k2", standing.manifest(**(source.config or {})), digests=digests)
    return found


def check(stats: Stats, folder: Path) -> None:
    """Compare statistics with the checkpoint in a folder."""
    checkpoint = open_checkpoint(folder)
    check_source(stats, checkpoint, weights_of(checkpoint))


def test_digests_are_those_of_the_stored_bytes(k2_source: Path, stats: Stats) -> None:
    """The crc32 of each tensor of a weight by its suffix, scales that lie in another shard included."""
    source = open_checkpoint(k2_source)
    weights = {weight.base: weight for weight in weights_of(source)}
    for base in (LAST, "model.layers.1.mlp.experts.7.gate_proj"):
        expected = {suffix: f"{crc32(read_tensor(source, entry)):08x}" for suffix, entry in weights[base].parts.items()}
        assert digest_of(source, weights[base]) == expected == stats.digest(base)
        assert expected.keys() == {"weight", "weight_scale_inv"}


def test_a_digest_is_taken_in_pieces(k2_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small: the number is the same."""
    source = open_checkpoint(k2_source)
    weight = next(weight for weight in weights_of(source) if weight.base == LAST)
    whole = digest_of(source, weight)
    monkeypatch.setattr("k2quant.calib.stats.digests.PIECE_BYTES", 1000)
    assert digest_of(source, weight) == whole


def test_a_router_has_the_digests_of_two_tensors(stats: Stats) -> None:
    """Its weight and its bias, of one base; what lies outside the layers has digests too."""
    assert (stats.digest("model.layers.1.mlp.gate") or {}).keys() == {"weight", "e_score_correction_bias"}
    for base in ("model.embed_tokens", "model.norm", "lm_head"):
        assert (stats.digest(base) or {}).keys() == {"weight"}


def test_the_model_that_was_calibrated_is_taken(stats: Stats, k2_source: Path, tmp_path: Path) -> None:
    """Also where it is moved, and where keys of its config change that no input of a layer depends on."""
    check(stats, k2_source)
    check(stats, respelled(k2_source, tmp_path / "moved", use_cache=False, max_position_embeddings=4096))


def test_a_name_is_that_of_the_language_model(standing: Any, k25: Path) -> None:
    """K2.5 has `language_model.` before it, in the checkpoint and not in the statistics; its vision has none."""
    source = open_checkpoint(k25)
    digests = digests_of(source, weights_of(source))
    assert "model.layers.0.self_attn.o_proj" in digests
    assert "lm_head" in digests
    assert not any(base.startswith(("language_model", "vision", "mm_projector")) for base in digests)
    assert {base_of(weight) for weight in weights_of(source)} == {*digests, None}
    check(standing.stats("k25", standing.manifest(**(source.config or {})["text_config"]), digests=digests), k25)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_routed_experts", 32), ("routed_scaling_factor", 1.0), ("rope_theta", 1e6), ("hidden_size", 8)],
)
def test_statistics_of_another_config_are_refused(
    stats: Stats, k2_source: Path, tmp_path: Path, key: str, value: Any
) -> None:
    """The key is named, with both values, before a weight is read."""
    folder = respelled(k2_source, tmp_path / "other", **{key: value})
    with pytest.raises(CheckpointError, match=f"of another model: {key}, expected {value}") as raised:
        check(stats, folder)
    assert raised.value.file == stats.folder
    assert "calibrate this checkpoint" in str(raised.value)


def test_a_checkpoint_without_a_config_is_refused(stats: Stats, k2_source: Path, tmp_path: Path) -> None:
    """Nobody can tell whose it is."""
    folder = respelled(k2_source, tmp_path / "bare")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check(stats, folder)


def test_another_format_of_the_same_model_is_refused(stats: Stats, k2_bf16: Path, tmp_path: Path) -> None:
    """Its bytes cannot be compared with those that were calibrated."""
    folder = respelled(k2_bf16, tmp_path / "bf16")
    message = "was calibrated in other tensors, expected weight, weight_scale_inv, as .*, found weight; calibrate"
    with pytest.raises(MissingTensor, match=message):
        check(stats, folder)


def test_a_weight_that_is_not_there_is_named(stats: Stats, k2_source: Path, tmp_path: Path) -> None:
    """An expert that was calibrated, and is called otherwise here."""
    folder = respelled(k2_source, tmp_path / "fewer", lambda name: name.replace("experts.15.down", "experts.16.down"))
    with pytest.raises(MissingTensor, match=r"experts\.15\.down_proj` in .*: was calibrated, but is not there"):
        check(stats, folder)


def test_a_matrix_of_another_width_is_named(stats: Stats, k2_source: Path) -> None:
    """Whatever the config says of it."""
    checkpoint = open_checkpoint(k2_source)
    weights = [
        weight._replace(shape=(512, 128)) if weight.base == LAST else weight for weight in weights_of(checkpoint)
    ]
    with pytest.raises(ShapeMismatch, match=r"15\.down_proj.*expected 256 columns, as .*, found \[512, 128\]"):
        check_source(stats, checkpoint, weights)


def test_a_measured_matrix_without_digests_is_named(standing: Any, stats: Stats, k2_source: Path) -> None:
    """Nobody could tell another weight from it."""
    digests = {base: parts for base, parts in stats.digests() if base != LAST}
    bare = standing.stats("bare", stats.manifest, digests=digests)
    with pytest.raises(CheckpointError, match=r"15\.down_proj.*do not say which bytes of this weight were calibrated"):
        check(bare, k2_source)


def test_other_bytes_are_refused_by_the_tensor(stats: Stats, k2_source: Path) -> None:
    """Of a weight that the pass read; a tensor of which nothing is known may hold anything."""
    weight = next(weight for weight in weights_of(open_checkpoint(k2_source)) if weight.base == LAST)
    check_bytes(stats, weight, {**(stats.digest(LAST) or {}), "more": "0" * 8})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_scale_inv` in .*: is not the weight that was calibr"):
        check_bytes(stats, weight, {"weight_scale_inv": "0" * 8})


def test_what_the_pass_did_not_read_says_nothing(stats: Stats, k2_source: Path) -> None:
    """Such as a layer that predicts further tokens: it may be there or not."""
    checkpoint = open_checkpoint(k2_source)
    weights = weights_of(checkpoint)
    more = [weight._replace(base="model.layers.3.eh_proj", shape=(3, 5)) for weight in weights[:1]]
    check_source(stats, checkpoint, [*weights, *more])
    assert stats.digest("model.layers.3.eh_proj") is None
