"""data.render_prompt and data.tokenize: which tokens there are and which cost a loss."""

from __future__ import annotations

import pytest
from helpers import talk

from data import IGNORE, TEMPLATES, render_prompt, tokenize
from support.benchmarks import mcq_prompt
from support.errors import DataError


def test_the_loss_is_on_answers_and_their_ends_only(llama2_tokenizer):
    """By example, with LLaMA-2's own pieces; - is a position without loss."""
    conversation = talk("<video>\nHi", "Yes", "Why?", "No.")
    ids, labels = tokenize(render_prompt(conversation, TEMPLATES["base"]), llama2_tokenizer)
    piece = llama2_tokenizer.pieces.id_to_piece
    shown = ["-" if label == IGNORE else piece(label) for label in labels]
    # fmt: off
    assert [piece(i) for i in ids] == [
        "<s>", "▁In", ":", "▁Hi", "<0x0A>", "Out", ":", "▁Yes", "</s>",
        "▁In", ":", "▁Why", "?", "<0x0A>", "Out", ":", "▁No", ".", "</s>",
    ]
    assert shown == [
        "-", "-", "-", "-", "-", "-", "-", "▁Yes", "</s>",
        "-", "-", "-", "-", "-", "-", "-", "▁No", ".", "</s>",
    ]


def test_llamas_special_ids_are_what_the_weights_expect(llama2_tokenizer):
    assert (llama2_tokenizer.bos_id, llama2_tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("template", TEMPLATES)
def test_inference_ids_are_an_exact_prefix_of_training_ids(llama2_tokenizer, template):
    """One renderer serves both, so this holds at every turn of a conversation."""
    conversation = talk(
        "<image>\nWhat is it? ", " A cat.\n", "  Sure?", "Yes, sure: 100 %", "OK", "So"
    )
    turns = render_prompt(conversation, TEMPLATES[template])
    trained, labels = tokenize(turns, llama2_tokenizer)
    for number in (1, 3, 5):
        asked_turns = render_prompt(conversation[:number], TEMPLATES[template])
        asked, no_labels = tokenize(asked_turns, llama2_tokenizer)
        assert trained[: len(asked)] == asked
        assert labels[len(asked)] == trained[len(asked)] != IGNORE  # and there the answer begins
        assert labels[: len(asked)] == no_labels
        assert no_labels.count(2) == number // 2  # the ends of the answers given so far


@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_comes_once_and_eos_after_each_answer(llama2_tokenizer, template):
    turns = render_prompt(talk("A?", "B", "C?", "D", "E?", "F"), TEMPLATES[template])
    ids, labels = tokenize(turns, llama2_tokenizer)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids.count(2) == labels.count(2) == 3
    assert ids[-1] == labels[-1] == 2


def test_the_base_template_is_in_and_out():
    assert render_prompt(talk("What?", "A cat"), TEMPLATES["base"]) == [
        ("In: What?\nOut:", False),
        ("A cat", True),
    ]


def test_the_vicuna_template_has_its_system_text_once():
    turns = render_prompt(talk("What?", "A cat", "Sure?", "Yes"), TEMPLATES["vicuna"])
    assert turns == [
        (
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
            "USER: What? ASSISTANT:",
            False,
        ),
        ("A cat", True),
        ("USER: Sure? ASSISTANT:", False),
        ("Yes", True),
    ]


def test_the_llama2_chat_template_puts_its_system_text_inside_the_first_question():
    turns = render_prompt(talk("What?", "A cat", "Sure?", "Yes"), TEMPLATES["llama2_chat"])
    assert turns == [
        (
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
            "understand the visual content that the user provides, and assist the user with a "
            "variety of tasks using natural language.\n<</SYS>>\n\nWhat? [/INST]",
            False,
        ),
        ("A cat", True),
        ("[INST] Sure? [/INST]", False),
        ("Yes", True),
    ]


def test_a_caption_follows_the_visual_tokens_without_a_prompt(llama2_tokenizer):
    """Stage 1: [BOS] visual caption </s>."""
    turns = render_prompt(talk("<image>\nDescribe this.", "A cat"), TEMPLATES["caption"])
    ids, labels = tokenize(turns, llama2_tokenizer)
    caption = [*llama2_tokenizer.encode("A cat"), 2]
    assert ids == [1, *caption]
    assert labels == [IGNORE, *caption]


@pytest.mark.parametrize(
    "text",
    ["<video>\nWhat?", "<image>\nWhat?", "What?\n<video>", " <image> <video> What? ", "What?"],
)
def test_placeholders_leave_no_trace(text):
    """Videos stand in front of the text as embeddings, never as the literal <video> (K4)."""
    (turn,) = render_prompt(talk(text), TEMPLATES["base"])
    assert turn == ("In: What?\nOut:", False)


def test_removing_a_placeholder_keeps_words_apart():
    (turn,) = render_prompt(talk("Look at <video> closely."), TEMPLATES["base"])
    assert turn[0].split() == ["In:", "Look", "at", "closely.", "Out:"]


def test_a_question_with_braces_is_left_alone():
    """Templates are filled in by str.replace, so {x} in a question is plain text."""
    (turn,) = render_prompt(talk("What is {x} or {question}?"), TEMPLATES["base"])
    assert turn[0] == "In: What is {x} or {question}?\nOut:"


@pytest.mark.parametrize(
    "roles", [[], ["gpt"], ["human", "human"], ["gpt", "human"], ["human", "gpt", "gpt"], ["user"]]
)
def test_turns_that_do_not_alternate_are_an_error(roles):
    with pytest.raises(DataError) as caught:
        render_prompt([{"from": role, "value": "x"} for role in roles], TEMPLATES["base"])
    assert str(roles) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_the_multiple_choice_prompt_is_the_released_one():
    """As released, with four blanks before the first option only."""
    assert mcq_prompt("What is it?", ["a cat", "a dog", "a fish"]) == (
        "What is it? Select the correct answer from the following options. Write your answer as "
        "only one of A, B, C and nothing else.\n\n    A. a cat\nB. a dog\nC. a fish"
    )
