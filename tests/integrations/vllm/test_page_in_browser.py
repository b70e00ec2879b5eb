"""The page for operators in a real browser, on the real server."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.integrations.conftest import API_KEY, CANARY
from tests.integrations.vllm.browsing import Line, Screen, chromium
from tests.integrations.vllm.test_endpoint import CAPITAL, QUESTION
from tests.integrations.vllm.test_operators import samples
from ultraedit_kernels import EditDelta

pytestmark = pytest.mark.vllm

FRANCE = "The capital of France is"
COMPARE = "return (await import('/v1/edits/ui/diff.js')).compare(...given)"
READ = "return (await import('/v1/edits/ui/form.js')).read()"
TRICKS = [
    "<img src=x onerror='document.title=1'><script>document.title=1</script>",
    "</textarea></template><style>*{display:none}</style>&lt;b&gt; &amp; ]]> <!--",
    "javascript:document.title=1 ${1+1} {{7*7}} '\";--",
    "עיר הבירה של אוסטרליה היא \u202edlrow\u202c مرحبا بالعالم",
    "zero\u200bwidth \u0000\u0007\u001b[31m\u00ad\u2066isolated\u2069 \ufeff tab\tline\nline",
    "👩‍👩‍👧‍👦 e\u0301 ﷽ 𝒳 中文没有空格 ไทย",
    "long" * 5000,
    "",
    "   ",
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def screen(server: Any, driver: Any) -> Iterator[Screen]:
    """The page, connected, at version 0."""
    driver.set_window_size(1280, 1000)
    screen = Screen(driver, server.url).open(API_KEY)
    yield screen
    unwell = [m for m in screen.messages() if "status of 4" not in m and "ERR_CONNECTION" not in m]
    driver.get("about:blank")
    assert not unwell, "the browser complains, of the policy or of a fault"


def fill(screen: Screen, locality: str = "", **edit: str) -> None:
    for name, text in ({**CAPITAL, **edit} | {"locality": locality}).items():
        screen.type(name, text)


def do(screen: Screen, what: str, says: str) -> None:
    """Press one of the form's buttons and wait for the result."""
    screen.click(f'#form button[value="{what}"]')
    screen.wait_for("#result-heading", says)


def versions(server: Any) -> list[int]:
    return [entry["version"] for entry in server.client.get("/v1/edits").json()["data"]]


# The key


def test_the_page_comes_without_a_key_and_its_data_do_not(server: Any, driver: Any) -> None:
    refused = samples(server.client).get('ultraedit_failures_total{reason="unauthorized"}', 0)
    assert httpx.get(f"{server.url}/v1/edits/ui").status_code == 200
    screen = Screen(driver, server.url).open()
    screen.wait(lambda: screen.focus == "key")
    assert not screen.find("#main").is_displayed()
    assert screen.messages() == []
    after = samples(server.client).get('ultraedit_failures_total{reason="unauthorized"}', 0)
    assert after == refused, "it asks for nothing before it has a key"
    for path in ("", "/health", "/1", "/1/delta", "/ui/other", "/uiother"):
        assert httpx.get(f"{server.url}/v1/edits{path}").status_code == 401


def test_a_wrong_key_is_told_and_another_one_is_taken(server: Any, driver: Any) -> None:
    screen = Screen(driver, server.url).open()
    for wrong, told in (
        ("wrong", "the key is not known, expected the server's API key"),
        ("", "no key was sent"),
        ("schlüssel – 鍵", "has characters that no key can have"),
    ):
        screen.enter(wrong)
        screen.wait_for("#key-problem", told)
        assert screen.focus == "key" and not screen.find("#main").is_displayed()
    screen.enter(API_KEY)
    screen.wait_for("#served", "Serving version 0")
    assert not screen.find("#key-section").is_displayed()
    assert screen.focus == "form-heading"
    stored = screen.run("return [{...sessionStorage}, {...localStorage}, document.cookie]")
    assert stored == [{"ultraedit.key": API_KEY}, {}, ""]
    assert API_KEY not in driver.current_url + driver.page_source


def test_a_key_that_expires_costs_nothing_that_was_typed(screen: Screen, server: Any) -> None:
    fill(screen)
    screen.run("sessionStorage.setItem('ultraedit.key', 'expired')")
    screen.click('#form button[value="edit"]')
    screen.wait_for("#key-problem", "The server refuses this key: the key is not known")
    assert screen.text("#served") == "Not connected"
    assert screen.run("return sessionStorage.getItem('ultraedit.key')") is None
    assert screen.value("prompt") == CAPITAL["prompt"]
    screen.enter(API_KEY)
    screen.wait_for("#served", "Serving version 0")
    do(screen, "edit", "Version 1 was made")
    assert server.answer(CAPITAL["prompt"]) == "Sydney"


def test_a_key_is_forgotten_with_what_it_showed(screen: Screen, server: Any) -> None:
    server.edit(CAPITAL)
    screen.wait_for("#versions", "Canberra")
    screen.click("#forget")
    assert screen.focus == "key" and "Canberra" not in screen.driver.page_source
    screen.driver.refresh()
    screen.wait(lambda: screen.find("#key").is_displayed())


# Editing


def test_a_dry_run_an_edit_and_the_way_back(screen: Screen, server: Any) -> None:
    fill(screen, locality=f"{FRANCE}\n\n Hamlet was written by ")
    screen.type("rephrases", "Australia's capital city is")
    do(screen, "dry-run", "Dry run: 1 of 1 edit holds. Nothing was changed.")
    assert screen.content("#result del") == ["Canberra"]
    assert screen.content("#result ins") == ["Sydney"]
    assert "Locality: 2 of 2 answers unchanged" in screen.text("#result")
    assert versions(server) == []

    do(screen, "edit", "Version 1 was made: 1 of 1 edit holds.")
    screen.wait_for("#served", "Serving version 1")
    assert server.answer("Australia's capital city is") == "Sydney"
    screen.wait_for("#versions article", "✓ 1 of 1 edit holds")
    assert screen.content("#versions del") == ["Canberra"]
    assert screen.content("#versions ins") == ["Sydney"]
    (entry,) = server.client.get("/v1/edits").json()["data"]
    assert [p["prompt"] for p in entry["answers"]["specificity"]["prompts"]] == [
        FRANCE,
        "Hamlet was written by",
    ]
    assert entry["digest"] in screen.text("#versions article")

    for leave in (lambda: screen.click("#confirm-no"), lambda: press(screen, "ESCAPE")):
        screen.click("#back-to-0")
        assert screen.focus == "confirm-no"
        assert "Version 1 is forgotten, for all users at once." in screen.text("#confirm-text")
        leave()
        screen.wait(lambda: not screen.find("#confirm").is_displayed())
        assert screen.focus == "back-to-0" and versions(server) == [1]
    screen.click("#back-to-0")
    screen.click("#confirm-yes")
    screen.wait_for("#served", "Serving version 0")
    screen.wait(lambda: screen.focus == "versions-heading")
    assert not screen.all("#versions article")
    assert server.answer(CAPITAL["prompt"]) == "Canberra"
    assert screen.value("target") == "Sydney", "the form stays"


def press(screen: Screen, *keys: str) -> None:
    from selenium.webdriver import ActionChains, Keys

    actions = ActionChains(screen.driver)
    for key in keys:
        actions.send_keys(getattr(Keys, key, key))
    actions.perform()


def test_a_chat_with_rephrases_beside_a_text(screen: Screen, server: Any) -> None:
    screen.click('.edit input[value="chat"]')
    assert not screen.find('.edit [name="prompt"]').is_displayed()
    screen.type("content", QUESTION["prompt"][0]["content"])
    screen.type("target", QUESTION["target"])
    screen.type("rephrases", "Which city is Japan's capital?")
    screen.type("locality", "Which country is Nokia from?")
    screen.click("#add-edit")
    for name in ("prompt", "target"):
        screen.type(name, CAPITAL[name], edit=1)
    assert [e.text for e in screen.all(".edit > legend")] == ["Edit 1", "Edit 2"]
    do(screen, "edit", "Version 1 was made: 2 of 2 edits hold.")
    assert server.chat("Which city is Japan's capital?") == "Osaka"
    assert server.chat("Which country is Nokia from?") == "Finland"
    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    screen.wait_for("#versions", "user: What is the capital of Japan?")
    (entry,) = server.client.get("/v1/edits").json()["data"]
    (stood,) = entry["answers"]["specificity"]["prompts"]
    assert stood["prompt"] == [{"role": "user", "content": "Which country is Nokia from?"}]


def test_messages_of_a_chat_are_added_and_removed(screen: Screen) -> None:
    screen.type("prompt", "And of Japan?")
    screen.click('.edit input[value="chat"]')
    screen.click(".add-message")
    screen.find('.message [name="role"] option:nth-child(3)').click()  # system
    screen.all('.message [name="content"]')[1].send_keys("And you?")
    screen.type("rephrases", "Really?")
    (edit,) = screen.run(READ)
    assert edit["prompt"] == [
        {"role": "system", "content": "And of Japan?"},
        {"role": "user", "content": "And you?"},
    ]
    assert edit["rephrases"] == [[edit["prompt"][0], {"role": "user", "content": "Really?"}]]
    screen.click(".message .remove-message")
    (edit,) = screen.run(READ)
    assert edit["prompt"] == [{"role": "user", "content": "And you?"}]
    assert not screen.find(".message .remove-message").is_displayed()


def test_what_a_guard_stops_is_told_and_stays_in_the_form(screen: Screen, server: Any) -> None:
    fill(screen, prompt=CANARY["prompt"], target="Bergen")
    do(screen, "dry-run", "Dry run: a guard would stop this turn.")
    assert "A guard would stop this turn: canary 0" in screen.text("#result")
    screen.click('#form button[value="edit"]')
    screen.wait_for("#form-problem", "the turn was rejected, nothing is changed: canary 0")
    assert screen.focus == "form-problem" and screen.value("target") == "Bergen"
    assert versions(server) == []
    screen.click("#clear")
    fill(screen, target=" ")
    screen.click('#form button[value="edit"]')
    screen.wait_for("#form-problem", "edits[0]: target")
    assert not screen.find("#pending").is_displayed()


def test_a_field_that_is_missing_is_asked_for_by_the_browser(screen: Screen, server: Any) -> None:
    screen.type("prompt", CAPITAL["prompt"])
    screen.click('#form button[value="edit"]')
    active = screen.driver.switch_to.active_element
    assert active.get_attribute("name") == "target"
    assert versions(server) == []


def test_the_form_is_kept_over_a_reload(screen: Screen) -> None:
    fill(screen, locality=FRANCE)
    screen.click("#add-edit")
    screen.all('.edit input[value="chat"]')[1].click()
    screen.type("content", "What?", edit=1)
    space(screen, "no")
    before = screen.run(READ)
    screen.driver.refresh()
    screen.wait(lambda: len(screen.all(".edit")) == 2)
    assert screen.run(READ) == before


def space(screen: Screen, value: str) -> None:
    screen.find(f'.edit [name="space"] option[value="{value}"]').click()


@pytest.mark.parametrize(("value", "sent"), [("yes", True), ("no", False), ("", None)])
def test_the_operator_says_whether_a_space_joins_a_text_and_its_target(
    screen: Screen, value: str, sent: bool | None
) -> None:
    fill(screen)
    space(screen, value)
    (edit,) = screen.run(READ)
    assert edit.get("space") is sent
    screen.click('.edit input[value="chat"]')
    assert not screen.find('.edit [name="space"]').is_displayed()
    assert "space" not in screen.run(READ)[0]


def test_what_is_said_of_the_space_is_what_is_taught(screen: Screen, server: Any) -> None:
    fill(screen, target="Sydney")
    space(screen, "no")
    do(screen, "edit", "Version 1 was made")
    assert server.complete(CAPITAL["prompt"])["text"] == "Sydney"


# Delta files


def choose(screen: Screen, file: Any) -> None:
    screen.find("#delta-file").send_keys(str(file))


def test_a_delta_file_is_tried_and_applied_once(screen: Screen, server: Any, tmp_path: Any) -> None:
    server.edit(CAPITAL)
    file, digest = tmp_path / "turn.safetensors", server.client.get("/v1/edits/1").json()["digest"]
    file.write_bytes(server.client.get("/v1/edits/1/delta").content)
    server.rollback(0)
    choose(screen, file)
    screen.click('#delta-form button[value="dry-run"]')
    screen.wait_for("#delta-result", f"it passes, and the weights would have digest {digest}")
    assert versions(server) == [] and server.answer(CAPITAL["prompt"]) == "Canberra"
    narrow = {"width": 320, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    screen.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    assert screen.run("return document.documentElement.scrollWidth") <= 320
    screen.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    for told in ("Version 1 was made.", "It was applied before, as version 1."):
        screen.click('#delta-form button[value="apply"]')
        screen.wait_for("#delta-result", told)
        assert screen.content("#said") == [told]
    screen.wait_for("#served", "Serving version 1")
    screen.wait_for("#versions", "Version 1")
    assert versions(server) == [1] and server.answer(CAPITAL["prompt"]) == "Sydney"


def test_a_file_that_is_no_delta_or_is_rejected_is_told(
    screen: Screen, server: Any, tmp_path: Any
) -> None:
    server.edit(CAPITAL)
    delta = EditDelta.from_bytes(server.client.get("/v1/edits/1/delta").content)
    server.rollback(0)
    foreign = EditDelta(delta.factors, dict.fromkeys(delta.base, "0" * 64), delta.settings)
    huge = EditDelta(
        {n: replace(f, coeff=f.coeff * 1e4) for n, f in delta.factors.items()}, delta.base
    )
    contents = {
        "truncated": (delta.to_bytes()[:-1], "may be truncated, fetch or save it again"),
        "foreign": (foreign.to_bytes(), "belongs to another checkpoint or dtype"),
        "empty": (b"", "expected a delta file and nothing else"),
        "huge": (huge.to_bytes(), "the turn was rejected"),
    }
    for name, (content, told) in contents.items():
        (tmp_path / name).write_bytes(content)
        choose(screen, tmp_path / name)
        assert not screen.find("#delta-problem").is_displayed()
        screen.click('#delta-form button[value="apply"]')
        screen.wait_for("#delta-problem-text", told)
        assert screen.focus == "delta-problem"
    assert versions(server) == [] and server.answer(CAPITAL["prompt"]) == "Canberra"


# While things happen


@contextmanager
def busy(server: Any, clients: int, *edits: dict[str, Any]) -> Iterator[None]:
    """Dry runs of several clients, each one after the other, while the block runs."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            server.edit(*edits, dry_run=True)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        runs = [pool.submit(run) for _ in range(clients)]
        try:
            yield
        finally:
            ended.set()
        for each in runs:
            each.result()


def test_the_page_goes_on_while_an_edit_waits(screen: Screen, server: Any) -> None:
    with busy(server, 6, CAPITAL, QUESTION):
        screen.wait(lambda: len(screen.all("#queue li")) > 2)
        assert screen.text("#queue li").startswith("dry run of 2 edits, under way")
        fill(screen)
        screen.click('#form button[value="edit"]')
        screen.wait_for("#elapsed", "Edit under way")
        screen.type("locality", "typed meanwhile")
        screen.click('#form button[value="edit"]')  # is not sent twice
        screen.wait_for("#queue", "turn of 1 edit, waiting")
    screen.wait_for("#result-heading", "Version 1 was made")
    screen.wait_for("#queue-text", "Nothing is under way.")
    assert screen.value("locality") == "typed meanwhile"
    assert versions(server) == [1]


def test_what_others_do_is_seen_and_what_is_open_stays_so(screen: Screen, server: Any) -> None:
    server.edit(CAPITAL)
    screen.wait_for("#versions", "Version 1")
    server.edit(QUESTION)
    screen.wait_for("#versions", "Version 2")
    screen.click('[data-version="1"] summary')
    screen.type("prompt", "typing")
    kept = screen.find('[data-version="1"]')
    server.edit({"prompt": "Hamlet was written by", "target": "Bill Gates"})
    screen.wait_for("#versions", "Version 3")
    assert screen.find('[data-version="1"] details').get_property("open")
    assert screen.find('[data-version="1"]') == kept
    assert screen.driver.switch_to.active_element.get_attribute("name") == "prompt"
    order = [item.get_attribute("data-version") for item in screen.all("#versions > li")]
    assert order == ["3", "2", "1"]

    # A rollback is decided on what is shown, and on nothing else.
    screen.click('[data-version="1"] article > p button')
    assert "Versions 2 to 3 are forgotten" in screen.text("#confirm-text")
    server.rollback(2)
    screen.click("#confirm-yes")
    screen.wait_for("#confirm-problem", "Meanwhile the versions have changed")
    assert versions(server) == [2, 1]
    screen.click("#confirm-no")
    screen.wait_for("#served", "Serving version 2")


def test_a_server_that_stops_is_told_and_found_again(server: Any, driver: Any) -> None:
    line = Line(urlsplit(server.url).port or 0)
    screen = Screen(driver, line.url).open(API_KEY)
    fill(screen)
    line.cut()
    screen.wait_for("#problem-text", "The server does not answer. Trying again in")
    assert screen.text("#served") == "No connection"
    screen.click('#form button[value="dry-run"]')
    screen.wait_for("#form-problem", "The server does not answer.")
    assert not screen.find("#pending").is_displayed(), "a dry run changes nothing"
    line.mend()
    screen.click("#retry")
    screen.wait(lambda: not screen.find("#problem").is_displayed())
    assert screen.value("prompt") == CAPITAL["prompt"]
    do(screen, "dry-run", "Dry run: 1 of 1 edit holds")
    line.cut()


@pytest.mark.parametrize("reload", [False, True], ids=["open", "reloaded"])
def test_an_edit_whose_answer_is_lost_is_made_once(server: Any, driver: Any, reload: bool) -> None:
    line = Line(urlsplit(server.url).port or 0)
    screen = Screen(driver, line.url).open(API_KEY)
    fill(screen)
    with busy(server, 4, QUESTION):
        screen.wait(lambda: len(screen.all("#queue li")) > 1)
        screen.click('#form button[value="edit"]')
        screen.wait_for("#queue", "turn of 1 edit, waiting")
        line.cut()
        screen.wait_for("#pending", "its answer was lost")
    line.mend()
    driver.refresh() if reload else screen.click("#retry")
    screen.wait_for("#served", "Serving version")
    screen.click("#ask-again")
    screen.wait_for("#result-heading", "Version 1 was made: 1 of 1 edit holds.")
    assert not screen.find("#pending").is_displayed()
    assert versions(server) == [1]
    line.cut()


# Showing


def test_older_versions_are_fetched_and_all_are_in_the_figures(screen: Screen, server: Any) -> None:
    server.edit({**CAPITAL, "locality": [FRANCE]})
    delta = EditDelta.from_bytes(server.client.get("/v1/edits/1/delta").content)
    for factor in delta.factors.values():
        factor.coeff.zero_()
    for _ in range(24):
        server.client.post("/v1/edits/apply", content=delta.to_bytes()).raise_for_status()
    screen.open(API_KEY)
    screen.wait(lambda: len(screen.all("#versions > li")) == 20)
    screen.click("#older")
    screen.wait(lambda: len(screen.all("#versions > li")) == 25)
    assert screen.focus == "version-5"
    assert not screen.find("#older").is_displayed()
    rows = screen.content("#plot tbody tr")
    assert len(rows) == 25
    assert rows[-1] == "1100 %100 %100 %", "hold, locality, own texts"
    assert rows[0].startswith("25––"), "a delta file has no edits"
    assert len(screen.all("#plot svg .mark.circle")) == 2  # and one in the legend
    server.edit(QUESTION)
    screen.wait(lambda: len(screen.all("#versions > li")) == 26)
    assert "a delta file" in screen.text('[data-version="25"]')


def test_the_weights_are_read_back(screen: Screen, server: Any) -> None:
    screen.click("#read-back")
    digest = server.rollback(0)["digest"]
    screen.wait_for("#ranks", digest)
    assert [cell.text for cell in screen.all("#ranks td")] == ["0", "0", "0", digest]
    assert screen.text("#health-text") == "1 rank, which serves version 0."


def test_a_delta_is_saved_as_the_server_gives_it(
    screen: Screen, server: Any, tmp_path: Any
) -> None:
    server.edit(CAPITAL)
    screen.wait_for("#versions", "Version 1")
    command = {"behavior": "allow", "downloadPath": str(tmp_path)}
    screen.driver.execute_cdp_cmd("Browser.setDownloadBehavior", command)
    screen.click("#versions article > p button")
    file = tmp_path / "ultraedit-000001.safetensors"
    screen.wait(file.exists)
    delta = server.client.get("/v1/edits/1/delta").content
    saved, given = EditDelta.from_bytes(file.read_bytes()), EditDelta.from_bytes(delta)
    assert saved.metadata() == given.metadata()
    assert all(t.equal(given.tensors()[name]) for name, t in saved.tensors().items())


def test_texts_that_would_be_markup_are_texts(screen: Screen, server: Any) -> None:
    hostile = {"prompt": f"{TRICKS[0]} \u202e\u202c{CAPITAL['prompt']}", "target": "Sydney"}
    report = server.edit({**hostile, "locality": [TRICKS[1]]})
    screen.wait_for("#versions", "Version 1")
    screen.click("#versions details details summary")
    told = screen.content("#versions dd .text")
    assert told[:2] == [hostile["prompt"], hostile["target"]]
    assert {report["edits"][0]["after"], TRICKS[1]} <= set(told)
    assert screen.all("#versions img, #versions script, #versions style, #versions dd b") == []
    assert screen.content("#versions .unseen")[:2] == ["\u202e", "\u202c"]
    assert screen.driver.title.startswith("Version 1")


def test_any_text_is_shown_as_it_is(screen: Screen) -> None:
    """All of it, in elements that say nothing; the differences too."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    text = st.text(max_size=60) | st.sampled_from(TRICKS) | st.text("ab \n<&\u202e", max_size=30)
    show = """
        const {shown, difference} = await import('/v1/edits/ui/view.js');
        const {compare} = await import('/v1/edits/ui/diff.js');
        return given[0].map(([before, after]) => {
          const box = shown(before);
          const [left, right] = difference(before, after).map((one) => one.textContent);
          const runs = compare(before, after);
          const same = (list) => list.filter((run) => run.same).map((run) => run.text).join("");
          const tags = [box, ...box.querySelectorAll("*")].map((one) => one.localName);
          return [box.textContent, left, right, same(runs.before), same(runs.after), tags];
        });"""

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(text, text), min_size=1, max_size=20))
    def check(pairs: list[tuple[str, str]]) -> None:
        for (before, after), found in zip(pairs, screen.run(show, pairs), strict=True):
            whole, left, right, same_before, same_after, tags = found
            assert whole == before
            assert left == (before or "nothing") and right == (after or "nothing")
            assert "".join(same_before.split()) == "".join(same_after.split())
            assert set(tags) <= {"span", "bdi"}

    check()


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        (" Canberra", " Sydney", ["Canberra"], ["Sydney"]),
        ("the old king of Spain", "the new queen of Spain", ["old king"], ["new queen"]),
        ("a b c", "a b c", [], []),
        ("a c", "a b c", [], ["b "]),
        ("", "new", [], ["new"]),
        ("word", "words", ["word"], ["words"]),
    ],
)
def test_the_difference_is_that_of_words(
    screen: Screen, before: str, after: str, gone: list[str], new: list[str]
) -> None:
    runs = screen.run(COMPARE, before, after)
    assert [run["text"] for run in runs["before"] if not run["same"]] == gone
    assert [run["text"] for run in runs["after"] if not run["same"]] == new


def test_texts_of_many_words_do_not_stop_the_page(screen: Screen) -> None:
    before, after = ("a b " * 20_000).strip(), ("c d " * 20_000).strip()
    begun = time.monotonic()
    runs = screen.run(COMPARE, before, after)
    assert runs["before"] == [{"text": before, "same": False}]
    assert time.monotonic() - begun < 10


# For everybody


def test_all_is_done_with_the_keyboard(server: Any, driver: Any) -> None:
    screen = Screen(driver, server.url).open()
    screen.wait(lambda: screen.focus == "key")
    press(screen, API_KEY, "ENTER")
    screen.wait(lambda: screen.focus == "form-heading")
    press(screen, "TAB", "TAB", CAPITAL["prompt"], "TAB", CAPITAL["target"])
    for _ in range(5):  # rephrases, locality, space, another edit, dry run
        press(screen, "TAB")
    press(screen, "TAB", "ENTER")
    screen.wait_for("#result-heading", "Version 1 was made")
    assert screen.content("#said") == ["Version 1 was made: 1 of 1 edit holds."]
    screen.wait(lambda: screen.find("#back-to-0").is_displayed())
    for _ in range(20):
        if screen.focus == "back-to-0":
            break
        press(screen, "TAB")
    press(screen, "ENTER")
    press(screen, "TAB", "ENTER")
    screen.wait_for("#served", "Serving version 0")
    assert versions(server) == []


def test_a_screen_reader_finds_names_headings_and_landmarks(screen: Screen, server: Any) -> None:
    server.edit({**CAPITAL, "locality": [FRANCE]})
    screen.wait_for("#versions", "Version 1")
    screen.click("#add-edit")
    nodes = screen.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and "role" in node
    ]
    operated = {"button", "textbox", "radio", "link", "image", "DisclosureTriangle"}
    roles = [role for role, _ in seen]
    assert operated <= set(roles)
    assert not [role for role, name in seen if role in operated and not name.strip()]
    for landmark in ("main", "banner", "contentinfo", "status"):
        assert roles.count(landmark) == 1, landmark
    headings = [name for role, name in seen if role == "heading"]
    assert headings[0].startswith("Edits")
    assert {"Edit", "Health", "Queue", "Versions", "Version 1"} <= set(headings)
    regions = {name for role, name in seen if role == "region"}
    assert {"Edit", "Health", "Scores over versions", "Versions"} <= regions


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_on_any_screen(
    screen: Screen, server: Any, width: int, scheme: str
) -> None:
    server.edit({**CAPITAL, "locality": [FRANCE]})
    screen.wait_for("#versions", "Version 1")
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 1000}
    screen.media(prefers_color_scheme=scheme)
    screen.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert screen.run("return document.documentElement.scrollWidth") <= width
        back = screen.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(json.loads(f"[{back[4:-1]}]")) < 3 * 64) == (scheme == "dark")
    finally:
        screen.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        screen.media()


def test_who_wants_no_motion_gets_none(screen: Screen) -> None:
    turns = """
        document.getElementById("form").setAttribute("aria-busy", "true");
        return getComputedStyle(document.getElementById("elapsed"), "::before").animationName"""
    assert screen.run(turns) == "turn"
    screen.media(prefers_reduced_motion="reduce")
    assert screen.run(turns) == "none"
    screen.media()
