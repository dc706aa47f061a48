"""LLaMA's SentencePiece tokenizer: its special ids, its round trip and what it must never do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from helpers import train_tokenizer
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from llama import LLAMAS, Tokenizer
from merv import MERV, MERVS
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


def test_an_id_without_a_piece_is_no_text(tokenizer):
    """The released MERV has 64 ids more than its tokenizer (ledger K9), and may generate them."""
    beyond = [tokenizer.vocab_size, 32063]
    assert tokenizer.decode([1, 15043, *beyond, 2]) == "Hello"
    assert tokenizer.decode(beyond) == ""


def test_the_error_for_a_missing_tokenizer_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model at .*tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")


FOREIGN = {
    "an LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
        "git lfs pull",
    ),
    "empty": (b"", "the file is empty"),
    "tokenizer.json": (b'{"version": "1.0", "model": {"type": "BPE"}}', "not tokenizer.json"),
    "tiktoken": (b"IQ== 0\nIg== 1\nIw== 2\n", "not tokenizer.json or tiktoken's"),
    "noise": (bytes(range(256)) * 8, "not a tokenizer of LLaMA"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_sentencepiece_model_is_explained(tmp_path, kind):
    """SentencePiece takes an empty file for a model without pieces, and describes none of these."""
    content, wanted = FOREIGN[kind]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert wanted in str(caught.value)


def test_a_tokenizer_without_a_start_token_is_refused(tmp_path):
    """Every sequence begins with <s>; id -1 would fail in the embedding, far from the cause."""
    path = train_tokenizer(tmp_path / "tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.trainer_spec.bos_id = -1
    model.pieces[1].piece = "start"
    model.pieces[1].type = 1
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="no <s> or no </s>"):
        Tokenizer(path)


def test_a_tokenizer_larger_than_the_llm_is_refused_when_a_checkpoint_is_loaded(tmp_path):
    """An id without an embedding fails only when a question happens to contain it."""
    model = MERV.create(MERVS["miniature"], Tokenizer(train_tokenizer(tmp_path / "fits.model")))
    model.save_pretrained(tmp_path / "checkpoint")
    large = train_tokenizer(
        tmp_path / "large.model", user_defined_symbols=[f"<{i}>" for i in range(5)]
    )
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["merv"]["llm"]["vocab_size"] == 640
    MERV.from_pretrained(tmp_path / "checkpoint", tokenizer=large)
    tokenizer = Tokenizer(large)
    with pytest.raises(CheckpointError, match="has 320 pieces, miniature only 300"):
        tokenizer.require_fit(replace(LLAMAS["miniature"], vocab_size=300))
    shutil.copyfile(large, tmp_path / "checkpoint" / "tokenizer.model")
    shrink(tmp_path / "checkpoint", 300)
    with pytest.raises(CheckpointError, match="has 320 pieces, miniature only 300"):
        MERV.from_pretrained(tmp_path / "checkpoint")


def shrink(folder, pieces: int) -> None:
    """Give a checkpoint a smaller vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    config["merv"]["llm"]["vocab_size"] = pieces
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        tensors[name] = tensors[name][:pieces].clone()
    save_file(tensors, folder / "model.safetensors")
