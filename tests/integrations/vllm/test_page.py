"""The page's files: what is served of them, and what must not be in them. In a browser:
test_page_in_browser."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

import httpx
from starlette.responses import PlainTextResponse

from ultraedit_kernels.integrations.vllm.page import PageFiles

FOLDER = Path(__file__).parents[3] / "integrations" / "vllm" / "ui"
FILES = sorted(FOLDER.iterdir())
behind = PlainTextResponse("behind the page")


def ask(path: str, method: str = "GET", root_path: str = "") -> httpx.Response:
    """A request without a key, with the path as it stands."""

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(PageFiles(behind), root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path)

    return asyncio.run(request())


def test_the_page_is_served_as_it_is_in_the_package() -> None:
    assert PageFiles(behind).paths == sorted(
        "/v1/edits/ui" if file.name == "index.html" else f"/v1/edits/ui/{file.name}"
        for file in FILES
    )
    assert ask("/v1/edits/ui").content == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize("path", PageFiles(behind).paths)
def test_a_file_comes_with_its_type_and_the_strictest_policy(path: str) -> None:
    response = ask(path)
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "": "text/html"}
    kind = kinds[path.rpartition(".")[2] if "." in path else ""]
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith(kind)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in response.headers["Content-Security-Policy"].split(";")
    )
    own = {"script-src", "style-src", "img-src", "connect-src"}
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert {policy.pop(name) for name in own} == {"'self'"}
    assert set(policy.values()) == {"'none'"}
    assert {"default-src", "base-uri", "form-action", "frame-ancestors"} < set(policy)


def test_head_gives_the_same_without_the_file() -> None:
    head, whole = ask("/v1/edits/ui", "HEAD"), ask("/v1/edits/ui")
    assert head.content == b"" and head.headers == whole.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_the_page_is_only_to_be_read(method: str) -> None:
    response = ask("/v1/edits/ui", method)
    assert response.status_code == 405 and response.headers["Allow"] == "GET, HEAD"
    assert "expected GET" in response.json()["error"]["message"]


def test_a_slash_too_many_leads_to_the_page() -> None:
    response = ask("/v1/edits/ui/")
    assert (response.status_code, response.headers["Location"]) == (308, "../ui")


def test_a_root_path_is_looked_through() -> None:
    assert ask("/here/v1/edits/ui", root_path="/here").headers["Content-Type"][:9] == "text/html"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/edits",
        "/v1/edits/health",
        "/v1/edits/uiother",
        "/v1/edits/ui/index.html",
        "/v1/edits/ui/page.js/",
        "/v1/edits/ui//page.js",
        "/v1/edits/ui/..%2fhealth",
        "/v1/edits/ui/%2e%2e/health",
        "/v1/edits/ui/page.py",
        "/V1/edits/ui",
        "/other/v1/edits/ui",
    ],
)
def test_everything_else_goes_on_to_the_keys(path: str) -> None:
    assert ask(path).text == "behind the page"


# What is in the files


class Parsed(HTMLParser):
    """Tags with their attributes, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline += data


def test_the_markup_has_no_script_or_style_of_its_own_and_asks_nobody_else() -> None:
    parsed = Parsed((FOLDER / "index.html").read_text())
    assert not parsed.inline.strip()
    for tag, attributes in parsed.tags:
        assert tag not in ("style", "iframe", "object", "embed", "base", "img")
        for name, value in attributes.items():
            assert name != "style" and not name.startswith("on")
            if name in ("src", "href", "action", "srcset"):
                assert value.startswith("#") or (FOLDER / value.removeprefix("ui/")).is_file()


def test_every_field_has_a_label_and_every_reference_its_element() -> None:
    text = (FOLDER / "index.html").read_text()
    parsed = Parsed(text)
    identities = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    for _, attributes in parsed.tags:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(identities)
    labelled = {attributes["for"] for tag, attributes in parsed.tags if "for" in attributes}
    wrapped = re.findall(r"<label>(?:(?!</label>).)*<(?:textarea|select|input)", text, re.DOTALL)
    fields = [a for tag, a in parsed.tags if tag in ("input", "textarea", "select")]
    assert len(fields) == len(wrapped) + len([a for a in fields if a.get("id") in labelled])
    scripts = "\n".join(file.read_text() for file in FOLDER.glob("*.js"))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', scripts)) <= set(identities)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_small_own_and_makes_no_markup_of_text(file: Path) -> None:
    text = file.read_text()
    hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text))
    assert hosts <= {"http://www.w3.org"}, "the namespace of SVG is no request"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert not re.search(r"localStorage|indexedDB|document\.cookie|console\.", text)
    assert text.count("\n") <= 450


def colours(text: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text))


def luminance(colour: str) -> float:
    """Relative, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    light, _, dark = (FOLDER / "page.css").read_text().partition("@media (prefers-color-scheme")
    table = colours(light) | (colours(dark) if scheme == "dark" else {})
    assert len(colours(dark)) == len(colours(light)), "every colour has its dark one"
    text = [(ink, back) for ink in ("ink", "soft", "good", "bad") for back in ("back", "card")]
    text += [("bad", "bad-back"), ("ink", "bad-back"), ("ink", "new-back"), ("ink", "gone-back")]
    text += [("on-main", "main"), ("main", "card"), ("card", "bad")]
    lines = [(line, "card") for line in ("hold", "local", "own", "field", "main")]
    for pairs, least in ((text, 4.5), (lines, 3)):
        for first, second in pairs:
            bright = sorted(luminance(table[name]) + 0.05 for name in (first, second))
            assert bright[1] / bright[0] >= least, f"{first} on {second}, {scheme}"
