"""A headless Chromium, driven by its own protocol over two pipes, without any other package.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
SECONDS = 60  # until an answer must have come
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio",
    "--no-first-run", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Tab": 9,
         "Home": 36, "End": 35}  # fmt: skip


class Browser:
    """One page of one browser, as a person would use it: with mouse, finger and keys.

    complaints: what the page's console had to say, errors first of all; it should be empty.
    requests: everything that was loaded.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        (own_end, self._send), (self._receive, its_end) = os.pipe(), os.pipe()
        # bash puts the pipes where Chromium expects them
        script = f'exec "$0" "$@" 3<&{own_end} 4>&{its_end}'
        flags = [*_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *flags], pass_fds=(own_end, its_end),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(own_end)
        os.close(its_end)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._send)
        os.close(self._receive)

    # ---------------------------------------------------------------------------------- protocol

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer; what happens until it comes is noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, *_ = select.select([self._receive], [], [], max(0, end - time.monotonic()))
            found = os.read(self._receive, 2**20) if ready else b""
            assert found, "Chromium has ended" if ready else f"no answer in {SECONDS} s"
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", str(details)))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{about['type']}: {about['args']}")
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    # ----------------------------------------------------------------------------------- a person

    def open(
        self, page: Path, width: int, height: int, phone: bool = False, dark: bool = False,
        address: str = "",
    ) -> None:  # fmt: skip
        """Load a file. address: the part of its own after #."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{page.as_uri()}{address and '#'}{address}")
        loaded = "document.readyState + location.protocol == 'completefile:'"
        self.wait(loaded, "the page does not load")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    def wait(self, script: str, why: str) -> Any:
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + SECONDS
        while not (found := self.run(script)):
            assert time.monotonic() < end, why
        return found

    def press(self, key: str) -> None:
        code = _KEYS[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        self.hover(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, x: float, y: float) -> None:
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def center(self, selector: str) -> tuple[float, float]:
        """Where the first match is, after it was scrolled into view."""
        found = self.run(f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            if (!node) return null;
            node.scrollIntoView({{block: "center", behavior: "instant"}});
            const area = node.getBoundingClientRect();
            return [area.left + area.width / 2, area.top + area.height / 2];
        }})()""")
        assert found, f"{selector}: not on the page"
        return tuple(found)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
