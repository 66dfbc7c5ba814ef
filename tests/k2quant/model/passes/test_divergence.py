"""Divergence of two predictions against closed forms and plain sums, and texts cut into chunks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from transformers import AutoTokenizer

from k2quant.errors import CheckpointError, MalformedFile, UsageError
from k2quant.model.passes import divergence
from k2quant.model.passes.divergence import clustered, kl, nll, percentile, same_top
from k2quant.model.passes.texts import SAMPLE, read_text
from k2quant.nano import vocabulary

LOGITS = arrays(np.float32, (2, 3, 7), elements=st.floats(-1e4, 1e4, width=32))


def _plain(base: Tensor, candidate: Tensor) -> list[float]:
    """KL by loops over Python floats, whose sums `math.fsum` rounds once."""
    return [
        math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(_softmax(some), _softmax(other), strict=True))
        for some, other in zip(base.tolist(), candidate.tolist(), strict=True)
    ]


def _softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def test_two_words_have_a_closed_form() -> None:
    """Logits (a, 0) give p = sigmoid(a), so that KL is that of two coins."""
    base, candidate = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    wanted = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl(base, candidate).item() == pytest.approx(wanted, rel=1e-14)
    assert wanted == pytest.approx(0.8287, abs=1e-4)


def test_uniform_against_one_raised_logit() -> None:
    """Of V equal words one is raised by a: KL is ln((V - 1 + e^a) / V) - a / V, and its reverse differs."""
    base, candidate = torch.zeros(1, 100), torch.zeros(1, 100)
    candidate[0, 17] = 3
    total = 99 + math.exp(3)
    assert kl(base, candidate).item() == pytest.approx(math.log(total / 100) - 0.03, rel=1e-13)
    raised = math.exp(3) / total
    assert kl(candidate, base).item() == pytest.approx(3 * raised - math.log(total / 100), rel=1e-13)


def test_far_words_count_too() -> None:
    """A term that llama.cpp leaves out, ln p below -16, is in the sum: it is nearly all of this one."""
    base = torch.tensor([[0.0, -18.0]], dtype=torch.float64)
    candidate = torch.tensor([[0.0, -518.0]], dtype=torch.float64)
    assert kl(base, candidate).item() == pytest.approx(500 * math.exp(-18), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_equals_a_plain_sum(dtype: torch.dtype) -> None:
    """Over 500 words and 40 tokens, whatever the dtype: the logits are taken as they are."""
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(40, 500, generator=generator) * 5).to(dtype)
    candidate = (base.float() + torch.randn(40, 500, generator=generator) * 0.3).to(dtype)
    assert kl(base, candidate).tolist() == pytest.approx(_plain(base, candidate), rel=1e-11)


def test_slices_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is worked off in slices; any size of them gives the same bits and shapes."""
    base, candidate = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    tokens = torch.randint(11, (3, 5))
    whole = kl(base, candidate), nll(base, tokens)
    assert whole[0].shape == whole[1].shape == (3, 5)
    monkeypatch.setattr(divergence, "_ELEMENTS", 44)
    assert torch.equal(kl(base, candidate), whole[0])
    assert torch.equal(nll(base, tokens), whole[1])


@given(LOGITS, LOGITS)
def test_never_negative_and_nothing_between_equals(base: np.ndarray, candidate: np.ndarray) -> None:
    """KL of logits with themselves is exactly 0; of any others it is no less than rounding allows."""
    p, q = torch.from_numpy(base), torch.from_numpy(candidate)
    assert not kl(p, p).any()
    assert bool((kl(p, q) >= -1e-12).all())


@given(LOGITS, st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_nothing(base: np.ndarray, shift: float) -> None:
    """Softmax does not see a constant, and neither does any figure."""
    logits = torch.from_numpy(base).double()
    assert kl(logits, logits + shift).abs().max() < 1e-9
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.allclose(nll(logits, tokens), nll(logits + shift, tokens), atol=1e-9)


def test_nll_of_known_probabilities() -> None:
    """Logits that are logarithms of probabilities give minus those logarithms."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()
    assert nll(logits, torch.tensor([1, 3])).tolist() == pytest.approx([math.log(4), -math.log(0.4)], rel=1e-6)


def test_same_top_compares_the_likeliest() -> None:
    """Equal places agree, others do not."""
    base = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    candidate = torch.tensor([[0.0, 9.0, 8.0], [9.0, 8.0, 0.0]])
    assert same_top(base, candidate).tolist() == [True, False]


def test_chunks_of_one_size_give_the_error_of_their_means() -> None:
    """With equal chunks the ratio estimator is the standard error of the mean of chunk means."""
    values = torch.randn(6, 50, dtype=torch.float64) + torch.randn(6, 1, dtype=torch.float64)
    found = clustered(values.flatten(), torch.arange(6).repeat_interleave(50))
    means = values.mean(1)
    assert found.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.error == pytest.approx(float(means.std() / math.sqrt(6)), rel=1e-12)


def test_chunks_of_unequal_size_by_hand() -> None:
    """Chunks (1, 2, 3) and (4): mean 2.5, sums less mean times size -1.5 and 1.5, error sqrt(2 * 4.5) / 4."""
    found = clustered(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 0, 9]))
    assert found.value == 2.5
    assert found.error == pytest.approx(math.sqrt(2 * 4.5) / 4, rel=1e-14)


def test_tokens_of_a_chunk_are_no_independent_evidence() -> None:
    """Values that are the same all through each chunk: a hundred copies make the error no smaller."""
    once = clustered(torch.tensor([1.0, 2.0, 4.0]), torch.arange(3))
    copies = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(100)
    assert clustered(copies, torch.arange(3).repeat_interleave(100)).error == pytest.approx(once.error, rel=1e-12)


def test_one_chunk_alone_is_cut_into_stretches() -> None:
    """Eight stretches of 16 tokens take the place of chunks."""
    values = torch.randn(128, dtype=torch.float64)
    alone = clustered(values, torch.full((128,), 5))
    assert alone == clustered(values, torch.arange(8).repeat_interleave(16))
    assert alone.error > 0


def test_one_value_has_no_error_to_tell() -> None:
    """It is refused, as are chunks that do not match."""
    with pytest.raises(UsageError, match="at least 2"):
        clustered(torch.ones(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UsageError, match="chunk for each"):
        clustered(torch.ones(3), torch.zeros(2, dtype=torch.int64))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_is_linear_between_neighbours(values: list[float], share: float) -> None:
    """As numpy's default, which is llama.cpp's rule."""
    wanted = float(np.percentile(np.array(values), share * 100))
    assert percentile(torch.tensor(values, dtype=torch.float64), share) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Nano-K2's: a character is a token, and every text begins with BOS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, data in vocabulary.files().items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


def _file(folder: Path, text: str | bytes) -> Path:
    path = folder / "text.md"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_chunk_begins_as_texts_do(tmp_path: Path, tokenizer: object) -> None:
    """Of 250 characters in chunks of 101, two whole ones remain: BOS and 100 characters; the last 50 are dropped."""
    letters = "abcdefghij" * 25
    text = read_text(_file(tmp_path, letters), tokenizer, context=101)
    ids = vocabulary.encode(letters)
    assert [batch.tolist() for batch in text.batches] == [[[0, *ids[:100]], [0, *ids[100:200]]]]
    assert (text.name, text.chunks, text.predictions, text.unread) == ("text.md", 2, 200, "")


def test_a_long_last_piece_is_kept_by_itself(tmp_path: Path, tokenizer: object) -> None:
    """A hundred tokens are enough for a chunk; it has a batch of its own, as it is shorter than the others."""
    text = read_text(_file(tmp_path, "x" * 1300), tokenizer, context=401)
    assert [tuple(batch.shape) for batch in text.batches] == [(2, 401), (1, 401), (1, 101)]


def test_lines_are_texts_of_their_own(tmp_path: Path, tokenizer: object) -> None:
    """Each begins with BOS; those of one length share a batch, blank ones are none, and a long one is cut."""
    text = read_text(_file(tmp_path, "abc\n\nxy\r\ndef\n" + "q" * 7), tokenizer, context=6, lines=True)
    a, x, d, q = (vocabulary.encode(line) for line in ("abc", "xy", "def", "qqqqq"))
    assert [batch.tolist() for batch in text.batches] == [[[0, *a], [0, *d]], [[0, *x]], [[0, *q]]]
    short = read_text(_file(tmp_path, "abc\nxyz\n"), tokenizer, limit_tokens=4, lines=True)
    assert [batch.tolist() for batch in short.batches] == [[[0, *a]], [[0, x[0]]]]


def test_a_short_text_is_one_chunk(tmp_path: Path, tokenizer: object) -> None:
    """Nothing is dropped where nothing else is left."""
    assert [batch.tolist() for batch in read_text(_file(tmp_path, "abc"), tokenizer).batches] == [
        [[0, *vocabulary.encode("abc")]]
    ]


def test_no_more_tokens_than_asked_for(tmp_path: Path, tokenizer: object) -> None:
    """A text is read from its beginning, as far as it is wanted."""
    text = read_text(_file(tmp_path, "ab" * 5000), tokenizer, context=64, limit_tokens=630)
    assert sum(batch[:, 1:].numel() for batch in text.batches) == 630


def test_the_hash_is_that_of_the_tokens(tmp_path: Path, tokenizer: object) -> None:
    """Another name is the same text; other characters, or other chunks, are another."""
    first = read_text(_file(tmp_path, "a" * 300), tokenizer)
    (tmp_path / "again").write_text("a" * 300)
    assert read_text(tmp_path / "again", tokenizer).hash == first.hash
    assert read_text(_file(tmp_path, "a" * 299 + "b"), tokenizer).hash != first.hash
    assert read_text(tmp_path / "again", tokenizer, context=151).hash != first.hash


def test_characters_that_no_token_stands_for_are_told(tmp_path: Path, tokenizer: object) -> None:
    """Nano-K2 knows ASCII alone, and its tokenizer says nothing about the rest."""
    text = read_text(_file(tmp_path, "Grüße über 村口"), tokenizer)
    assert text.unread == "üß村口"
    assert text.batches[0].tolist() == [[0, *vocabulary.encode("Gre ber ")]]


def test_the_sample_has_something_of_everything(tokenizer: object) -> None:
    """Without a file the sample is read: several chunks of it even in K2's tokens, which have four characters."""
    content = SAMPLE.read_text("utf-8")
    assert 6000 < SAMPLE.stat().st_size < 10000
    assert all(part in content for part in ("def ", "| town", "Grüßen", "老槐树", "17 + 25 = 42"))
    assert read_text(None, tokenizer, limit_tokens=3000).predictions == 3000 - 3000 % 511 + (3000 % 511 > 100) * 445


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "at least 3 tokens, found 0"), ("ab", "found 2")],
)
def test_texts_with_nothing_to_predict_are_refused(
    content: str, reason: str, tmp_path: Path, tokenizer: object
) -> None:
    """The file is named."""
    with pytest.raises(UsageError, match=reason) as caught:
        read_text(_file(tmp_path, content), tokenizer)
    assert "text.md" in str(caught.value)
    with pytest.raises(UsageError, match=reason):
        read_text(_file(tmp_path, content), tokenizer, lines=True)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\x93NUMPY\x01", "byte 0x93 at 0"), (b"abc\x00def", "a character of code 0")]
)
def test_binary_files_are_no_texts(content: bytes, reason: str, tmp_path: Path, tokenizer: object) -> None:
    """The message says what gave them away."""
    with pytest.raises(MalformedFile, match=reason):
        read_text(_file(tmp_path, content), tokenizer)


def test_folders_and_missing_files_are_no_texts(tmp_path: Path, tokenizer: object) -> None:
    """Both are named."""
    with pytest.raises(MalformedFile, match="regular file"):
        read_text(tmp_path, tokenizer)
    with pytest.raises(MalformedFile, match="No such file"):
        read_text(tmp_path / "none", tokenizer)


@pytest.mark.parametrize(("context", "limit"), [(1, 100), (True, 100), (512, 2), (512, 1.5)])
def test_options_that_make_no_sense_are_refused(context: int, limit: int, tokenizer: object) -> None:
    """Before the text is read."""
    with pytest.raises(UsageError, match="expected at least"):
        read_text(None, tokenizer, context=context, limit_tokens=limit)


def test_a_tokenizer_that_fails_is_blamed(tmp_path: Path) -> None:
    """Whatever it raises."""

    class Broken:
        is_fast = False

        def __call__(self, *_: object, **__: object) -> None:
            raise ValueError("out of vocabulary")

    with pytest.raises(CheckpointError, match="cannot read it, found ValueError: out of vocabulary"):
        read_text(_file(tmp_path, "abc"), Broken())
