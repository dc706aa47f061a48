"""An LLM judges open-ended answers."""

from __future__ import annotations

import json
import random
import sys
import time

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from support.benchmarks import Question
from support.errors import UserError

JUDGE_PROMPT = """\
You grade answers to questions about a video. Compare the given answer with the correct one: they \
agree if they mean the same, whatever the wording; synonyms and paraphrases count.

Question: {text}
Correct answer: {expected}
Given answer: {answer}

Reply with one JSON object and nothing else: {{"pred": "yes" or "no", "score": a whole number from \
0 (unrelated) to 5 (the same meaning)}}. Example: {{"pred": "yes", "score": 4}}"""


def parse_verdict(reply: str | None) -> tuple[str, int]:
    """A judge's reply -> ("yes" or "no", 0..5), else ("unparsable" or "no reply", 0): no guess."""
    if reply is None:
        return "no reply", 0
    try:
        pred, mark = (json.loads(reply)[key] for key in ("pred", "score"))
        fits = pred in ("yes", "no") and type(mark) is int and 0 <= mark <= 5
    except (ValueError, TypeError, KeyError):  # no JSON, no object, or without these keys
        fits = False
    return (pred, mark) if fits else ("unparsable", 0)


def ask_judge(question: Question, client: InferenceClient, config) -> str | None:
    """The raw reply, or None if there is none after some retries, each after a longer wait."""
    messages = [{"role": "user", "content": JUDGE_PROMPT.format(**vars(question))}]
    how = {"model": config.judge_model, "max_tokens": 64, "temperature": 0}
    for attempt in range(config.judge_retries + 1):
        if attempt:
            time.sleep(min(60, 0.5 * 2**attempt) * random.uniform(0.5, 1))
        try:
            return client.chat_completion(messages, **how).choices[0].message.content or ""
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):
                fix = "check --judge, --judge-model and the key in JUDGE_API_KEY."
                raise UserError(f"The judge refuses: {error}", "it always would.", fix) from error
        except Exception as error:  # time-outs, cut connections, replies that are no JSON
            print(f"judge: {type(error).__name__}: {error}", file=sys.stderr)
    return None
