"""LLaMA's SentencePiece tokenizer: its special ids, its round trip and what it must never do."""

from __future__ import annotations

import pytest

from llama import LLAMAS, Tokenizer
from support.errors import CheckpointError


@pytest.fixture(scope="module")
def tokenizer(shared_folder) -> Tokenizer:
    return Tokenizer(shared_folder / "data" / "llama2_tokenizer.model")


def test_bos_is_1_eos_is_2_and_encode_adds_neither(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("What is in the video?")
    assert not {1, 2} & set(ids)
    assert tokenizer.pieces.get_piece_size() == LLAMAS["llama2-7b"].vocab_size


def test_hello_world_is_two_known_pieces(tokenizer):
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert tokenizer.decode([15043, 3186]) == "Hello world"


@pytest.mark.parametrize(
    "text",
    [
        "a man opens a door.",
        "(A) left  (B) right",
        "line\nbreak",
        "Grüße, 世界! 🎬",
        "42 % of 1,000",
        "",
    ],
)
def test_decoding_gives_back_what_was_encoded(text, tokenizer):
    """Characters that the vocabulary lacks are encoded as their bytes."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 32000 for i in ids)


def test_the_text_of_a_special_token_is_not_the_special_token(tokenizer):
    """A question that contains "</s>" cannot end the sequence."""
    assert 2 not in tokenizer.encode("say </s> now")


def test_bos_and_eos_decode_to_nothing(tokenizer):
    assert tokenizer.decode([1, 15043, 2]) == "Hello"


def test_the_error_for_a_missing_tokenizer_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model at .*tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")
