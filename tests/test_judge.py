"""eval.py --judge, against a real HTTP endpoint that is slow, fails, throttles or rambles."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import eval
from support import benchmarks
from support import judge as judging
from support.errors import UserError

ROOT = Path(__file__).parent.parent
QUESTION = benchmarks.Question("0", "v", "What colour?", "red", "colour")


class Endpoint(ThreadingHTTPServer):
    """Speaks the chat-completions protocol; `reply(answer, nth)` gives (status, text) for the nth
    time that this answer is to be judged."""

    def __init__(self, reply):
        self.reply, self.counts, self.seen = reply, {}, []
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server, prompt = self.server, body["messages"][0]["content"]
        answer = prompt.split("Given answer: ")[1].splitlines()[0]
        with server.lock:
            nth = server.counts[answer] = server.counts.get(answer, 0) + 1
            server.seen.append((self.path, body["model"], self.headers["authorization"]))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        status, text = server.reply(answer, nth)
        with server.lock:
            server.busy -= 1
        if status == "cut":
            return self.connection.close()
        message = {"role": "assistant", "content": text}
        content = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        payload = json.dumps(content | {"id": "1", "created": 1, "model": "m"}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    """Starts endpoints and stops them."""
    started = []

    def start(reply) -> Endpoint:
        started.append(Endpoint(reply))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def result_file(folder: Path, answers: list[str]) -> Path:
    """A result as `evaluate` leaves it."""
    questions = [replace(QUESTION, id=str(n), answer=a) for n, a in enumerate(answers)]
    questions.append(replace(QUESTION, id="failed", failure="no such video"))
    path = folder / "eval" / "msvd.json"
    settings = {"benchmark": "msvd", "data": "nowhere", "encoders": ["vivit"]}
    eval.write_results(path, settings, questions, "parse")
    return path


def judge(path: Path, server: Endpoint, retries: int = 6) -> dict:
    """Judge a result file; the questions by id."""
    eval.judge_results(path, judging.Judge(server.url, "grader", retries=retries))
    return {q["id"]: q for q in json.loads(path.read_text())["questions"]}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"pred": "yes", "score": 5}', ("yes", 5)),
        (' {"score": 0, "pred": "no"}\n', ("no", 0)),
        (None, ("no reply", 0)),
        ('{"pred": "Yes", "score": 5}', ("unparsable", 0)),
        ('{"pred": "no", "score": 6}', ("unparsable", 0)),
        ('{"pred": "no", "score": true}', ("unparsable", 0)),
        ('{"pred": "no"}', ("unparsable", 0)),
        ('["no", 1]', ("unparsable", 0)),
        ("{'pred': 'no', 'score': 1}", ("unparsable", 0)),
        ("__import__('os').system('true')", ("unparsable", 0)),
        ("no", ("unparsable", 0)),
        ("", ("unparsable", 0)),
    ],
)
def test_a_verdict_is_json_or_nothing(reply, verdict):
    """Never evaluated as code, never guessed at, and never "no" because it cannot be read."""
    assert judging.parse_verdict(reply) == verdict


def test_failures_and_throttling_are_asked_again(endpoint, tmp_path, monkeypatch):
    """429, 500, a cut connection, then an answer: all end with the verdict that came at last."""
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds))
    waits, failures = [], {"red": [429, 429], "blue": [500], "green": ["cut"], "pink": []}

    def reply(answer, nth):
        if nth <= len(failures[answer]):
            return failures[answer][nth - 1], "later"
        return 200, json.dumps({"pred": "yes" if answer == "red" else "no", "score": 3})

    server = endpoint(reply)
    path = result_file(tmp_path, list(failures))
    questions = judge(path, server)
    assert [questions[str(n)]["verdict"] for n in range(4)] == ["yes", "no", "no", "no"]
    assert questions["0"]["correct"] and not questions["1"]["correct"]
    assert server.counts == {"red": 3, "blue": 2, "green": 2, "pink": 1}
    assert len(waits) == 4 and all(wait > 0 for wait in waits)
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {model for _, model, _ in server.seen} == {"grader"}


def test_what_cannot_be_read_is_counted_apart_and_kept(endpoint, tmp_path, capsys):
    """Accuracy is over yes and no; the raw reply, the model, the prompt and the date are stored."""
    replies = {"red": '{"pred": "yes", "score": 4}', "blue": "Sure! I would say no.", "green": "no"}
    server = endpoint(lambda answer, nth: (200, replies[answer]))
    path = result_file(tmp_path, list(replies))
    questions = judge(path, server)
    verdicts = {id: q["verdict"] for id, q in questions.items()}
    assert verdicts == {"0": "yes", "1": "unparsable", "2": "unparsable", "failed": ""}
    result = json.loads(path.read_text())
    assert result["accuracy"]["all"] == 1 / 2  # one yes, one video without an answer
    assert result["settings"]["judge"]["model"] == "grader"
    assert "{expected}" in result["settings"]["judge"]["prompt"]
    assert len(result["settings"]["judge"]["dates"][0]) == len("2026-01-31")
    lines = (tmp_path / "eval" / "msvd.judge" / "0.jsonl").read_text().splitlines()
    assert {json.loads(line)["reply"] for line in lines} == set(replies.values())
    assert "'unparsable': 2" in capsys.readouterr().out


def test_a_rerun_asks_only_what_has_no_reply_yet(endpoint, tmp_path, monkeypatch):
    """An endpoint that is down for one answer: the others are kept, the rerun asks that one."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    down = {"blue"}

    def reply(answer, nth):
        return (500, "") if answer in down else (200, '{"pred": "yes", "score": 5}')

    server = endpoint(reply)
    path = result_file(tmp_path, ["red", "blue"])
    assert judge(path, server, retries=2)["1"]["verdict"] == "no reply"
    assert server.counts == {"red": 1, "blue": 3}
    down.clear()
    assert judge(path, server)["1"]["verdict"] == "yes"
    assert server.counts == {"red": 1, "blue": 4}


def test_questions_are_judged_at_once(endpoint, tmp_path):
    """A slow judge is asked several questions at a time."""

    def reply(answer, nth):
        time.sleep(0.3)
        return 200, '{"pred": "no", "score": 1}'

    server = endpoint(reply)
    judge(result_file(tmp_path, [f"answer {n}" for n in range(8)]), server)
    assert server.most_busy >= 4


def test_a_refusal_is_explained_at_once(endpoint, tmp_path):
    """A wrong key or model: asking again would not help, and costs."""
    server = endpoint(lambda answer, nth: (401, "no"))
    with pytest.raises(UserError, match="The judge refuses"):
        judge(result_file(tmp_path, [f"answer {n}" for n in range(200)]), server)
    assert len(server.seen) < 100


def test_the_command_judges_the_results_of_a_run(endpoint, tmp_path):
    """`python eval.py --judge URL --judge-model NAME RUN`; the key comes from the environment."""
    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 2}'))
    result_file(tmp_path, ["crimson"])
    command = [sys.executable, ROOT / "eval.py", "--judge", server.url, "--judge-model", "grader"]
    done = subprocess.run(
        [*command, tmp_path], capture_output=True, text=True, timeout=120,
        env={"JUDGE_API_KEY": "secret", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean score 2.00 of 5" in done.stdout
    assert {key for _, _, key in server.seen} == {"Bearer secret"}
    assert "secret" not in done.stdout + done.stderr + (tmp_path / "eval/msvd.json").read_text()
