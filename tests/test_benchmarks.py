"""Every benchmark of the paper, from a hand-made sample in its published layout, on real videos."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import eval
from merv import FOUR, MERVS
from miniature.world import write_world
from support import benchmarks
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


def lay_out(folder: Path, files: dict, videos: Path) -> Path:
    """Write annotations as they are published, with the videos beside them."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    (folder / "videos").symlink_to(videos)
    return folder


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
    (folder / "test_a.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "test_a.json" in done.stderr and "Traceback" not in done.stderr
