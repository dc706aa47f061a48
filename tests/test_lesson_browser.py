"""lesson/: the page of a clip in headless Chromium, on a phone and on a desktop."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser
from tiny_merv import *  # noqa: F403 (its fixtures)
from tiny_merv import QUESTIONS, TINY

from lesson import views
from lesson.__main__ import main

LAST = TINY.grid[0] - 1  # the last time step
# The step that the page names, and the steps whose images stand on the stage.
NUMBER = "document.getElementById('number').value"
STAGE = """[...document.querySelectorAll('#stage img')].map((image, i) =>
    [...document.querySelectorAll('.strip')[i].children].map(c => c.src).indexOf(image.src))"""
pytestmark = pytest.mark.slow


@pytest.fixture
def page(saved, short_clip, tmp_path, monkeypatch) -> Path:
    """The page of a tiny random model, with a question longer than a phone is wide."""
    monkeypatch.setattr(views, "LONGEST", 4)
    file = tmp_path / "page.html"
    main(["page", str(saved), str(short_clip), *QUESTIONS, "w" * 90, "--output", str(file)])
    return file


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_renders_and_is_worked_by_keyboard(page, width, tmp_path):
    """No console message, nothing to scroll sideways, every image decodes, arrow keys move it."""
    with Browser(tmp_path / "profile", width) as browser:
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") <= width
        assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.ask("document.images.length") > 10 * TINY.grid[0]
        browser.press("Tab")
        assert browser.ask("document.activeElement.id") == "step", "Tab leads to the slider"
        assert browser.ask(NUMBER) == "0"
        for key, step in (("ArrowRight", 1), ("End", LAST), ("ArrowLeft", LAST - 1), ("Home", 0)):
            browser.press(key)
            assert browser.ask(NUMBER) == str(step), key
            # Features differ from step to step, so an image of another step would be noticed.
            shown = browser.ask(STAGE)
            assert shown[0] == step and step in shown[1:], key
        assert browser.troubles == []


def test_the_page_can_be_read_without_script(page, tmp_path):
    """The slider is hidden then, and every step of every encoder stands on the page anyway."""
    with Browser(tmp_path / "profile", 400) as browser:
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(page)
        assert browser.ask("document.getElementById('slide').offsetHeight") == 0
        wide = "[...document.querySelectorAll('.strip img')].filter(i => i.offsetWidth > 40).length"
        assert browser.ask(wide) == TINY.grid[0] * (1 + 2 * len(TINY.encoders) + len(QUESTIONS) + 1)
        assert browser.ask("document.documentElement.scrollWidth") <= 400
