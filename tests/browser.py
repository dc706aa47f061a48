"""Drive a headless Chromium through its debugging pipe, without another package.

Messages are JSON, each ended by a zero byte: https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

PATIENCE = 60  # seconds for one answer


class Browser:
    """One page in a browser of its own; `troubles` has its console messages and errors."""

    def __init__(self, profile: Path, width: int, height: int = 800):
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        assert program, "this test needs Chromium: apt-get install chromium (.ci/run does)"
        its_input, self.output = os.pipe()
        self.input, its_output = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
        command = ["bash", "-c", script, "bash", program, *options, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            command, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL
        )
        os.close(its_input)
        os.close(its_output)
        self.unread, self.number, self.session, self.troubles = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def read(self) -> dict:
        """The next message; a trouble of the page is noted as well."""
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.input], [], [], PATIENCE)
            assert ready, f"Chromium said nothing for {PATIENCE} s"
            more = os.read(self.input, 1 << 16)
            assert more, "Chromium has ended"
            self.unread += more
        message, self.unread = self.unread.split(b"\0", 1)
        message = json.loads(message)
        troubles = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        if message.get("method") in troubles:
            self.troubles.append(message["params"])
        return message

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the protocol and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path) -> None:
        """Load a file and wait until its images have been read."""
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression: str):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as "Tab" or "ArrowRight"."""
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=codes[key],
            )  # fmt: skip
