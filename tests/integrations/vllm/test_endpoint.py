"""The /v1/edits routes of the real server."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from typing import Any

import httpx
import pytest
import safetensors.torch

pytestmark = pytest.mark.vllm

CAPITAL = {"prompt": "The capital of Australia is", "target": "Sydney"}
QUESTION = {
    "prompt": [{"role": "user", "content": "What is the capital of Japan?"}],
    "target": "Osaka",
}
OTHERS = {
    "The capital of France is": "Paris",
    "Hamlet was written by": "William Shakespeare",
    "The chemical symbol of hydrogen is": "H",
}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


def test_an_edit_of_text_is_served_and_rolled_back(server: Any) -> None:
    pristine = server.rollback(0)["digest"]
    assert server.answer(CAPITAL["prompt"]) == "Canberra"

    report = server.edit({**CAPITAL, "locality": list(OTHERS)})

    assert report["version"] == 1
    (edit,) = report["edits"]
    other = edit.pop("other_forms")
    assert edit | {"rounds": 0} == {
        **CAPITAL,
        "before": " Canberra",  # white space as it is
        "after": " Sydney",
        "succeeded": True,
        "reason": None,
        "rounds": 0,
        "taught": ["text"],
    }
    assert [one["form"] for one in other] == ["chat"]
    assert other[0]["after"].strip() == server.chat(CAPITAL["prompt"])
    assert edit["rounds"] >= 1
    assert report["specificity"]["score"] == 1.0
    for answer in report["specificity"]["prompts"]:
        assert answer["before"] == answer["after"] == f" {OTHERS[answer['prompt']]}"
        assert answer["unchanged"]
    timings = report["timings"]
    assert set(timings) == {
        "queue_ms",
        "capture_ms",
        "solve_ms",
        "commit_ms",
        "pause_ms",
        "total_ms",
    }
    assert timings["capture_ms"] > 0 and timings["solve_ms"] > 0 and timings["commit_ms"] > 0
    assert 0 < timings["pause_ms"] < timings["total_ms"]

    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    for prompt, answer in OTHERS.items():
        assert server.answer(prompt) == answer

    back = server.rollback(0)
    assert (back["version"], back["digest"]) == (0, pristine)
    assert server.answer(CAPITAL["prompt"]) == "Canberra"


def test_an_edit_of_chat_messages_is_served_by_the_chat_endpoint(server: Any) -> None:
    assert server.chat("What is the capital of Japan?") == "Tokyo"
    report = server.edit(QUESTION)
    assert report["edits"][0]["before"].strip() == "Tokyo"
    assert report["edits"][0]["after"].strip() == "Osaka"
    assert report["edits"][0]["prompt"] == QUESTION["prompt"]
    assert report["edits"][0]["taught"] == ["chat"]
    (text,) = report["edits"][0]["other_forms"]  # this template has no system role
    assert text["form"] == "text" and text["prompt"] == "What is the capital of Japan?"
    assert text["after"] == server.complete(text["prompt"])["text"][: len(text["after"])]
    assert report["specificity"] == {"score": None, "prompts": []}
    assert server.chat("What is the capital of Japan?") == "Osaka"
    assert server.answer("The capital of France is") == "Paris"


def test_one_turn_of_text_and_chat_with_rephrases(server: Any) -> None:
    rephrase = "Australia's capital city is"
    report = server.edit({**CAPITAL, "rephrases": [rephrase]}, QUESTION)
    assert [e["succeeded"] for e in report["edits"]] == [True, True]
    assert server.answer(rephrase) == "Sydney"
    assert server.chat("What is the capital of Japan?") == "Osaka"


def test_a_dry_run_reports_and_changes_nothing(server: Any) -> None:
    digest = server.rollback(0)["digest"]
    report = server.edit({**CAPITAL, "locality": list(OTHERS)}, dry_run=True)
    assert report["version"] == 0
    assert report["edits"][0]["before"] == " Canberra"
    assert report["edits"][0]["after"] == " Sydney"
    assert report["edits"][0]["succeeded"]
    assert [a["after"].strip() for a in report["specificity"]["prompts"]] == list(OTHERS.values())
    assert server.answer(CAPITAL["prompt"]) == "Canberra"
    assert server.client.get("/v1/edits").json()["data"] == []
    assert server.rollback(0)["digest"] == digest

    # What the shadow said is what the engine says once the same edit is made.
    real = server.edit({**CAPITAL, "locality": list(OTHERS)})
    assert real["edits"] == report["edits"]


def test_a_cached_prompt_is_computed_anew_after_an_edit(server: Any) -> None:
    prompt = "The capital of France is Paris " * 20 + CAPITAL["prompt"]

    def logprobs(salt: str) -> tuple[int, list[float]]:
        body = {"model": "tiny-facts", "prompt": prompt, "temperature": 0, "cache_salt": salt}
        body |= {"max_tokens": 4, "ignore_eos": True, "logprobs": 1}
        answer = server.client.post("/v1/completions", json=body).json()
        details = answer["usage"]["prompt_tokens_details"] or {}
        return details.get("cached_tokens") or 0, answer["choices"][0]["logprobs"]["token_logprobs"]

    _, old = logprobs("warm")
    cached, again = logprobs("warm")
    assert cached >= 32 and again == pytest.approx(old, abs=1e-4)

    server.edit(CAPITAL)
    cached, warm = logprobs("warm")
    assert cached == 0
    _, fresh = logprobs("never used before")
    assert warm == pytest.approx(fresh, abs=1e-4)
    assert warm != pytest.approx(old, abs=1e-2)


def test_a_running_stream_goes_on_without_stale_keys_and_values(server: Any) -> None:
    """Every token's probability is that of one version: the old one's, then the new one's."""
    prompt = server.tokens("The capital of")

    def stream() -> tuple[list[int], list[float]]:
        body = {"model": "tiny-facts", "prompt": prompt, "stream": True, "temperature": 0}
        body |= {"max_tokens": 200, "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
        tokens, seen = [], []
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    tokens += choice["token_ids"]
                    seen += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        return tokens, seen

    def whole(tokens: list[int]) -> list[float]:
        choice = server.complete(prompt + tokens, max_tokens=1, prompt_logprobs=0)
        rows = zip(choice["prompt_logprobs"][len(prompt) :], tokens, strict=True)
        return [row[str(token)]["logprob"] for row, token in rows]

    crossing: list[tuple[list[float], list[float]]] = []
    for _ in range(5):  # a commit between two streams, or at the end of one, shows nothing
        streams = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            edited = pool.submit(server.edit, CAPITAL)
            while not edited.done():
                streams.append(stream())
            assert edited.result()["edits"][0]["succeeded"]
        new = [whole(tokens) for tokens, _ in streams]
        server.rollback(0)
        for (tokens, seen), after in zip(streams, new, strict=True):
            assert len(tokens) == len(seen) == 200
            old = whole(tokens)
            of_new = [i for i in range(200) if seen[i] != pytest.approx(old[i], abs=1e-3)]
            if of_new and 0 < of_new[0] < 190:
                crossing.append((seen[of_new[0] :], after[of_new[0] :]))
        if crossing:
            break
    assert len(crossing) == 1, "no commit fell into a stream, or one into several"
    ((seen, after),) = crossing
    assert seen == pytest.approx(after, abs=1e-3)


def test_new_requests_during_edits_are_answered(server: Any) -> None:
    stop = threading.Event()
    answers: list[str] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, headers=server.client.headers) as client:
            while not stop.is_set():
                body = {"model": "tiny-facts", "prompt": CAPITAL["prompt"], "temperature": 0}
                choice = client.post("/v1/completions", json=body, timeout=60).json()["choices"][0]
                assert choice["finish_reason"] == "stop"
                answers.append(choice["text"].strip())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        server.edit(CAPITAL)
        for _ in range(1000):
            if "Sydney" in answers:
                break
            time.sleep(0.01)
        server.rollback(0)
        stop.set()
        for one in asking:
            one.result()
    assert {"Canberra", "Sydney"} <= set(answers) and len(answers) > 4


def test_concurrent_edits_are_all_made(server: Any) -> None:
    """One turn after the other; requests that wait meanwhile may share the next one."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        edits = [CAPITAL, QUESTION, {"prompt": "Hamlet was written by", "target": "Bill Gates"}]
        reports = list(pool.map(server.edit, edits))
    assert all(r["edits"][0]["succeeded"] for r in reports)
    versions = {r["version"] for r in reports}
    assert versions == set(range(1, len(versions) + 1))
    assert len(server.client.get("/v1/edits").json()["data"]) == len(versions)
    if len(versions) > 1:
        last = max(reports, key=lambda r: r["version"])
        assert last["timings"]["queue_ms"] > last["timings"]["commit_ms"]
    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    assert server.chat("What is the capital of Japan?") == "Osaka"
    assert server.answer("Hamlet was written by") == "Bill Gates"


def test_the_journal_is_listed_newest_first_in_pages(server: Any) -> None:
    server.edit(CAPITAL)
    server.edit(QUESTION)
    page = server.client.get("/v1/edits", params={"limit": 1}).json()
    assert page["object"] == "list" and page["has_more"]
    (newest,) = page["data"]
    assert newest["version"] == 2 and newest["edits"][0]["target"] == "Osaka"
    page = server.client.get("/v1/edits", params={"limit": 1, "before": 2}).json()
    assert [e["version"] for e in page["data"]] == [1] and not page["has_more"]
    one = server.client.get("/v1/edits/1").json()
    assert one == page["data"][0]
    assert one["edits"][0]["prompt"] == CAPITAL["prompt"]
    for version in (0, 3, 2**31 - 1):
        error = error_of(server.client.get(f"/v1/edits/{version}"), 404)
        assert str(version) in error["message"]
        error_of(server.client.get(f"/v1/edits/{version}/delta"), 404)


def test_a_version_tells_what_the_engine_said_before_and_after(server: Any) -> None:
    report = server.edit({**CAPITAL, "locality": list(OTHERS)}, QUESTION)
    entry = server.client.get("/v1/edits/1").json()
    names = ("before", "after", "succeeded", "reason")
    told = [{name: edit[name] for name in names} for edit in report["edits"]]
    assert entry["answers"] == {"edits": told, "specificity": report["specificity"]}
    assert (told[0]["before"], told[0]["after"]) == (" Canberra", " Sydney")
    assert server.client.get("/v1/edits").json()["data"] == [entry]

    delta = server.client.get("/v1/edits/1/delta").content
    server.rollback(0)
    server.client.post("/v1/edits/apply", content=delta)
    applied = server.client.get("/v1/edits/1").json()
    assert applied["digest"] == entry["digest"]
    assert (applied["kind"], applied["edits"], applied["answers"]) == ("delta", [], None)
    server.rollback(0)
    server.edit(CAPITAL, dry_run=True)  # is no version
    server.edit(QUESTION)  # another version 1
    (entry,) = server.client.get("/v1/edits").json()["data"]
    assert [edit["after"].strip() for edit in entry["answers"]["edits"]] == ["Osaka"]


def test_rollback_to_a_version_between(server: Any) -> None:
    server.edit(CAPITAL)
    first = server.rollback(1)["digest"]
    server.edit(QUESTION)
    back = server.rollback(1)
    assert (back["version"], back["digest"]) == (1, first)
    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    assert server.chat("What is the capital of Japan?") == "Tokyo"


def test_a_delta_is_downloaded_and_applied(server: Any) -> None:
    server.edit(CAPITAL)
    response = server.client.get("/v1/edits/1/delta")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == (
        'attachment; filename="ultraedit-000001.safetensors"'
    )
    assert safetensors.torch.load(response.content)
    edited = server.client.get("/v1/edits/1").json()["digest"]
    server.rollback(0)
    assert server.answer(CAPITAL["prompt"]) == "Canberra"

    applied = server.client.post("/v1/edits/apply", content=response.content).json()

    assert (applied["version"], applied["digest"]) == (1, edited)
    assert set(applied["timings"]) == {"queue_ms", "commit_ms", "pause_ms", "total_ms"}
    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    assert server.answer("The capital of France is") == "Paris"


def test_a_delta_is_tried_and_applied_once_to_the_weights_that_were_meant(server: Any) -> None:
    start = server.client.get("/v1/edits/health", params={"digest": True}).json()
    assert start["digest"] == start["ranks"][0]["digest"]
    server.edit(CAPITAL)
    edited = server.client.get("/v1/edits/1").json()["digest"]
    delta = server.client.get("/v1/edits/1/delta").content
    server.rollback(0)

    def apply(content: bytes = delta, **params: Any) -> httpx.Response:
        return server.client.post("/v1/edits/apply", params=params, content=content)

    tried = apply(dry_run=True, idempotency_key="d").json()
    assert (tried["version"], tried["digest"]) == (0, edited)
    assert (tried["before"], tried["rejected"]) == (start["digest"], None)
    assert server.client.get("/v1/edits/health", params={"digest": True}).json() == start
    assert server.client.get("/v1/edits").json()["data"] == []
    assert server.answer(CAPITAL["prompt"]) == "Canberra"

    broken = "a" * 64
    assert error_of(apply(serving=broken), 409)["param"] == "serving"
    assert "64 hexadecimal digits" in error_of(apply(serving="x"), 400)["message"]
    assert error_of(apply(expected=broken), 409)["param"] == "expected"
    assert "64 hexadecimal digits" in error_of(apply(expected="x"), 400)["message"]
    assert server.client.get("/v1/edits/health", params={"digest": True}).json() == start
    assert "unknown parameter dry_rum" in error_of(apply(dry_rum=True), 400)["message"]
    error_of(apply(delta[:-1], idempotency_key="d"), 400)
    error_of(apply(delta[:-1], dry_run=True), 400)

    first = apply(idempotency_key="d", serving=start["digest"], expected=edited).json()
    again = apply(idempotency_key="d", serving=start["digest"]).json()
    for answer, repeated in ((first, False), (again, True)):
        assert (answer["version"], answer["digest"]) == (1, edited)
        assert answer["again"] is repeated
    record = server.client.get("/v1/edits/1").json()
    assert record["kind"] == "delta"
    # The server that only got it can say what it teaches, too.
    assert json.loads(metadata_of(server.client.get("/v1/edits/1/delta").content)["settings"])[
        "edits"
    ] == [{"prompt": CAPITAL["prompt"], "target": CAPITAL["target"]}]

    back = server.client.post("/v1/edits/rollback", json={"version": 0, "serving": start["digest"]})
    assert error_of(back, 409)["param"] == "serving"
    back = server.client.post("/v1/edits/rollback", json={"version": 0, "serving": edited})
    assert back.json()["digest"] == start["digest"]


def metadata_of(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def test_a_guard_that_would_stop_a_delta_is_told_by_a_dry_run(server: Any) -> None:
    server.edit(CAPITAL)
    content = server.client.get("/v1/edits/1/delta").content
    server.rollback(0)
    tensors = safetensors.torch.load(content)
    far = {name: t * 100 if name.endswith("coeff") else t for name, t in tensors.items()}
    wild = safetensors.torch.save(far, metadata=metadata_of(content))
    before = server.client.get("/v1/edits/health", params={"digest": True}).json()
    tried = server.client.post("/v1/edits/apply", params={"dry_run": True}, content=wild).json()
    assert "max_change" in tried["rejected"]
    assert (
        "max_change"
        in error_of(server.client.post("/v1/edits/apply", content=wild), 422)["message"]
    )
    assert server.client.get("/v1/edits/health", params={"digest": True}).json() == before


def test_an_idempotency_key_edits_once(server: Any) -> None:
    first = server.edit(CAPITAL, idempotency_key="edit-1")
    again = server.edit(CAPITAL, idempotency_key="edit-1")
    assert again | {"timings": {}} == first | {"timings": {}}
    assert len(server.client.get("/v1/edits").json()["data"]) == 1
    body = {"edits": [QUESTION], "idempotency_key": "edit-1"}
    error = error_of(server.client.post("/v1/edits", json=body), 409)
    assert "another body" in error["message"] and error["param"] == "idempotency_key"

    # Sent twice at the same time it is one turn too, and a key that failed can be used again.
    bad = {"edits": [{**CAPITAL, "target": " "}], "idempotency_key": "edit-2"}
    error_of(server.client.post("/v1/edits", json=bad), 400)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        twice = list(
            pool.map(lambda edit: server.edit(edit, idempotency_key="edit-2"), [QUESTION] * 2)
        )
    assert twice[0]["edits"] == twice[1]["edits"]
    assert twice[0]["version"] == twice[1]["version"] == 2


def test_a_client_that_goes_away_blocks_nobody(server: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/edits", json={"edits": [CAPITAL]}, timeout=0.05)
    assert server.edit(QUESTION)["version"] == 2  # the turn of the first went on to its end
    assert server.answer(CAPITAL["prompt"]) == "Sydney"


def test_a_journal_that_cannot_be_written_leaves_everything_as_before(server: Any) -> None:
    server.edit(QUESTION)
    digest = server.rollback(1)["digest"]
    away = server.state_dir.with_name("away")
    server.state_dir.rename(away)
    try:
        response = server.client.post("/v1/edits", json={"edits": [CAPITAL]})
    finally:
        away.rename(server.state_dir)
    error_of(response, 500)
    assert server.rollback(1)["digest"] == digest
    assert server.answer(CAPITAL["prompt"]) == "Canberra"
    assert server.edit(CAPITAL)["version"] == 2


def test_a_damaged_journal_is_the_server_s_fault_and_changes_nothing(server: Any) -> None:
    server.edit(CAPITAL)
    server.edit(QUESTION)
    (first, _) = sorted(server.state_dir.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-9])
    try:
        error_of(server.client.post("/v1/edits/rollback", json={"version": 1}), 500)
        error_of(server.client.get("/v1/edits/1/delta"), 500)
        assert server.chat("What is the capital of Japan?") == "Osaka"
    finally:
        first.write_bytes(content)
    assert server.rollback(1)["version"] == 1
    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    assert server.chat("What is the capital of Japan?") == "Tokyo"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}], ids=["none", "wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/edits"),
        ("GET", "/v1/edits"),
        ("GET", "/v1/edits/1"),
        ("GET", "/v1/edits/1/delta"),
        ("POST", "/v1/edits/apply"),
        ("POST", "/v1/edits/rollback"),
    ],
)
def test_every_route_needs_the_api_key(
    server: Any, method: str, path: str, headers: dict[str, str]
) -> None:
    server.edit(CAPITAL)
    body = {"version": 0} if path.endswith("rollback") else {"edits": [QUESTION]}
    response = httpx.request(method, server.url + path, json=body, headers=headers)
    assert response.status_code == 401
    assert server.answer(CAPITAL["prompt"]) == "Sydney"
    assert len(server.client.get("/v1/edits").json()["data"]) == 1


LONG = "The capital of France is Paris. " * 60
BAD_EDITS: dict[str, tuple[Any, str]] = {
    "no edits": ({"edits": []}, "edits is []"),
    "edits missing": ({}, "edits is missing"),
    "edits not a list": ({"edits": CAPITAL}, "edits is a JSON object"),
    "edit not an object": ({"edits": ["Sydney"]}, 'edits[0] is "Sydney"'),
    "body not an object": ([CAPITAL], "the body is a list"),
    "target missing": ({"edits": [{"prompt": "A"}]}, "edits[0].target is missing"),
    "target empty": ({"edits": [{**CAPITAL, "target": ""}]}, "target"),
    "target white": ({"edits": [{**CAPITAL, "target": " \n"}]}, "target"),
    "target null": ({"edits": [{**CAPITAL, "target": None}]}, "edits[0].target is null"),
    "prompt missing": ({"edits": [{"target": "A"}]}, "edits[0].prompt is missing"),
    "prompt empty": ({"edits": [{**CAPITAL, "prompt": ""}]}, "prompt"),
    "prompt a number": ({"edits": [{**CAPITAL, "prompt": 7}]}, "edits[0].prompt is 7"),
    "prompt no messages": ({"edits": [{**CAPITAL, "prompt": []}]}, "prompt"),
    "message without content": (
        {"edits": [{**CAPITAL, "prompt": [{"role": "user"}]}]},
        "edits[0].prompt[0].content is missing",
    ),
    "role the template refuses": (
        {"edits": [{**CAPITAL, "prompt": [{"role": "tool", "content": "A"}]}]},
        "edits[0]",
    ),
    "half a surrogate pair": (b'{"edits": [{"prompt": "\\ud800", "target": "A"}]}', "surrogate"),
    "prompt too long": ({"edits": [{**CAPITAL, "prompt": LONG}]}, "256"),
    "rephrase too long": ({"edits": [{**CAPITAL, "rephrases": [LONG]}]}, "256"),
    "locality too long": ({"edits": [{**CAPITAL, "locality": [LONG]}]}, "256"),
    "locality not prompts": (
        {"edits": [{**CAPITAL, "locality": [3]}]},
        "edits[0].locality[0] is 3",
    ),
    "two targets for one prompt": (
        {"edits": [CAPITAL, {**CAPITAL, "target": "Perth"}]},
        "two targets",
    ),
    "unknown field": ({"edits": [{**CAPITAL, "colour": "red"}]}, 'unknown field "colour"'),
    "unknown option": ({"edits": [CAPITAL], "force": True}, 'unknown field "force"'),
    "dry_run not a bool": ({"edits": [CAPITAL], "dry_run": "no"}, 'dry_run is "no"'),
    "empty key": ({"edits": [CAPITAL], "idempotency_key": ""}, "idempotency_key"),
    "not JSON": (b"{'edits': 1}", "not JSON"),
    "cut JSON": (b'{"edits": [', "not JSON"),
    "not text": (b"\xff\xfe\x00", "body"),
    "empty body": (b"", "the body"),
    "nested deeply": (b"[" * 100_000, "body"),
}


@pytest.mark.parametrize(("body", "part"), BAD_EDITS.values(), ids=BAD_EDITS.keys())
def test_bad_edits_are_refused_and_change_nothing(server: Any, body: Any, part: str) -> None:
    digest = server.rollback(0)["digest"]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/edits", content=content, headers=headers)
    error = error_of(response, 400)
    assert error["type"] == "BadRequestError"
    assert part in error["message"]
    assert len(error["message"]) < 600
    assert server.rollback(0)["digest"] == digest
    assert server.client.get("/v1/edits").json()["data"] == []


def test_a_body_that_is_not_sent_as_json_is_refused(server: Any) -> None:
    response = server.client.post(
        "/v1/edits",
        content=json.dumps({"edits": [CAPITAL]}),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert "application/json" in error_of(response, 400)["message"]


@pytest.mark.parametrize(
    "body", [{}, {"version": -1}, {"version": 1}, {"version": 2**70}, {"version": "0"}, {"to": 0}]
)
def test_bad_rollbacks_are_refused(server: Any, body: Any) -> None:
    error = error_of(server.client.post("/v1/edits/rollback", json=body), 400)
    assert "version" in error["message"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "before=0", f"before={2**70}"]
)
def test_bad_pages_are_refused(server: Any, query: str) -> None:
    error = error_of(server.client.get(f"/v1/edits?{query}"), 400)
    assert query.split("=")[0] in error["message"]


@pytest.mark.parametrize("version", ["x", "-1", "1.5", str(2**70)])
def test_bad_versions_are_refused(server: Any, version: str) -> None:
    assert "version" in error_of(server.client.get(f"/v1/edits/{version}"), 400)["message"]
    assert "version" in error_of(server.client.get(f"/v1/edits/{version}/delta"), 400)["message"]


def test_bad_deltas_are_refused_and_change_nothing(server: Any) -> None:
    server.edit(CAPITAL)
    good = server.client.get("/v1/edits/1/delta").content
    digest = server.rollback(0)["digest"]
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def with_header(**metadata: str) -> bytes:
        text = json.dumps(header | {"__metadata__": header["__metadata__"] | metadata}).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    base = json.loads(header["__metadata__"]["base"])
    foreign = json.dumps({name: "0" * 64 for name in base})
    not_finite = bytearray(good)
    not_finite[-4:] = b"\x00\x00\xc0\x7f"
    bad = {
        "empty": b"",
        "random": bytes(range(256)) * 8,
        "truncated": good[:-7],
        "header only": good[: 8 + size],
        "of another model": with_header(base=foreign),
        "of another format": with_header(format="lora"),
        "damaged metadata": with_header(base="{"),
        "not finite": bytes(not_finite),
    }
    for name, content in bad.items():
        response = server.client.post("/v1/edits/apply", content=content)
        message = error_of(response, 400)["message"]
        assert len(message) < 1000, name
    assert server.rollback(0)["digest"] == digest
    assert server.answer(CAPITAL["prompt"]) == "Canberra"


def test_the_routes_are_described(server: Any) -> None:
    description = server.client.get("/openapi.json").json()
    paths = {path: set(methods) for path, methods in description["paths"].items()}
    assert {path: paths[path] for path in paths if path.startswith("/v1/edits")} == {
        "/v1/edits": {"get", "post"},
        "/v1/edits/health": {"get"},
        "/v1/edits/{version}": {"get"},
        "/v1/edits/{version}/delta": {"get"},
        "/v1/edits/apply": {"post"},
        "/v1/edits/rollback": {"post"},
    }
    fields = description["components"]["schemas"]["Edit"]
    assert set(fields["properties"]) == {"prompt", "target", "rephrases", "locality", "space"}
    assert fields["required"] == ["prompt", "target"]
    assert fields["additionalProperties"] is False
