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
    time that this answer is to be judged. `complain(body)` may refuse a request with status 400."""

    def __init__(self, reply, complain=lambda body: ""):
        self.reply, self.complain, self.counts, self.seen = reply, complain, {}, []
        self.bodies = []  # of the requests that nothing was complained about
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
        if complaint := server.complain(body):
            return self.send(400, {"error": {"message": complaint}})
        answer = prompt.split("Given answer: ")[1].splitlines()[0]
        with server.lock:
            nth = server.counts[answer] = server.counts.get(answer, 0) + 1
            server.seen.append((self.path, body["model"], self.headers["authorization"]))
            server.bodies.append(body)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        status, text = server.reply(answer, nth)
        with server.lock:
            server.busy -= 1
        if status == "cut":
            return self.connection.close()
        if status != 200:
            return self.send(status, {"error": {"message": text}})
        finish = "content_filter" if text == "FILTERED" else "stop"
        message = {"role": "assistant", "content": text}
        content = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
        self.send(status, content | {"id": "1", "created": 1, "model": "m"})

    def send(self, status, content):
        payload = json.dumps(content).encode()
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

    def start(*behaviour) -> Endpoint:
        started.append(Endpoint(*behaviour))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"pred": "yes", "score": 5}', ("yes", 5)),
        (' {"score": 0, "pred": "no"}\n', ("no", 0)),
        (None, ("no reply", 0)),
        ('{"pred": "no", "score": 6}', ("unparsable", 0)),
        ('{"pred": "no", "score": true}', ("unparsable", 0)),
        ('{"pred": "no"}', ("unparsable", 0)),
        ('["no", 1]', ("unparsable", 0)),
        ('{"pred": "no", "score": -1}', ("unparsable", 0)),
        ('{"pred": "no", "score": 4.5}', ("unparsable", 0)),
        ('{"pred": "no", "score": "4/5"}', ("unparsable", 0)),
        ('{"pred": "no", "score": 1e400}', ("unparsable", 0)),
        ('{"pred": true, "score": 4}', ("unparsable", 0)),
        ('{"pred": "yes, mostly", "score": 4}', ("unparsable", 0)),
        ('{"pred": ["yes"], "score": 4}', ("unparsable", 0)),
        ('{"verdict": {"pred": "yes", "score": 4}}', ("unparsable", 0)),
        ('{"pred": "yes", "score": 4} or {"pred": "no", "score": 1}', ("unparsable", 0)),
        ('{"pred": "yes", "score": 4}, {"pred": "no", "score": 1}', ("unparsable", 0)),
        ('<think>{"pred": "yes", "score": 4}', ("unparsable", 0)),
        ("{'pred': print('yes'), 'score': 1}", ("unparsable", 0)),
        ("{'pred': 'yes' * 2, 'score': 1}", ("unparsable", 0)),
        ('{"pred": "yes"', ("unparsable", 0)),
        ("{" * 1_000_000, ("unparsable", 0)),
        ("[" * 1_000_000, ("unparsable", 0)),
        ("<think>{" * 100_000, ("unparsable", 0)),
        ("{" + "[" * 10_000 + "}", ("unparsable", 0)),
        ("{'a': " + "-" * 10_000 + "1}", ("unparsable", 0)),
        ("__import__('os').system('true')", ("unparsable", 0)),
        ('{"pred": "yes", "pred": "no", "score": 4}', ("unparsable", 0)),
        ("{'pred': 'yes', 'score': 1, 'score': 4}", ("unparsable", 0)),
        ("{'pred': 'yes', 'score': 0x" + "f" * 5000 + "}", ("unparsable", 0)),
        ("{'pred': 0x" + "f" * 5000 + ", 'score': 4}", ("unparsable", 0)),
        ("no", ("unparsable", 0)),
        ("", ("unparsable", 0)),
    ],
)
def test_a_verdict_is_json_or_nothing(reply, verdict):
    """Never evaluated as code, never guessed at, and never "no" because it cannot be read."""
    assert judging.read_reply(reply)[:2] == verdict
    assert judging.read_reply(reply)[2] in ("strict", "unparsable", "no reply")


def test_a_reply_of_a_million_brackets_is_read():
    """It took minutes to find out that this is neither JSON nor Python."""
    assert judging.read_reply('{"p' * 300_000 + "}") == ("unparsable", 0, "unparsable")


@pytest.mark.parametrize(
    "reply",
    [
        '{"pred": "Yes", "score": 4}',
        '{"pred": " YES ", "score": 4.0}',
        '{"pred": "yes", "score": "4"}',
        '{"pred": "yes", "score": "4.0"}',
        "{'pred': 'yes', 'score': 4}",
        '```json\n{"pred": "yes", "score": 4}\n```',
        '```\n{"pred": "yes", "score": 4}\n```',
        'Here is my verdict: {"pred": "yes", "score": 4}. I hope this helps!',
        '<think>So {no}?\n{"pred": "no", "score": 0}</think>\n{"pred": "yes", "score": 4}',
        'The opening tag is in the template.</think>{"pred": "yes", "score": 4}',
        '{"pred": "yes", "score": 4, "reason": "both say {red}"} Done.',
    ],
)
def test_one_object_in_another_spelling_is_understood(reply):
    """What chat models write around or instead of the JSON that was asked for; it is counted."""
    assert judging.read_reply(reply) == ("yes", 4, "lenient")


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


def test_a_verdict_about_another_right_answer_is_not_used_again(endpoint, tmp_path):
    """Where the annotations were corrected, or the question was, the judge is asked again."""
    server = endpoint(lambda answer, nth: (200, '{"pred": "no", "score": 1}'))
    path = result_file(tmp_path, ["red"])
    judge(path, server)
    judge(path, server)
    assert server.counts == {"red": 1}
    result = json.loads(path.read_text())
    for times, field in ((2, "expected"), (3, "text")):
        result["questions"][0][field] += " now"
        path.write_text(json.dumps(result))
        judge(path, server)
        assert server.counts == {"red": times}


@pytest.mark.parametrize("key", ["", "  ", None])
def test_without_a_key_the_judge_is_sent_no_other_one(key, endpoint, tmp_path, monkeypatch):
    """The client would send the token with which the user has logged in to the Hugging Face hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("JUDGE_API_KEY", key)
    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 4}'))
    judge(result_file(tmp_path, ["red"]), server)
    assert [sent for _, _, sent in server.seen] == ["Bearer none"]


def test_a_key_that_no_header_may_have_is_explained(endpoint, tmp_path, monkeypatch):
    """Once seven attempts for each question, and no reply."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-\N{CYRILLIC SMALL LETTER KA}")
    with pytest.raises(UserError, match="JUDGE_API_KEY"):
        judge(result_file(tmp_path, ["red"]), endpoint(lambda answer, nth: (200, "")))


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


def test_the_table_counts_how_the_replies_were_read(endpoint, tmp_path, capsys):
    """Strict, lenient and unparsable replies: in the command's output, the file and the report."""
    replies = {"red": '{"pred": "yes", "score": 4}', "blue": "{'pred': 'No', 'score': 1}"}
    server = endpoint(lambda answer, nth: (200, replies.get(answer, "hm")))
    path = result_file(tmp_path, ["red", "blue", "green", "grey"])
    judge(path, server)
    counts = {"strict": 1, "lenient": 1, "unparsable": 2, "refused": 0, "no reply": 0}
    assert json.loads(path.read_text())["settings"]["judge"]["replies"] == counts
    assert f"the judge's replies: {counts}" in capsys.readouterr().out
    eval.write_report([str(tmp_path)], tmp_path / "report.html", eval.summarise)
    assert "lenient replies: 1" in (tmp_path / "report.html").read_text()


def test_without_one_readable_reply_there_is_no_accuracy(endpoint, tmp_path, capsys):
    """0.0 % would blame the answers for a judge that rambles."""
    server = endpoint(lambda answer, nth: (200, "Well."))
    path = result_file(tmp_path, ["red"])
    judge(path, server)
    assert json.loads(path.read_text())["accuracy"] == {"all": None, "colour": None}
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["colour", "-"] in rows and ["all", "-"] in rows


def test_a_model_that_refuses_parameters_is_asked_without_them(endpoint, tmp_path):
    """Each is changed once, for all requests, and the result says what was sent in the end."""
    complaints = []

    def complain(body):
        complaints.append(refuse_parameters(body))
        return complaints[-1]

    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 4}'), complain)
    path = result_file(tmp_path, [f"answer {n}" for n in range(40)])
    questions = judge(path, server, retries=0)
    assert all(questions[str(n)]["verdict"] == "yes" for n in range(40))
    assert len([text for text in complaints if text]) <= 2 * 8  # two for each of 8 threads
    parameters = json.loads(path.read_text())["settings"]["judge"]["parameters"]
    assert parameters == [{"max_completion_tokens": judging.PARAMETERS["max_tokens"]}]
    assert all(body["max_completion_tokens"] == 1024 for body in server.bodies)
    assert not any("temperature" in body for body in server.bodies)
    judge(path, endpoint(lambda answer, nth: (500, "")))  # nothing to ask: all is in the journal
    assert json.loads(path.read_text())["settings"]["judge"]["parameters"] == parameters


def refuse_parameters(body: dict) -> str:
    """What newer models of OpenAI answer."""
    if "max_tokens" in body:
        return (
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead."
        )
    if body.get("temperature") == 0:
        return "Unsupported value: 'temperature' does not support 0 with this model."
    return ""


def test_parameters_are_sent_as_they_are_where_nobody_complains(endpoint, tmp_path):
    """At the top level of the request, as the protocol says."""
    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 4}'))
    judge(result_file(tmp_path, ["red"]), server)
    assert server.bodies[0]["max_tokens"] == 1024 and server.bodies[0]["temperature"] == 0


def test_a_complaint_about_something_else_stops_the_run(endpoint, tmp_path):
    """Status 400 for the first request: the model does not exist, say."""
    server = endpoint(lambda answer, nth: (200, ""), lambda body: "no model of this name")
    with pytest.raises(UserError, match="The judge refuses"):
        judge(result_file(tmp_path, ["red", "blue"]), server)


@pytest.mark.parametrize(
    "refusal",
    [
        (400, "The response was filtered: content management policy. code: content_filter"),
        (403, "Your input was flagged by moderation."),
        (200, "FILTERED"),
        (413, "This text is too long."),
        (422, "This text cannot be processed."),
    ],
)
def test_a_refused_question_is_marked_and_the_others_are_judged(refusal, endpoint, tmp_path):
    """A content filter objects to one text. It does not count, and a rerun does not ask again."""

    def reply(answer, nth):
        return refusal if answer == "blood" else (200, '{"pred": "yes", "score": 4}')

    server = endpoint(reply)
    path = result_file(tmp_path, ["red", "blood", "blue"])
    for _ in range(2):
        eval.judge_results(path, judging.Judge(server.url, "grader", parallel=1))
        questions = {q["id"]: q for q in json.loads(path.read_text())["questions"]}
        assert [questions[str(n)]["verdict"] for n in range(3)] == ["yes", "refused", "yes"]
    result = json.loads(path.read_text())
    assert result["settings"]["judge"]["replies"]["refused"] == 1
    assert result["accuracy"]["all"] == 2 / 3  # the third is the video that cannot be read
    assert server.counts == {"red": 1, "blood": 1, "blue": 1}
    journal = (tmp_path / "eval/msvd.judge/0.jsonl").read_text()
    assert journal.count("refusal") == 1


def test_a_filter_may_refuse_the_first_question(endpoint, tmp_path):
    """Nothing has been accepted yet, so only the words tell it from a wrong model or key."""

    def reply(answer, nth):
        refusal = (400, "Input data may contain inappropriate content.")
        return refusal if answer == "blood" else (200, '{"pred": "yes", "score": 4}')

    path = result_file(tmp_path, ["blood", "red"])
    eval.judge_results(path, judging.Judge(endpoint(reply).url, "grader", parallel=1))
    verdicts = [question["verdict"] for question in json.loads(path.read_text())["questions"]]
    assert verdicts[:2] == ["refused", "yes"]


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1beta/openai/", "/v1beta/openai/chat/completions"),
        ("/api/paas/v4", "/api/paas/v4/chat/completions"),
        ("/proxy/chat/completions", "/proxy/chat/completions"),
        ("/deployments/m?api-version=1", "/deployments/m/chat/completions?api-version=1"),
    ],
)
def test_the_path_of_a_base_url_is_used_as_it_is_given(base, path, endpoint, tmp_path):
    """/v1 was once inserted after every other path, as in /v1beta/openai/v1/chat/completions."""
    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 4}'))
    url = server.url.removesuffix("/v1") + base
    eval.judge_results(result_file(tmp_path, ["red"]), judging.Judge(url, "grader"))
    assert [seen for seen, _, _ in server.seen] == [path]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "", "api.openai.com/v1", "file:///etc", "http://", "http://[bad"]
)
def test_a_judge_without_a_web_address_is_explained(url, tmp_path):
    """Once a traceback, or a model of this name at another provider."""
    with pytest.raises(UserError, match="http://"):
        eval.judge_results(result_file(tmp_path, ["red"]), judging.Judge(url, "grader"))


@pytest.mark.parametrize("line", ["{", "7", "{}", '{"id": "0", "answer": "red"}', '{"reply": "x"}'])
def test_a_damaged_line_in_the_journal_of_replies_is_named(line, endpoint, tmp_path):
    """With the remedy: the judge is asked again about this answer only."""
    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 4}'))
    path = result_file(tmp_path, ["red"])
    judge(path, server)
    with (tmp_path / "eval/msvd.judge/0.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"(?s)0\.jsonl, line 2.*Fix: delete this line"):
        judge(path, server)


def test_half_an_emoji_can_be_judged(endpoint, tmp_path):
    """An unpaired surrogate cannot be sent: six retries once ended in no reply."""
    server = endpoint(lambda answer, nth: (200, '{"pred": "yes", "score": 4}'))
    assert judge(result_file(tmp_path, ["\ud83d"]), server, retries=0)["0"]["verdict"] == "yes"
