"""Let a large language model judge open-ended answers, as the paper does with GPT-3.5 (section 4).

The judge compares each answer with the expected one. It says yes or no and gives a score, 0 to 5.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from support.benchmarks import Question
from support.cli import progress
from support.errors import UserError
from support.files import Journal

JUDGE_PROMPT = """\
You grade answers to questions about a video. Compare the given answer with the correct one: they \
agree if they mean the same, whatever the wording; synonyms and paraphrases count.

Question: {text}
Correct answer: {expected}
Given answer: {answer}

Reply with one JSON object and nothing else: {{"pred": "yes" or "no", "score": a whole number from \
0 (unrelated) to 5 (the same meaning)}}. Example: {{"pred": "yes", "score": 4}}"""


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint. Its key comes from JUDGE_API_KEY."""

    url: str  # base URL, such as https://api.openai.com/v1
    model: str
    parallel: int = 8  # requests at once
    retries: int = 6  # attempts after the first one


def judge_answers(questions: list[Question], judge: Judge, folder: Path) -> dict:
    """Fill in `verdict` and `mark` of each question that has an answer.

    folder: a journal of the raw replies. A rerun only asks about answers without a reply.
    Returns what the verdicts depend on: model, prompt, URL and the dates of the replies.
    """
    depends_on = {"model": judge.model, "prompt": JUDGE_PROMPT}
    journal = Journal(folder, depends_on)
    records = {}
    for record in journal.records():
        key = record.text("id"), record.text("answer", "")
        records[key] = {"reply": record.values.get("reply"), "date": record.text("date")}
    answered = [question for question in questions if not question.failure]
    missing = [q for q in answered if (q.id, q.answer) not in records]
    key = os.environ.get("JUDGE_API_KEY", "none")
    client = InferenceClient(base_url=judge.url, api_key=key, timeout=60)

    def ask(question: Question) -> None:
        reply = ask_judge(question, client, judge)
        if reply is not None:
            record = {"id": question.id, "answer": question.answer, "reply": reply}
            record["date"] = date.today().isoformat()
            journal.append(record)
            records[question.id, question.answer] = record

    with ThreadPoolExecutor(judge.parallel) as pool:
        for _ in progress(pool.map(ask, missing), "judge", len(missing)):
            pass  # An error in `ask` is raised here, and the requests that wait are cancelled.
    for question in answered:
        record = records.get((question.id, question.answer), {"reply": None})
        question.verdict, question.mark = parse_verdict(record["reply"])
    dates = {record["date"] for record in records.values()}
    return {**depends_on, "url": judge.url, "dates": sorted(dates)}


def ask_judge(question: Question, client: InferenceClient, judge: Judge) -> str | None:
    """The judge's raw reply about an answer, or None if all attempts fail.

    Raises UserError at once if the endpoint rejects the request, as for a wrong key.
    """
    prompt = JUDGE_PROMPT.format(
        text=question.text, expected=question.expected, answer=question.answer
    )
    messages = [{"role": "user", "content": prompt}]
    for attempt in range(judge.retries + 1):
        if attempt:
            # 1, 2, 4 ... 60 s, shortened at random so that parallel requests do not all come back
            # at the same moment.
            time.sleep(min(60, 0.5 * 2**attempt) * random.uniform(0.5, 1))
        try:
            reply = client.chat_completion(
                messages, model=judge.model, max_tokens=64, temperature=0
            )
            return reply.choices[0].message.content or ""
        except HfHubHTTPError as error:
            status = error.response.status_code
            may_pass = status >= 500 or status in (408, 429)  # time-out, too many requests
            if not may_pass:
                what = f"The judge refuses the request: {error}"
                why = f"status {status} means that asking again would not help."
                fix = "check --judge, --judge-model and the key in JUDGE_API_KEY."
                raise UserError(what, why, fix) from error
        except Exception as error:  # time-outs, cut connections, replies that are not JSON
            print(f"judge: {type(error).__name__}: {error}", file=sys.stderr)
    return None


def parse_verdict(reply: str | None) -> tuple[str, int]:
    """Read a judge's reply strictly, without guessing.

    '{"pred": "yes", "score": 4}' -> ("yes", 4)
    'I would say yes.'            -> ("unparsable", 0)
    None                          -> ("no reply", 0)
    """
    if reply is None:
        return "no reply", 0
    try:
        verdict = json.loads(reply)
        pred = verdict["pred"]
        mark = verdict["score"]
    except (ValueError, TypeError, KeyError):  # not JSON, not an object, or without these keys
        return "unparsable", 0
    # type(), not isinstance(): True is an int to isinstance.
    if pred in ("yes", "no") and type(mark) is int and 0 <= mark <= 5:
        return pred, mark
    return "unparsable", 0
