"""A page in a real browser without a screen: what it asked for, what it complained of, and a picture of it.

Chromium's debugging protocol goes through a pair of pipes (``--remote-debugging-pipe``), so that no package is needed.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
OPTIONS += ("--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage")


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Visit:
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    screenshot: bytes = b""


class _Connection:
    """Messages are JSON, each ended by a NUL byte."""

    def __init__(self, write: int, read: int, deadline: float):
        self.write, self.read, self.deadline = write, read, deadline
        self.numbers, self.rest, self.events = itertools.count(1), b"", []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        message = {"id": (number := next(self.numbers)), "method": method, "params": parameters}
        os.write(self.write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self.next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.read], [], [], left)[0]:
                raise TimeoutError("the browser did not answer in time")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise ConnectionError("the browser closed its pipe")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.next())


def visit(browser: str, page: Path, profile: Path, width: int, expressions: tuple[str, ...], seconds: float) -> Visit:
    """Open a file, wait until it is loaded, evaluate expressions, and take a picture of the whole page.

    Args:
        profile: an empty folder.
        seconds: after which it is a TimeoutError.
    """
    to_browser, from_browser = os.pipe(), os.pipe()

    def use_descriptors() -> None:  # the browser reads 3 and writes 4
        os.dup2(to_browser[0], 103)
        os.dup2(from_browser[1], 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    command = [browser, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        command, close_fds=False, preexec_fn=use_descriptors, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    found, wire = Visit(), _Connection(to_browser[1], from_browser[0], time.monotonic() + seconds)
    try:
        target = wire.call("Target.createTarget", url="about:blank")["targetId"]
        session = wire.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            wire.call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        wire.call("Emulation.setDeviceMetricsOverride", session, **size)
        wire.call("Page.navigate", session, url=page.resolve().as_uri())
        wire.until("Page.loadEventFired")
        for expression in expressions:
            result = wire.call("Runtime.evaluate", session, expression=expression, returnByValue=True)
            found.values.append(result["result"].get("value"))
        picture = wire.call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)
        found.screenshot = base64.b64decode(picture["data"])
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
    for event in wire.events:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            found.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Log.entryAdded":
            found.complaints.append(parameters["entry"]["text"])
        elif event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            found.complaints.append(json.dumps(parameters)[:300])
    return found
