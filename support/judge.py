"""Let a large language model judge open-ended answers, as the paper does with GPT-3.5 (section 4).

The judge compares each answer with the expected one. It says yes or no and gives a score, 0 to 5.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from support.benchmarks import Question
from support.cli import progress
from support.errors import DataError, UserError
from support.files import Journal
from support.records import clean, unique_keys
from support.report import read_result

JUDGE_PROMPT = """\
You grade answers to questions about a video. Compare the given answer with the correct one: they \
agree if they mean the same, whatever the wording; synonyms and paraphrases count.

Question: {text}
Correct answer: {expected}
Given answer: {answer}

Reply with one JSON object and nothing else: {{"pred": "yes" or "no", "score": a whole number from \
0 (unrelated) to 5 (the same meaning)}}. Example: {{"pred": "yes", "score": 4}}"""


# What a request asks for beside its text: room for a model that thinks first, and no randomness.
PARAMETERS = {"max_tokens": 1024, "temperature": 0}

LONGEST_OBJECT = 10_000  # characters; the object that was asked for has about thirty
FILTER_WORDS = (  # endpoints say in these words that they will not read a certain text
    "content_filter", "content filter", "content_policy", "content policy", "content management",
    "responsibleai", "moderation", "flagged", "safety system", "safety policy", "safety filter",
    "inappropriate", "prohibited_content", "exists risk",
)  # fmt: skip


class Refusal(Exception):
    """The endpoint will not judge this one answer, for example because of a content filter."""


def judge_answers(questions: list[Question], judge: Judge, folder: Path) -> dict:
    """Fill in `verdict` and `mark` of each question that has an answer.

    folder: a journal of the raw replies. A rerun only asks about answers without a reply.
    Returns what the verdicts depend on: model, prompt, URL, the dates of the replies and the
    parameters of the requests; and how many replies were strict, lenient and so on.
    """
    depends_on = {"model": judge.model, "prompt": JUDGE_PROMPT}
    journal = Journal(folder, depends_on)
    asked = {question.id: question for question in questions}
    records = {}
    for stored in journal.records():
        if not {"reply", "refusal"} & stored.values.keys():
            raise stored.wrong("reply", "the judge's reply")
        question = asked.get(stored.text("id"))
        if question is None:
            continue
        record = stored.values | {"date": stored.text("date"), "reply": stored.text("reply", "")}
        # Older records have neither the question nor the expected answer.
        text = stored.text("text", question.text)
        expected = stored.text("expected", question.expected)
        records[question.id, text, expected, stored.text("answer", "")] = record
    answered = [question for question in questions if not question.failure]
    missing = [question for question in answered if key_of(question) not in records]

    def ask(question: Question) -> None:
        record = {"id": question.id, "text": question.text, "expected": question.expected}
        record |= {"answer": question.answer, "date": date.today().isoformat()}
        try:
            record["reply"] = judge.ask(question)
        except Refusal as refusal:
            record["refusal"] = clean(str(refusal))
        else:
            if record["reply"] is None:
                return
        record["parameters"] = judge.parameters
        journal.append(record)
        records[key_of(question)] = record

    with ThreadPoolExecutor(judge.parallel) as pool:
        for _ in progress(pool.map(ask, missing), "judge", len(missing)):
            pass  # An error in `ask` is raised here, and the requests that wait are cancelled.
    replies = dict.fromkeys(("strict", "lenient", "unparsable", "refused", "no reply"), 0)
    dates = set()
    parameters = []
    for question in answered:
        record = records.get(key_of(question), {"reply": None})
        if "refusal" in record:
            question.verdict, question.mark, how = "refused", 0, "refused"
        else:
            question.verdict, question.mark, how = read_reply(record["reply"])
        replies[how] += 1
        if "date" in record:
            dates.add(record["date"])
        if "parameters" in record and record["parameters"] not in parameters:
            parameters.append(record["parameters"])
    found = {"dates": sorted(dates), "parameters": parameters, "replies": replies}
    return {**depends_on, "url": judge.url, **found}


def keep_verdicts(path: Path, settings: dict, questions: list[Question]) -> dict:
    """Take over the verdicts in an earlier result file, if it has the same answers.

    Returns the settings for the new file, with those of the judge.
    """
    earlier: list[Question] = []
    with suppress(DataError):  # a damaged file is written again
        if path.exists():
            result = read_result(path)
            earlier = result["questions"]
    if not any(question.verdict for question in earlier):
        return settings
    if list(map(key_of, earlier)) != list(map(key_of, questions)):
        print(f"{path}: answers have changed, run --judge again.")
        return settings
    for question, before in zip(questions, earlier, strict=True):
        question.verdict = before.verdict
        question.mark = before.mark
    return settings | {"judge": result["settings"].get("judge", {})}


def key_of(question: Question) -> tuple[str, str, str, str]:
    """What a verdict is about: the judge is asked again if any of these has changed."""
    return question.id, question.text, question.expected, question.answer


# ---------------------------------------------------------------------------------------- requests


def chat_url(base: str) -> str:
    """The address of the chat completions under a base URL. A path is used as it is given:

    https://api.openai.com/v1       -> https://api.openai.com/v1/chat/completions
    https://HOST/v1beta/openai/     -> https://HOST/v1beta/openai/chat/completions
    https://HOST/chat/completions   -> the same
    http://localhost:8000           -> http://localhost:8000/v1/chat/completions
    """
    fix = "give a URL like https://api.openai.com/v1."
    try:
        parts = urlsplit(base.strip())
    except ValueError as error:
        raise UserError(f"--judge is {base}.", f"{error}.", fix) from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        why = "the address of an endpoint begins with http:// or https://."
        raise UserError(f"--judge is {base}.", why, fix)
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit(parts._replace(path=path))


class Judge:
    """A model behind an OpenAI-compatible endpoint, and the parameters that it is known to accept.

    url: the base URL, see `chat_url`. parallel: requests at once. retries: attempts after the
    first one. The key comes from JUDGE_API_KEY.

    Newer models take `max_completion_tokens` in place of `max_tokens`, and no `temperature`. They
    say so with status 400; the parameter is then changed once, for all later requests.
    """

    def __init__(self, url: str, model: str, parallel: int = 8, retries: int = 6):
        # WHY "none": without a key, the client would send the user's token of the Hugging Face hub.
        key = os.environ.get("JUDGE_API_KEY", "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            why = "it has characters that no header of a request may have."
            raise UserError("JUDGE_API_KEY is not a key.", why, "copy it again.")
        self.client = InferenceClient(base_url=chat_url(url), api_key=key, timeout=60)
        self.url = url
        self.model = model
        self.parallel = parallel
        self.retries = retries
        self.parameters = dict(PARAMETERS)
        self.replied = False  # a request has been accepted
        self.lock = threading.Lock()

    def ask(self, question: Question) -> str | None:
        """The raw reply about an answer, or None if all attempts fail.

        Raises UserError at once if the endpoint rejects the request, as for a wrong key, and
        Refusal if it refuses this question only.
        """
        prompt = JUDGE_PROMPT.format(
            text=question.text, expected=question.expected, answer=question.answer
        )
        for attempt in range(self.retries + 1):
            if attempt:
                # 1, 2, 4 ... 60 s, shortened at random so that parallel requests do not all come
                # back at the same moment.
                time.sleep(min(60, 0.5 * 2**attempt) * random.uniform(0.5, 1))
            try:
                return self.request(clean(prompt))
            except Refusal:
                raise
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

    def request(self, prompt: str) -> str:
        """The reply to a prompt. Raises Refusal if this text is refused, else HfHubHTTPError."""
        messages = [{"role": "user", "content": prompt}]
        while True:
            sent = self.parameters
            try:
                reply = self.client.chat_completion(messages, model=self.model, extra_body=sent)
                break
            except HfHubHTTPError as error:
                text = error.response.text
                status = error.response.status_code
                filtered = any(word in text.lower() for word in FILTER_WORDS)
                if status in (400, 422) and not filtered and self.adapt(sent, text):
                    continue
                # An endpoint that has accepted other texts refuses this one only.
                if status in (400, 403, 413, 422) and (filtered or self.replied):
                    raise Refusal(f"status {status}: {text[:500]}") from error
                raise
        self.replied = True
        if reply.choices[0].finish_reason == "content_filter":
            raise Refusal("a content filter stopped the reply.")
        return reply.choices[0].message.content or ""

    def adapt(self, sent: dict, complaint: str) -> bool:
        """Drop or rename the parameter that the endpoint complains of. Returns whether to retry."""
        with self.lock:
            if sent is not self.parameters:
                return True  # another thread has just changed them
            changed = dict(sent)
            for name in sent:
                if re.search(rf"\b{name}\b", complaint):
                    limit = changed.pop(name)
                    if name == "max_tokens" and "max_completion_tokens" in complaint:
                        changed["max_completion_tokens"] = limit
                    print(f"judge: the model refuses {name}; now {changed}", file=sys.stderr)
                    self.parameters = changed
                    return True
            return False


# ----------------------------------------------------------------------------------------- replies


def read_reply(reply: str | None) -> tuple[str, int, str]:
    """(verdict, score, how the reply was read).

    Strict is the JSON that was asked for. Lenient is one object, written as JSON or as a Python
    dict, whose verdict is yes or no in any case and whose score is a whole number, also as text or
    with .0; text may stand around it, such as a fence or a <think> part. Nothing is guessed.

    '{"pred": "yes", "score": 4}'                            -> ("yes", 4, "strict")
    "Sure: ```json {'pred': 'Yes', 'score': '4.0'} ```"      -> ("yes", 4, "lenient")
    'I would say yes.'                                       -> ("unparsable", 0, "unparsable")
    None                                                     -> ("no reply", 0, "no reply")
    """
    if reply is None:
        return "no reply", 0, "no reply"
    try:
        found = json.loads(reply, object_pairs_hook=unique_keys)
        pred, mark = found["pred"], found["score"]
        # type(), not isinstance(): True is an int to isinstance.
        if pred in ("yes", "no") and type(mark) is int and 0 <= mark <= 5:
            return pred, mark, "strict"
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # not JSON, not an object, or without these keys: perhaps lenient
    found = find_object(re.sub(r"(?s)^.*</think>|<think>.*", "", reply))
    pred, mark = found.get("pred"), found.get("score")
    if isinstance(pred, str):
        pred = pred.strip().lower()
    if isinstance(mark, str) and re.fullmatch(r"\s*[0-5](\.0+)?\s*", mark):
        mark = float(mark)
    if pred in ("yes", "no") and type(mark) in (int, float) and mark in range(6):
        return pred, int(mark), "lenient"
    return "unparsable", 0, "unparsable"


def find_object(text: str) -> dict:
    """The one object {...} in a text, in JSON or as a Python dict; {} if there is none or several.

    literal_eval only reads literals: it calls nothing and looks up no names.
    """
    written = text[text.find("{") : text.rfind("}") + 1]
    # WHY a limit: Python may need minutes to find out that a million characters are not an object.
    if len(written) > LONGEST_OBJECT:
        return {}
    for key in ("pred", "score"):
        if len(re.findall(rf"[\"']{key}[\"']\s*:", written)) > 1:
            return {}  # it says two things
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(written)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}
