"""Every benchmark of the paper, from a hand-made sample in its published layout, on real videos."""

import copy
import csv
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_images
from PIL import Image

import eval
from merv import FOUR, MERVS
from miniature.world import write_world
from support import benchmarks, records
from support.errors import DataError, VideoError
from support.video import load_video

ROOT = Path(__file__).parent.parent
MCQ_QUESTION = {
    "question_id": "v_0", "video_name": "clip_a", "question": "what is it?",
    "options": ["a dog", "a cat"], "num_option": 2, "start": 0.2, "end": 0.7, "end_frame": None,
}  # fmt: skip
PERCEPTION = {"id": 0, "question": "what is it?", "options": ["a", "b", "c"], "answer_id": 2}
TVQA = {f"a{i}": f"answer {i}" for i in range(5)} | {
    "q": "Who?", "answer_idx": 1, "show_name": "Castle"
}  # fmt: skip
SAMPLES = {  # benchmark -> its files, one for each question its video, expected letter or words
    "msvd": (
        {"test_q.json": [{"question_id": 7, "video_name": "clip_a", "question": "who sings?"}],
         "test_a.json": [{"question_id": 7, "answer": "a man"}]},
        [("clip_a", "a man", "who", ())],
    ),
    "activitynet": (
        {"test_q.json": [{"question_id": "v_1", "video_name": "clip_a", "question": "is it red"}],
         "test_a.json": [{"question_id": "v_1", "answer": "yes", "type": 3}]},
        [("clip_a", "yes", "3", ())],
    ),
    "tvqa-as-pairs": (
        {"test_q.json": [MCQ_QUESTION],
         "test_a.json": [{"question_id": "v_0", "answer_id": 1, "answer": "a cat"}]},
        [("clip_a", "B", "what", (0.2, 0.7, None))],
    ),
    "perception": (
        {"mc_question_valid.json": {
            "clip_a": {"metadata": {}, "mc_question": [PERCEPTION | {"area": "physics"}]},
            "clip_b": {"metadata": {}, "mc_question": [PERCEPTION | {"area": "memory"}]}},
         "cut_frame_mapping_valid.json": {"clip_a": 5, "clip_b": -1}},
        [("clip_a", "C", "physics", (None, None, 5)), ("clip_b", "C", "memory", ())],
    ),
    "nextqa": (
        {"val.csv": "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
                    'clip_a,8,32,32,"why, then",3,0,CW,one,"two, or 2",three,four,five\n'
                    "clip_b,8,32,32,what next,0,6,TN,one,two,three,four,five\n"},
        [("clip_a", "D", "causal", ()), ("clip_b", "A", "temporal", ())],
    ),
    "vlep": (
        {"vlep_dev_release.jsonl": '{"example_id": 21411, "vid_name": "frames_1:00_ep", '
                                   '"ts": [0.5, 2.0], "events": ["He eats.", "He goes."], '
                                   '"answer": 1, "split": "dev"}\n'},
        [("frames_1:00_ep", "B", "all", (0.5, 2.0, None))],
    ),
    "tvqa": (
        {"tvqa_val.jsonl": "\n".join(json.dumps(TVQA | row) for row in (
            {"qid": 1, "vid_name": "frames_1:00_ep", "ts": "0.5-1.25"},
            {"qid": 2, "vid_name": "frames_1:00_ep", "ts": "nan-nan"}))},
        [("frames_1:00_ep", "B", "who", (0.5, 1.25, None)), ("frames_1:00_ep", "B", "who", ())],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two real clips, one of them in a subfolder, and a folder of frames."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_world(folder / "world", {"train": 12, "test": 2})
    source, target = folder / "world/test/videos", folder / "videos"
    (target / "1150").mkdir(parents=True)
    shutil.copy(source / "clip_000000.mp4", target / "clip_a.mp4")
    shutil.copy(source / "clip_000001.mp4", target / "1150" / "clip_b.mp4")
    (target / "frames_1:00_ep").mkdir()
    for number, frame in enumerate(load_video(target / "clip_a.mp4", 8)):
        name = target / "frames_1:00_ep" / f"{number + 1:05d}.jpg"
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(name)
    return target


@pytest.mark.parametrize("name", SAMPLES)
def test_a_benchmark_is_read_as_it_was_published(name, tmp_path, videos):
    """The right questions, letters, kinds and stretches of the clips; and the clips decode."""
    files, expected = SAMPLES[name]
    name = name.removesuffix("-as-pairs")
    folder = lay_out(tmp_path, files, videos)
    questions = benchmarks.load_questions(name, folder)
    found = [(q.video, q.expected, q.kind, q.cut) for q in questions]
    assert found == [(v, e, k, cut or (None, None, None)) for v, e, k, cut in expected]
    encoders = MERVS["miniature"].encoders
    clips = eval.Clips(questions, folder, encoders)
    assert len(clips.groups) == len({(q.video, q.cut) for q in questions})
    for number, pixels, failure in (clips[i] for i in range(len(clips.groups))):
        assert not failure, failure
        assert set(pixels) == {f"miniature-{encoder}" for encoder in FOUR}, number


def lay_out(folder: Path, files: dict, videos: Path) -> Path:
    """Write annotations as they are published, with the videos beside them."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    (folder / "videos").symlink_to(videos)
    return folder


def test_times_in_a_folder_of_frames_are_counted_at_its_rate(tmp_path, videos):
    """VLEP's frames come 3 a second: from 0.5 s to 2 s are frames 1 to 5, not the whole folder."""
    files, _ = SAMPLES["vlep"]
    folder = lay_out(tmp_path, files, videos)
    question = benchmarks.load_questions("vlep", folder)[0]
    start, end, _ = question.cut
    frames = load_video(folder / "videos" / question.video, 5, start, end, fps=3)
    every = load_video(folder / "videos" / question.video, 8)
    assert frames.equal(every[1:6])


CLASSES = [
    "Pushing something from left to right",
    *(f"Doing thing {i} to something" for i in range(9)),
]
SSV2 = {
    "labels.json": {name: str(number) for number, name in enumerate(CLASSES)},
    "validation.json": [
        {"id": "clip_a", "label": "pushing a cup from left to right",
         "template": "Pushing [something] from left to right", "placeholders": ["a cup"]},
        {"id": "clip_b", "label": "doing thing 3 to a cup",
         "template": "Doing thing 3 to [something]", "placeholders": ["a cup"]},
    ],
}  # fmt: skip


def test_something_something_becomes_questions(tmp_path, videos):
    """In words; as five options, four wrong and the same every time; the 12 temporal classes."""
    folder = lay_out(tmp_path, SSV2, videos)
    assert len(benchmarks.TEMPORAL) == 12
    words = benchmarks.load_questions("ssv2-open", folder)
    assert [q.expected for q in words] == [CLASSES[0], CLASSES[4]] and not words[0].options
    choices = benchmarks.load_questions("ssv2-mcq", folder)
    for question, answer in zip(choices, words, strict=True):
        assert len(set(question.options)) == 5 and set(question.options) <= set(CLASSES)
        assert question.options[ord(question.expected) - ord("A")] == answer.expected
    assert choices == benchmarks.load_questions("ssv2-mcq", folder)
    assert [q.video for q in benchmarks.load_questions("ssv2-temporal", folder)] == ["clip_a"]
    assert benchmarks.load_questions("ssv2-temporal", folder)[0].options == choices[0].options


def test_check_lists_what_is_missing_before_anything_runs(tmp_path, videos):
    """A missing and an undecodable video are named; the exit status says so; no model is needed."""
    rows = [
        {"question_id": n, "video_name": n, "question": "Who?"} for n in ("clip_a", "gone", "bad")
    ]
    answers = [{"question_id": row["question_id"], "answer": "me"} for row in rows]
    folder = lay_out(tmp_path, {"test_q.json": rows, "test_a.json": answers}, videos)
    (folder / "videos").unlink()
    shutil.copytree(videos, folder / "videos")
    (folder / "videos" / "bad.mp4").write_bytes(b"no video")
    command = [sys.executable, ROOT / "eval.py", "--check", "--benchmark", "msvd", "--data", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "3 questions, 2/3 videos found" in done.stdout
    assert "bad  gone:" in done.stdout and "bad  bad:" in done.stdout
    assert "1/3 clips can be decoded" in done.stdout
    # A folder whose second frame is damaged; an encoder of few frames would not look at it.
    frames = write_images(folder / "videos" / "gone", [f"{number}.png" for number in range(32)])
    (frames / "1.png").write_bytes(b"no picture")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "bad  gone:" in done.stdout and "1.png" in done.stdout
    (folder / "test_a.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "test_a.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*SAMPLES, "ssv2-mcq"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(name, tmp_path):
    """Excel and Notepad write both, and editors leave blank lines at the end."""
    benchmark, values = published(name)
    write_published(tmp_path, values)
    expected = benchmarks.load_questions(benchmark, tmp_path)
    for file in values:
        text = (tmp_path / file).read_bytes().decode().replace("\r\n", "\n") + "\n\n"
        (tmp_path / file).write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    assert benchmarks.load_questions(benchmark, tmp_path) == expected


def published(name: str) -> tuple[str, dict[str, object]]:
    """A benchmark's --benchmark and its sample files as Python values: lists, objects, rows."""
    files, _ = (SSV2, ()) if name.startswith("ssv2") else SAMPLES[name]
    values = {}
    for file, content in files.items():
        if file.endswith(".csv"):
            content = list(csv.DictReader(io.StringIO(content)))
        elif file.endswith(".jsonl"):
            content = [json.loads(line) for line in content.split("\n") if line]
        values[file] = copy.deepcopy(content)
    return name.removesuffix("-as-pairs"), values


def write_published(folder: Path, values: dict[str, object]) -> None:
    """Write such values in the format that the name of the file says."""
    for file, content in values.items():
        text = json.dumps(content)
        if file.endswith(".csv"):
            table = io.StringIO()
            writer = csv.DictWriter(table, content[0].keys())
            writer.writeheader()
            writer.writerows(content)
            text = table.getvalue()
        elif file.endswith(".jsonl"):
            text = "\n".join(json.dumps(row) for row in content)
        (folder / file).write_bytes(text.encode(errors="surrogatepass"))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1e"])
def test_json_lines_end_at_newlines_only(separator, tmp_path):
    """str.splitlines also cuts a line at U+2028, which JSON allows inside a text."""
    _, values = published("tvqa")
    rows = [row | {"q": f"Who{separator}is it?"} for row in values["tvqa_val.jsonl"]]
    lines = "\n".join(json.dumps(row, ensure_ascii=separator < " ") for row in rows)
    (tmp_path / "tvqa_val.jsonl").write_text(lines, encoding="utf-8")
    texts = [question.text for question in benchmarks.load_questions("tvqa", tmp_path)]
    assert texts == [f"Who{separator}is it?"] * 2


NAMES = {  # file and field: the fields that hold a name, an id or an answer in each layout
    "msvd": ("test_q.json", "video_name"),
    "nextqa": ("val.csv", "video"),
    "vlep": ("vlep_dev_release.jsonl", "vid_name"),
    "tvqa": ("tvqa_val.jsonl", "vid_name"),
    "ssv2-open": ("validation.json", "id"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [4010069381, 4010069381.0, "4010069381"])
def test_a_video_name_may_be_a_number(name, value, tmp_path):
    """Spreadsheets turn 4010069381 into a number, with gaps in the column even into a float."""
    benchmark, values = published(name)
    file, field = NAMES[name]
    values[file] = values[file][:1]
    values[file][0][field] = int(value) if file.endswith(".csv") else value
    write_published(tmp_path, values)
    assert benchmarks.load_questions(benchmark, tmp_path)[0].video == "4010069381"


def test_times_and_frames_may_be_texts(tmp_path):
    """ "12.5" is a time and "120" a frame; null, NaN and "" are no times."""
    _, values = published("tvqa-as-pairs")
    for start, end, frame, cut in (
        ("12.5", " 20 ", "120", (12.5, 20, 120)),
        (0, 1e1, 120.0, (0, 10, 120)),
        (None, math.nan, "", (None, None, None)),
        ("nan", "None", -1, (None, None, None)),
    ):
        values["test_q.json"][0] |= {"start": start, "end": end, "end_frame": frame}
        write_published(tmp_path, values)
        assert benchmarks.load_questions("tvqa", tmp_path)[0].cut == cut


@pytest.mark.parametrize("name", ["vlep", "tvqa"])
@pytest.mark.parametrize(
    ("times", "cut"),
    [
        ([0.5, 2], (0.5, 2, None)),
        (["0.5", "2"], (0.5, 2, None)),
        ("0.5-2.0", (0.5, 2, None)),
        ("0.5 - 2", (0.5, 2, None)),
        ("nan-nan", benchmarks.WHOLE),
        ([None, math.nan], benchmarks.WHOLE),
        (None, benchmarks.WHOLE),
        ("0.5", DataError),
        ("0.5-1-2", DataError),
        ("1_0-2", DataError),
        ("a-b", DataError),
        ([1], DataError),
        ([1, math.inf], DataError),
        ([1, 10**400], DataError),
        ([True, 2], DataError),
        ({"start": 1}, DataError),
    ],
)
def test_a_span_is_two_times_or_none(name, times, cut, tmp_path):
    """VLEP writes [0.5, 2.0] and TVQA "0.5-2.0"; either is understood in both."""
    _, values = published(name)
    file = NAMES[name][0]
    values[file][0]["ts"] = times
    write_published(tmp_path, values)
    if cut is DataError:
        with pytest.raises(DataError, match=rf"(?s){file}, (example_id 21411|qid 1).*Fix: "):
            benchmarks.load_questions(name, tmp_path)
    else:
        assert benchmarks.load_questions(name, tmp_path)[0].cut == cut


def test_options_may_be_numbers(tmp_path):
    """[1, 2.0] once failed when the answers were scored, after hours of answering."""
    _, values = published("tvqa-as-pairs")
    values["test_q.json"][0]["options"] = [1, 2.0, 2.5]
    write_published(tmp_path, values)
    question = benchmarks.load_questions("tvqa", tmp_path)[0]
    assert question.options == ("1", "2", "2.5")
    assert eval.parse_letter("2", question.options) == "B"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": []}, "a text"),  # no options: an open question, whose answer is words
        ({"options": [f"option {n}" for n in range(11)]}, "has 11 options"),
        ({"options": ["a dog"]}, "has 1 options"),
        ({"options": "ab"}, "options is 'ab'"),
        ({"options": ["a dog", None]}, "options: has no 1"),
        ({"options": ["a dog", ["cat"]]}, "options: 1 is"),
        ({"answer_id": 2}, "answer_id is 2"),
        ({"answer_id": -1}, "answer_id is -1"),  # once the last letter, and always wrong
        ({"answer_id": 0.5}, "a whole number"),
        ({"answer_id": "B"}, "a number"),
        ({"answer_id": None}, "has no answer_id"),
        ({"answer_id": True}, "a number"),
        ({"video_name": None}, "has no video_name"),
        ({"video_name": math.nan}, "has no video_name"),
        ({"video_name": ["clip_a"]}, "video_name is"),
        ({"video_name": True}, "video_name is True"),
        ({"video_name": ""}, "video_name is ''"),
        ({"question": None}, "has no question"),
        ({"start": "soon"}, "start is 'soon'"),
        ({"start": math.inf}, "a finite number"),
        ({"end_frame": 1.5}, "a whole number"),
    ],
)
def test_a_field_of_the_wrong_type_is_reported_with_its_file_and_id(changes, message, tmp_path):
    """Before anything is computed, and never as a question that cannot be answered right."""
    _, values = published("tvqa-as-pairs")
    values["test_a.json"][0].pop("answer")
    for field, value in changes.items():
        file = "test_a.json" if field == "answer_id" else "test_q.json"
        values[file][0][field] = value
    write_published(tmp_path, values)
    with pytest.raises(DataError, match=r"test_[qa].json, question_id v_0") as caught:
        benchmarks.load_questions("tvqa", tmp_path)
    assert message in str(caught.value)


def test_a_set_without_questions_or_with_two_kinds_of_them_is_refused(tmp_path):
    """An empty table would follow, or letters chosen among no options."""
    _, values = published("tvqa-as-pairs")
    mixed = values["test_q.json"][0] | {"question_id": 2, "options": None}
    values["test_a.json"].append({"question_id": 2, "answer": "a cat"})
    write_published(tmp_path, values | {"test_q.json": []})
    with pytest.raises(DataError, match="no questions"):
        benchmarks.load_questions("tvqa", tmp_path)
    write_published(tmp_path, values | {"test_q.json": [values["test_q.json"][0], mixed]})
    with pytest.raises(DataError, match="only one of them has options"):
        benchmarks.load_questions("tvqa", tmp_path)


def test_two_answers_to_a_question_are_refused_unless_they_agree(tmp_path):
    """The last one once won without a word."""
    _, values = published("msvd")
    write_published(tmp_path, values | {"test_a.json": values["test_a.json"] * 2})
    assert benchmarks.load_questions("msvd", tmp_path)[0].expected == "a man"
    other = values["test_a.json"][0] | {"answer": "a woman"}
    write_published(tmp_path, values | {"test_a.json": [*values["test_a.json"], other]})
    with pytest.raises(DataError, match="question_id 7: contradicts"):
        benchmarks.load_questions("msvd", tmp_path)


@pytest.mark.parametrize("name", ["perception", "ssv2-mcq"])
def test_half_an_emoji_is_replaced_in_names_of_fields_too(name, tmp_path):
    """Some layouts have videos or classes there."""
    _, values = published(name)
    for file in ("mc_question_valid.json", "labels.json"):
        if file in values:
            values[file] = {f"{key}\ud83d": value for key, value in values[file].items()}
    write_published(tmp_path, values)
    for question in benchmarks.load_questions(name, tmp_path):
        "".join([question.id, question.video, *question.options]).encode()
        assert "\ufffd" in question.video + "".join(question.options)


@pytest.mark.parametrize(("asked", "cut"), [("clip_a", "clip_a.mp4"), ("clip_a.mp4", "clip_a")])
def test_a_cut_is_found_with_and_without_the_suffix_of_the_video(asked, cut, tmp_path):
    """Otherwise a question would be asked about the whole video, with the answer in sight."""
    _, values = published("perception")
    questions = values["mc_question_valid.json"]
    values["mc_question_valid.json"] = {asked: questions["clip_a"]}
    values["cut_frame_mapping_valid.json"] = {cut: 5}
    write_published(tmp_path, values)
    assert benchmarks.load_questions("perception", tmp_path)[0].cut == (None, None, 5)


def test_half_an_emoji_is_replaced(tmp_path):
    """An unpaired surrogate can be written to no file: the report failed after all answers."""
    _, values = published("msvd")
    values["test_q.json"][0]["question"] = "who is \ud83d?"
    values["test_a.json"][0]["answer"] = "\ude00"
    write_published(tmp_path, values)
    question = benchmarks.load_questions("msvd", tmp_path)[0]
    assert question.text == "who is \ufffd?" and question.expected == "\ufffd"


def test_a_long_field_of_a_table_is_read(tmp_path):
    """csv refuses more than 128 KB by default."""
    _, values = published("nextqa")
    values["val.csv"][0]["question"] = "why " * 50_000
    write_published(tmp_path, values)
    assert len(benchmarks.load_questions("nextqa", tmp_path)[0].text) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("", "is not JSON"),
        ("[{", "is not JSON"),
        ("[" + "1" * 5000 + "]", "is not JSON"),
        ("null", "is not a list"),
        ('[{"question_id": 7, "question_id": 8}]', "'question_id' stands twice"),
        ('{"questions": []}', "is not a list"),
        ("[7]", "record 1: is not an object"),
        (b"\xff\xfe[\x00]\x00", "is not UTF-8"),
        ('[{"question": "caf\xe9"}]'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_list_of_questions_is_named(text, message, tmp_path):
    """Whatever it is: cut, nested beyond Python's stack, in another encoding, something else."""
    _, values = published("msvd")
    write_published(tmp_path, values)
    (tmp_path / "test_q.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"test_q\.json") as caught:
        benchmarks.load_questions("msvd", tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("clip_a,8,32,32,why, then,3,0,CW,1,2,3,4,5", "line 2: has too many cells"),
        ('clip_a,8,32,32,"why,3,0,CW,1,2,3,4,5', "is not CSV"),  # the rest of the file
        ("clip_a,8,32,32,why,3,0,CW,1,2,3,4", "has no a4"),
        ("clip_a;8;32;32;why;3;0;CW;1;2;3;4;5", "has no"),
        ("clip_a,8,32,32,why,3,0,XW,1,2,3,4,5", "type is 'XW'"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_refused(row, message, tmp_path):
    """A comma without quotes shifts all later cells by one."""
    header = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
    (tmp_path / "val.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(DataError, match=r"val\.csv") as caught:
        benchmarks.load_questions("nextqa", tmp_path)
    assert message in str(caught.value)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    """The last one was taken in silence."""
    header = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4,answer"
    (tmp_path / "val.csv").write_text(f"{header}\nclip_a,8,32,32,why,3,0,CW,1,2,3,4,5,0\n")
    with pytest.raises(DataError, match="two columns have one name"):
        benchmarks.load_questions("nextqa", tmp_path)


NASTY = [
    None, True, 0, -1, 7, 10**30, 0.5, 3.0, math.nan, math.inf, "", " ", "7", "nan", "\ud83d", "\0",
    "\u2028", [], [[]], ["a"], ["a", "b"], {}, {"a": None}, "x" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("name", [*SAMPLES, "ssv2-mcq"])
def test_any_damaged_value_is_read_right_or_named(name, tmp_path):
    """Each value of each file is replaced by two dozen others, and left out.

    Questions with checked types follow, or an error that names the file. Never another exception.
    """
    benchmark, values = published(name)
    read = refused = 0
    for file in values:
        for place in places(values[file]):
            if file.endswith(".csv") and len(place) == 1:
                continue  # a whole row; the cells are what can be damaged
            for value in [*NASTY, KeyError]:
                damaged = copy.deepcopy(values)
                inside = damaged[file]
                for key in place[:-1]:
                    inside = inside[key]
                if value is not KeyError:
                    inside[place[-1]] = value
                elif file.endswith(".csv"):
                    continue
                else:
                    del inside[place[-1]]
                write_published(tmp_path, damaged)
                try:
                    questions = benchmarks.load_questions(benchmark, tmp_path)
                except DataError as error:
                    refused += 1
                    message = str(error)
                    assert any(file in message for file in values) or str(tmp_path) in message
                    assert len(error.args) == 3
                    message.encode()
                    continue
                read += 1
                for question in questions:
                    texts = [question.id, question.video, question.text, question.expected]
                    "".join([*texts, *question.options, question.kind]).encode()
                    assert question.video and question.expected
                    letters = benchmarks.LETTERS[: len(question.options)]
                    assert not letters or question.expected in letters
                    for time in question.cut:
                        assert time is None or math.isfinite(time)
    assert read > 20 and refused > 20


def places(value: object) -> list[tuple]:
    """The paths to everything inside a JSON value: {"a": [7]} -> ("a",), ("a", 0)."""
    found = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            found.append((key,))
            found += [(key, *rest) for rest in places(value[key])]
    return found


def test_a_file_that_is_not_there_is_named(tmp_path):
    """In each layout."""
    for name in benchmarks.BENCHMARKS:
        with pytest.raises(DataError, match="No such file"):
            benchmarks.load_questions(name, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        records.read_text(tmp_path)  # a folder


@pytest.mark.parametrize(
    "beside",
    ["v1.mp3", "v1.wav", "v1.m4a", "v1.srt", "v1.vtt", "v1.jpg", "v1.json", "v1.txt", "._v1.mp4",
     "v1.mp4.part", ".hidden/v1.mp4", "v1/1.jpg", "v1"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["", "part_1/"])
def test_only_the_video_answers_for_its_name(beside, place, tmp_path):
    """Downloads bring sound, subtitles and thumbnails; macOS hidden copies; an older run frames.

    A thumbnail beside videos in a subfolder once made the subfolder a video and hid all of them.
    """
    found = touch(tmp_path, f"{place}v1.mp4", place + beside)
    assert found.find("v1") == tmp_path / f"{place}v1.mp4"


def touch(folder: Path, *names: str) -> benchmarks.Videos:
    """Empty files of these names, and the videos among them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return benchmarks.list_videos(folder)


@pytest.mark.parametrize("name", ["v1.mp3", "v1.m4a", "v1.srt", "v1.txt", ".v1.mp4", "v1.mp4.part"])
def test_what_is_no_video_does_not_answer_alone_either(name, tmp_path):
    """A song with a cover would decode as a still."""
    with pytest.raises(VideoError, match="has no video v1"):
        touch(tmp_path, name).find("v1")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("v1.mp4", "v1.mp4"),
        ("v1.mkv", "v1.mp4"),  # converted since
        ("v1.MP4", "v1.mp4"),
        ("v1.mp4", "videos/v1.mp4"),
        ("v1.mp4", "videos\\v1"),
        ("v_abc.mp4", "abc"),
        ("abc.mp4", "v_abc"),
        ("abc.mp4", "v_abc.mp4"),
        ("v1.5.mp4", "v1.5"),
        ("v1/00001.jpg", "v1"),
        ("74225", "74225"),
        ("74225.mp4", "74225.0"),
        ("a/b/v1.webm", "b/v1"),
    ],
)
def test_a_name_may_have_a_suffix_a_folder_or_a_prefix(file, name, tmp_path):
    """As annotations write them, whatever the files are called."""
    found = touch(tmp_path, file).find(name)
    assert found == tmp_path / file or found == (tmp_path / file).parent


@pytest.mark.parametrize("second", ["v1.mkv", "b/v1.mp4"])
def test_two_videos_of_one_name_are_refused_unless_the_name_chooses(second, tmp_path):
    """One of them once answered, whichever came last."""
    found = touch(tmp_path, "a/v1.mp4", second, "v2.mp4")
    with pytest.raises(VideoError) as caught:
        found.find("v1")
    assert str(tmp_path / "a/v1.mp4") in str(caught.value)
    assert str(tmp_path / second) in str(caught.value)
    assert found.find("a/v1") == tmp_path / "a/v1.mp4"
    assert found.find(second) == tmp_path / second
    assert found.find("v2") == tmp_path / "v2.mp4"


def test_the_thumbnails_of_a_file_server_are_no_videos(tmp_path):
    """Synology keeps those of v1.mp4 in @eaDir/v1.mp4, and that folder once answered."""
    found = touch(tmp_path, "v1.mp4", "@eaDir/v1.mp4/thumb_1.jpg", "__MACOSX/v2/1.jpg")
    assert found.find("v1.mp4") == tmp_path / "v1.mp4"
    assert list(found) == ["v1"]


def test_a_link_is_not_a_second_video(tmp_path):
    """Neither a link to the file nor one to the folder, even in a circle."""
    touch(tmp_path, "a/v1.mp4")
    (tmp_path / "v1.mkv").symlink_to(tmp_path / "a/v1.mp4")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a/circle").symlink_to(tmp_path)
    assert benchmarks.list_videos(tmp_path).find("v1").samefile(tmp_path / "a/v1.mp4")
