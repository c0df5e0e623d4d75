"""A real browser (headless Chromium) that is driven as a person drives it: keys, mouse, downloads, screenshots.

It speaks the DevTools protocol through a pipe: messages are JSON, each ended by a zero byte, on file descriptors 3 and 4 of
the browser. Nothing beside the browser is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser (chromium)")

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--remote-debugging-pipe",
    "--disable-quic",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-angle=swiftshader",  # WebGL without a graphics card
    "--enable-unsafe-swiftshader",
)
_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}
_PATIENCE = 60


class Browser:
    """``with Browser(folder) as browser: browser.open(path)``, then keys, clicks and questions.

    ``requests`` are the addresses that the page asked for, and ``complaints`` what stood in its console, or was thrown.
    Downloads lie in ``folder / "downloads"``.
    """

    def __init__(self, folder: Path, width: int = 1100, height: int = 900, scripts: bool = True) -> None:
        self.folder, self.size, self.scripts = folder, (width, height), scripts
        self.downloads = folder / "downloads"
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._last, self._waiting, self._loaded = 0, b"", 0
        self._session: str | None = None

    def __enter__(self) -> Browser:
        self.downloads.mkdir(parents=True, exist_ok=True)
        theirs, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [BROWSER, *_FLAGS, f"--user-data-dir={self.folder / 'profile'}", "about:blank"]
        # The browser reads from descriptor 3 and writes to 4; a shell puts ours there, wherever they are.
        script = f'exec "$@" 3<&{theirs} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", *map(str, command)],
            pass_fds=(theirs, theirs_out),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(theirs_out)
        width, height = self.size
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.call("Emulation.setScriptExecutionDisabled", value=not self.scripts)
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        return self

    def __exit__(self, *_error: object) -> None:
        # Asked to close, it writes what pages keep; a signal may come before that.
        with contextlib.suppress(OSError):
            os.write(self._out, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
        os.close(self._out)
        os.close(self._in)

    # -- what a person does ----------------------------------------------------------------------------------------

    def open(self, page: Path | str) -> None:
        """Open a file or address and wait until it is loaded."""
        before = self._loaded
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self.wait(lambda: self._loaded > before, "the page to load")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other: ``o``, ``?``, ``ArrowLeft``."""
        for key in keys:
            code = _CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
            about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code}
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Click the first element that fits, at these fractions of its width and height, once it is in view."""
        found = json.dumps(selector)
        box = self.ask(
            f"""(async () => {{
            const frame = () => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
            const element = document.querySelector({found});
            let last = "";
            for (let tries = 0; tries < 100; tries++) {{
                let box = element.getBoundingClientRect();
                if (box.top < 0 || box.bottom > innerHeight) element.scrollIntoView({{ block: "center" }});
                await frame(); // what comes into view may be built only now, and move the others
                box = element.getBoundingClientRect();
                const now = [box.left, box.top, box.width, box.height];
                if (now.join() === last) return now;
                last = now.join();
            }}
            throw new Error("it never lies still");
        }})()"""
        )
        point = {"x": box[0] + box[2] * across, "y": box[1] + box[3] * down, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **point)
        self.call("Input.dispatchMouseEvent", type="mousePressed", **point)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **point)

    def downloaded(self, name: str) -> str:
        """The text of a download, once it is there; it is taken away, so that the next one is another."""
        path = self.downloads / name
        self.wait(path.is_file, f"the download {name}")
        text = path.read_bytes().decode("utf-8")
        path.unlink()
        return text

    # -- what a person sees ------------------------------------------------------------------------------------------

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page; a promise's once it is there."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        self.wait(lambda: bool(self.ask(expression)), expression)

    def screenshot(self, path: Path) -> Path:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path

    @property
    def from_network(self) -> list[str]:
        """Requests other than for the page itself and what is inside it."""
        return [address for address in self.requests if not address.startswith(("file:", "data:", "blob:", "about:"))]

    # -- the protocol ------------------------------------------------------------------------------------------------

    def wait(self, condition: Any, what: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}; console: {self.complaints}"
            self._read(0.1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end, number = time.monotonic() + _PATIENCE, self._last
        while time.monotonic() < end:
            for answer in self._read(1.0):
                if answer.get("id") == number:
                    assert "error" not in answer, (method, answer["error"])
                    return dict(answer["result"])
        raise AssertionError(f"no answer to {method}")

    def _read(self, patience: float) -> list[dict[str, Any]]:
        """Messages that have come; events among them are noted."""
        if not select.select([self._in], [], [], patience)[0]:
            return []
        self._waiting += os.read(self._in, 1 << 20)
        *whole, self._waiting = self._waiting.split(b"\0")
        messages = [json.loads(part) for part in whole]
        for message in messages:
            self._note(message.get("method"), message.get("params", {}))
        return messages

    def _note(self, method: str | None, about: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.complaints.append(str(details.get("exception", {}).get("description", details["text"])))
        elif method == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
