"""A headless Chromium on the page for operators, and a line to the server that can be cut."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

PROGRAMS = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver. Skips the test where there is no browser."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found = [next(filter(None, map(shutil.which, names)), None) for names in PROGRAMS]
    if None in found:
        pytest.skip("no browser: install Debian's chromium and chromium-driver, see .ci/run")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:  # Chromium has no sandbox for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(found[1])
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Screen:
    """What a person sees of the page, and does to it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, key: str | None = None) -> Screen:
        """A new tab, as far as its storage goes, with the key entered."""
        self.driver.get(f"{self.url}/v1/edits/ui")
        self.driver.execute_script("sessionStorage.clear()")
        self.messages()
        self.driver.refresh()
        if key is not None:
            self.enter(key)
            self.wait(lambda: self.find("#main").is_displayed())
        return self

    def enter(self, key: str) -> None:
        self.wait(lambda: self.find("#key").is_displayed())
        self.find("#key").send_keys(f"{key}\n")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """What is to be seen of an element."""
        return self.find(selector).text

    def content(self, selector: str) -> list[str]:
        """The text in elements, seen or not."""
        return [element.get_property("textContent") for element in self.all(selector)]

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type(self, name: str, text: str, edit: int = 0) -> None:
        """Into a field of an edit."""
        fields = self.all(f'.edit [name="{name}"]')
        fields[edit].send_keys(text)

    def value(self, name: str) -> str:
        return self.find(f'.edit [name="{name}"]').get_property("value")

    @property
    def focus(self) -> str:
        """Id of the element that has the focus."""
        return self.driver.switch_to.active_element.get_attribute("id")

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """Until something is the case; what is not there yet, or anew, is not."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while True:
            with suppress(WebDriverException):
                if found := condition():
                    return found
            assert time.monotonic() < end, f"not within {seconds} s; the page says:\n{self.page}"
            time.sleep(0.05)

    def wait_for(self, selector: str, text: str, seconds: float = 60) -> None:
        """Until an element is to be seen with a text."""
        self.wait(lambda: text in self.text(selector), seconds)

    @property
    def page(self) -> str:
        return self.text("body")

    def messages(self) -> list[str]:
        """What the browser had to complain about since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of an async function's body, with the arguments as `given`."""
        split = "const given = Array.from(arguments), done = given.pop();"
        run = f"(async () => {{{script}}})().then(done, (error) => done(`${{error}}`));"
        return self.driver.execute_async_script(split + run, *arguments)

    def media(self, **features: str) -> None:
        """What the reader prefers, such as prefers_color_scheme="dark"."""
        wanted = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


class Line:
    """A way to a local port through another one, which can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._port = 0
        self._open: list[socket.socket] = []
        self.mend()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def mend(self) -> None:
        """Listen, where it did before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
