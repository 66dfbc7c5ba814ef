"""Models of checkpoints whose config promises other layers than there are, or one tensor for embedding and head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.errors import CheckpointError, CheckpointWarning, UsageError
from k2quant.model import load_model, save_model, stream_forward
from k2quant.nano import vocabulary
from rewritten import tensors_of
from tiny import NANO, write_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(3))
CONFIG = NANO | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """The tensors of a tiny K2 of two layers."""
    folder = tmp_path_factory.mktemp("whole") / "K2"
    write_model(folder)
    return tensors_of(open_checkpoint(folder))


def written(folder: Path, tensors: Shard, **keys: object) -> Path:
    """Write a tiny K2 with other keys in its config (`...`: without), and its tokenizer."""
    config = {key: value for key, value in (CONFIG | keys).items() if value is not ...}
    write_checkpoint(folder, {"model.safetensors": tensors}, config)
    for name, content in vocabulary.files().items():
        (folder / name).write_bytes(content)
    return folder


def behind(tensors: Shard, *own: str) -> Shard:
    """Return tensors with a copy of the second layer as a third, which has these norms of its own besides."""
    copy = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors.items() if "layers.1." in name}
    norms = {f"model.layers.2.{name}.weight": ("BF16", np.full(64, 0x3F80, np.uint16)) for name in own}
    return tensors | copy | norms


def logits(model: Any) -> Tensor:
    """Return a model's logits."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def quiet(path: Path, **options: Any) -> Any:
    """Load a model; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(path, **options)


def assert_equal_shards(first: Path, second: Path) -> None:
    """Compare all shards of two checkpoints."""
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("promised", [0, None, ...])
def test_a_layer_that_nothing_promises_is_left_out_with_a_word(
    promised: object, tensors: Shard, tmp_path: Path
) -> None:
    """A promise that was not made: a model does without a layer that predicts further tokens, and saving keeps it."""
    path = written(tmp_path / "K2", behind(tensors, "enorm"), num_nextn_predict_layers=promised)
    with pytest.warns(CheckpointWarning, match=f"{path}: .*but layer 2 predicts further tokens .* run without it"):
        model = load_model(path)
    assert torch.equal(logits(model), logits(quiet(written(tmp_path / "plain", tensors))))
    save_model(model, tmp_path / "saved")
    assert_equal_shards(path, tmp_path / "saved")


def test_a_promised_layer_is_left_out_as_ever(tensors: Shard, tmp_path: Path) -> None:
    """A promise that is kept, or that concerns no model here, is not worth a word."""
    quiet(written(tmp_path / "kept", behind(tensors, "enorm"), num_nextn_predict_layers=1))
    quiet(written(tmp_path / "missing", tensors, num_nextn_predict_layers=1))


def test_a_layer_of_the_decoder_is_not_left_out(tensors: Shard, tmp_path: Path) -> None:
    """A decoder layer beyond `num_hidden_layers` is no layer for further tokens: without it this is another model."""
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*has no place for it"):
        load_model(written(tmp_path / "K2", behind(tensors)))


def test_generate_says_what_it_leaves_out(tensors: Shard, tmp_path: Path) -> None:
    """A promise that was not made: `generate` runs, and its remark is one line without code in it."""
    path = written(tmp_path / "K2", behind(tensors, "hnorm"))
    words = ["generate", str(path), "--prompt", "abc", "--max-new-tokens", "2"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    (line,) = [line for line in done.stderr.splitlines() if "predicts" in line]
    assert line.startswith(f"{path}: config.json: num_nextn_predict_layers is 0, but layer 2 predicts")
    assert "warn" not in done.stderr


# --- one tensor for embedding and head --------------------------------------------------------------------------------


@pytest.fixture
def one(tensors: Shard, tmp_path: Path) -> Path:
    """A checkpoint whose embedding is its head."""
    without = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return written(tmp_path / "one", without, tie_word_embeddings=True)


@pytest.fixture
def same(tensors: Shard, tmp_path: Path) -> Path:
    """The same model with two tensors, and a config that ties nothing."""
    return written(tmp_path / "same", tensors | {HEAD: tensors[EMBEDDING]})


def test_a_tied_head_is_the_embedding(one: Path, same: Path, tmp_path: Path) -> None:
    """A head that is tied and absent: the model computes with the embedding, and saves back byte for byte."""
    model = quiet(one)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(quiet(same)))
    assert torch.equal(next(stream_forward(one, [IDS])), logits(model))
    save_model(model, tmp_path / "saved", state=model.state_dict())
    assert_equal_shards(one, tmp_path / "saved")


def test_a_change_of_a_tied_head_is_saved(one: Path, tmp_path: Path) -> None:
    """A head that is tied: what was trained is written to the embedding's place; of two that differ neither is."""
    model = quiet(one)
    with torch.no_grad():
        model.lm_head.weight.fill_(0.5)
    save_model(model, tmp_path / "saved")
    assert quiet(tmp_path / "saved").model.embed_tokens.weight.unique().tolist() == [0.5]
    save_model(model, tmp_path / "given", state={HEAD: torch.full((128, 64), 0.25)})
    assert quiet(tmp_path / "given").model.embed_tokens.weight.unique().tolist() == [0.25]
    with pytest.raises(UsageError, match=r"differ; config\.json ties them"):
        save_model(model, tmp_path / "two", state={HEAD: torch.zeros(128, 64), EMBEDDING: torch.ones(128, 64)})
    model.lm_head.weight = nn.Parameter(torch.ones(128, 64))
    with pytest.raises(UsageError, match=r"two that differ; config\.json ties them"):
        save_model(model, tmp_path / "two")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("waiting", ["lm_head", "model.embed_tokens"])
def test_a_tied_head_may_wait_on_disk(waiting: str, one: Path, tmp_path: Path) -> None:
    """A head that is tied: where embedding and head lie in different places, each is the same tensor."""
    model = quiet(one, device={"": "cpu", waiting: "disk"})
    assert torch.equal(logits(model), logits(quiet(one)))
    save_model(model, tmp_path / "saved")
    assert_equal_shards(one, tmp_path / "saved")


def test_a_head_beside_a_tie_is_not_dropped(tensors: Shard, tmp_path: Path) -> None:
    """A head that is tied and present: it is used and saved as it is, and a warning says that engines may not."""
    path = written(tmp_path / "K2", tensors, tie_word_embeddings=True)
    with pytest.warns(CheckpointWarning, match="tie_word_embeddings is true, but there is a head of its own"):
        model = load_model(path)
    assert torch.equal(logits(model), logits(quiet(written(tmp_path / "plain", tensors))))
    save_model(model, tmp_path / "saved")
    assert_equal_shards(path, tmp_path / "saved")


def test_no_embedding_is_no_head(tensors: Shard, tmp_path: Path) -> None:
    """A head that is tied to nothing: the embedding is what the model lacks."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in {HEAD, EMBEDDING}}
    with pytest.raises(CheckpointError, match=r"`(model\.embed_tokens|lm_head)\.weight`.*the model needs it"):
        load_model(written(tmp_path / "K2", kept, tie_word_embeddings=True))
