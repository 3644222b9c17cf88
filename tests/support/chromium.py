"""A real Chromium without a window, driven over its debugging pipe: what a person would see, and at
which size.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FOUND = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip


# It reads from descriptor 3 and writes to 4, whichever numbers our ends have.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page. It is gone, with its process, at the end of the `with`.

    Attributes:
        said: What the page wrote to the console, threw, or was refused.
    """

    def __init__(self, profile: Path) -> None:
        assert FOUND is not None
        commands, answers = os.pipe(), os.pipe()
        theirs = (commands[0], answers[1])
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START, *map(str, theirs), FOUND, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in theirs:
            os.close(end)
        self._to, self._from = os.fdopen(commands[1], "wb", 0), os.fdopen(answers[0], "rb")
        self._numbers, self._session, self.said, self._events = (
            itertools.count(1),
            "",
            list[str](),
            list[str](),
        )

    def __enter__(self) -> "Browser":
        try:
            page = self.do("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.do("Target.attachToTarget", targetId=page, flatten=True)[
                "sessionId"
            ]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.do(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        # Then it is killed.
        with contextlib.suppress(OSError, AssertionError, subprocess.TimeoutExpired):
            self.do("Browser.close")
            self._process.wait(10)
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._to.close()
        self._from.close()

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, file: Path, width: int, *, dark: bool = False, script: bool = True) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.do("Emulation.setEmulatedMedia", media="screen", features=scheme)
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.do("Emulation.setScriptExecutionDisabled", value=not script)
        self._events.clear()
        self.do("Page.navigate", url=file.absolute().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path) -> None:
        """The whole page."""
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        data = bytearray()
        while (letter := self._from.read(1)) != b"\0":
            assert letter, "the browser has gone"
            data += letter
        message: dict[str, Any] = json.loads(data)
        event, parameters = message.get("method", ""), message.get("params", {})
        self._events.append(event)
        if event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(parameters))
        if event == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.said.append(f"asked for {parameters['request']['url']}")
        return message
