"""eval.py --report: a self-contained page that shows stored results and renders in a browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import eval
from miniature.world import write_world
from support import benchmarks, report
from support.errors import UserError

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>{{ 7 * 7 }}\"'>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with stored results of both kinds, about real clips; some text is hostile."""
    folder = tmp_path_factory.mktemp("report")
    write_world(folder / "world", {"train": 12, "test": 6})
    data = folder / "world" / "test"
    for index, run in enumerate(("first", "second")):
        for name in ("miniature-open", "miniature-mcq"):
            questions = benchmarks.load_questions(name, data)
            for number, question in enumerate(questions):
                good = (number + index) % 3 == 0
                question.answer = question.expected if good else EVIL
                heavy = [0.1, 0.2, 0.3, 0.4]
                question.mixing_weights = tuple(heavy[number % 4 :] + heavy[: number % 4])
            questions.append(
                replace(
                    questions[0],
                    id="gone",
                    video="gone",
                    answer="",
                    mixing_weights=(),
                    failure=EVIL,
                )
            )
            settings = {
                "benchmark": name, "data": str(data),
                "encoders": ["miniature-languagebind", "miniature-dinov2", "vivit", "siglip"],
            }  # fmt: skip
            path = folder / run / "eval" / f"{name}.json"
            eval.write_results(path, settings, questions, "parse")
    return folder


@pytest.fixture(scope="module")
def page(runs) -> str:
    """The report of both, made by the real command."""
    command = [sys.executable, ROOT / "eval.py", "--report", runs / "report.html"]
    command += [runs / "first", runs / "second", "--data", runs / "world" / "test"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (runs / "report.html").read_text()


def test_it_needs_neither_network_nor_script(page):
    """Everything is inside: no address but data:, no script element."""
    assert "<script" not in page
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)", page)
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "url(" not in page and "@import" not in page


def test_text_from_outside_is_only_text(page):
    """Answers, questions and reasons are escaped, and never run as a template either."""
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}&#34;&#39;&gt;" in page


def test_it_shows_what_is_stored(runs, page):
    """The numbers of both runs, each kind, each first word, failures and mixing weights."""
    for run in ("first", "second"):
        for name in ("miniature-open", "miniature-mcq"):
            result = json.loads((runs / run / "eval" / f"{name}.json").read_text())
            assert f"{100 * result['accuracy']['all']:.1f} %" in page
    for text in (
        "what happens",
        "how",
        "Questions without an answer",
        "temporal, %",
        "languagebind",
    ):
        assert text in page
    assert "Clips with the largest mixing weight of each encoder (figure 12)" in page


def test_strips_are_frames_of_the_clips(page):
    """Each embedded picture decodes and is six frames wide; a clip that is gone is said to be."""
    strips = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(strips) > 10
    for strip in strips:
        assert Image.open(io.BytesIO(base64.b64decode(strip))).size == (6 * 32, 32)


def test_the_baseline_stands_beside_each_accuracy(runs, page):
    """It depends on the questions only, so both runs share one column."""
    result = json.loads((runs / "first/eval/miniature-open.json").read_text())
    rows = eval.summarise([benchmarks.Question.from_dict(q) for q in result["questions"]])
    assert page.count("<th>baseline</th>") == 1 + 2 * 2  # the overview; two tables a benchmark
    for row in rows.values():
        assert f'<td class="number dim">{100 * row.baseline:.1f}</td>' in page


def test_mixing_weights_are_shown_by_what_the_clip_shows():
    """Means over clips with the same answer, not over questions; the distribution counts clips."""
    questions = [
        clip_question("1", "What happens?", "moves left", 0.25),
        clip_question("2", "What happens?", "moves left", 0.75),
        clip_question("3", "What happens?", "A", 1.0, options=("stays", "moves left")),
        clip_question("3", "What colour is the ring?", "red", 1.0),  # of one clip only
    ]
    content = report.mixing_by_content(questions)
    assert content["question"] == "What happens?"
    assert content["rows"] == [("moves left", 2, [0.5, 0.5]), ("stays", 1, [1.0, 0.0])]
    first, second = report.quartiles(questions)
    assert first == [0.25, 0.5, 0.75, 0.875, 1.0]
    assert second == [0.0, 0.125, 0.25, 0.5, 0.75]


def clip_question(clip: str, text: str, expected: str, share: float, **more):
    """A question about a clip of which the first of two encoders gets that share."""
    mixing_weights = (share, 1 - share)
    return benchmarks.Question(
        clip + text, clip, text, expected, mixing_weights=mixing_weights, **more
    )


def test_runs_with_the_same_name_are_told_apart(runs, tmp_path):
    """As an old and a new merv-frozen are; names that differ in capitals ended in a traceback."""
    other, capitals = tmp_path / "elsewhere" / "first", tmp_path / "First"
    for copy in (other, capitals):
        shutil.copytree(runs / "first", copy)
    paths = [runs / "first", other, capitals]
    assert report.short_names(list(map(str, paths))) == [str(runs / "first"), str(other), "First"]
    report.write_report(list(map(str, paths)), tmp_path / "report.html", eval.summarise)
    page = (tmp_path / "report.html").read_text()
    assert f"<th>{other}</th><th>First</th>" in page
    with pytest.raises(UserError, match="is a folder"):
        report.write_report([str(other)], tmp_path, eval.summarise)


def test_the_clips_of_figure_12_are_parts_of_videos(runs, tmp_path):
    """Only the first part of each video was looked at."""
    file = shutil.copytree(runs / "first", tmp_path / "run") / "eval" / "miniature-open.json"
    result = json.loads(file.read_text())
    one, *_ = [question for question in result["questions"] if question["mixing_weights"]]
    rest = [0] * (len(one["mixing_weights"]) - 1)
    cut = one | {"id": "cut", "cut": [1.0, 2.0, None], "mixing_weights": [1, *rest]}
    file.write_text(json.dumps(result | {"questions": [*result["questions"], cut]}))
    report.write_report([str(tmp_path / "run")], tmp_path / "report.html", eval.summarise)
    assert f"<small>{one['video']}: 1.00</small>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("answers", [["red"] * 20, [f"word {n}" for n in range(20)]])
def test_without_a_question_that_sorts_the_clips_only_the_distribution_is_shown(answers):
    """One answer for all clips, or more answers than a chart has room for."""
    questions = [clip_question(str(n), "What?", a, 0.5) for n, a in enumerate(answers)]
    assert report.mixing_by_content(questions) == {"question": "", "rows": []}


def test_the_page_says_that_mixing_weights_depend_on_the_clip_alone(page):
    """The miniature's clips are sorted by what happens in them."""
    assert "The mixing weights depend on the clip alone" in page
    assert "answer to “What happens?”" in page
    assert "Mixing weights by kind" not in page


def test_a_result_of_an_older_version_goes_into_a_report(tmp_path):
    """Commit 07e06b2 called the mixing weights of a question "weights"."""
    shutil.unpack_archive(ROOT / "tests/legacy/07e06b2.tar.gz", tmp_path)
    run = tmp_path / "07e06b2/runs/legacy-complete"
    stored = json.loads((run / "eval/msvd.json").read_text())["questions"]
    assert "weights" in stored[0]
    found = report.read_results(run)[0]["questions"]
    assert [list(q.mixing_weights) for q in found] == [q["weights"] for q in stored]
    report.write_report([str(run)], tmp_path / "report.html", eval.summarise)
    assert "answer to “What colour is it?”" in (tmp_path / "report.html").read_text()


def test_a_result_file_cannot_show_a_folder_that_the_user_has_not_named(runs, capsys):
    """The folder in a stranger's result file decided which pictures of this machine the page had,
    and pages are sent around."""
    run, secret, page = str(runs / "first"), runs / "world" / "test", runs / "foreign.html"
    for named in (None, runs / "world" / "train", secret / "videos"):
        report.write_report([run], page, eval.summarise, named)
        assert "data:image" not in page.read_text(), named
        assert str(secret) in capsys.readouterr().out, "it says which folder is not shown"
    report.write_report([run], page, eval.summarise, secret)
    assert "data:image" in page.read_text()


def test_a_single_run_has_a_report_too(runs):
    """No second run to compare with, no difference to show."""
    report.write_report([str(runs / "first")], runs / "one.html", eval.summarise)
    assert "(figure 6)" not in (runs / "one.html").read_text()


def test_a_run_without_results_is_explained(tmp_path):
    """Nothing is written then."""
    with pytest.raises(UserError, match="has no results"):
        report.write_report([str(tmp_path)], tmp_path / "report.html", eval.summarise)
    assert not list(tmp_path.iterdir())


PROBE = """<!doctype html><link rel="icon" href="data:,"><pre id="out">waiting</pre>
<iframe src="report.html" style="width:{width}px;height:3000px;border:0"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const pictures = [...page.images];
  document.getElementById("out").textContent = JSON.stringify({{
    wide: root.scrollWidth, room: root.clientWidth, pictures: pictures.length,
    broken: pictures.filter(p => !p.complete || !p.naturalWidth).length,
    height: root.scrollHeight, plots: page.querySelectorAll("svg.plot circle").length,
  }});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_it_renders_in_a_browser(runs, page, width, tmp_path):
    """Headless Chromium: no console errors, nothing to scroll sideways, every picture decodes."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "this test needs Chromium: apt-get install chromium (.ci/run does)"
    (runs / f"probe-{width}.html").write_text(PROBE.format(width=width))
    handler = partial(SimpleHTTPRequestHandler, directory=runs)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--window-size=1600,3200",
             "--virtual-time-budget=8000", "--dump-dom",
             f"http://127.0.0.1:{server.server_port}/probe-{width}.html"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        server.shutdown()
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout)[1]))
    assert found["wide"] <= found["room"] <= width
    assert found["pictures"] > 10 and found["broken"] == 0
    assert found["height"] > 1000 and found["plots"] == 2 * 2  # runs, sets with a temporal subset
    assert "CONSOLE" not in done.stderr
