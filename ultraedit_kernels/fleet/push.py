"""One change to many servers: all of them serve it, or none does; and taking it back.

Two phases. First every server is asked what it serves and tries the change on a shadow of its
weights: the digest of its base, guards and canaries. Only if all agree are they told, each only if
it still serves what it served then. What is where stands in the servers' journals, so that a push
that broke off, wherever it did, goes on when it is run again, from any machine.

The first server, by its URL, is told alone: of two pushes at once one is refused there, with
nothing changed. A server that refuses later is a reason to take the change back from those told
before it; one that dies is told when the push is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from ultraedit_kernels.fleet.client import Client, ServerError
from ultraedit_kernels.integrations.vllm.protocol import Health
from ultraedit_kernels.store.delta import EditDelta

PARALLEL = 16
"""Servers that are talked to at a time."""
AGAIN = 1.0
"""Seconds before a server that did not serve the request is asked again, if it says none."""

Say = Callable[[str, str], None]
T = TypeVar("T")


class PushError(ValueError):
    """A push that did not come to its end.

    Attributes:
        half: whether some servers may serve the change and others not.
    """

    def __init__(self, message: str, servers: Mapping[str, str], half: bool = False) -> None:
        lines = [f"  {url}: {told}" for url, told in servers.items()]
        super().__init__("\n".join([message, *lines]))
        self.half = half


@dataclass(frozen=True)
class Server:
    """What a server said when it was asked about a change."""

    url: str
    version: int
    digest: str
    """Of what it serves."""
    has: int | None = None
    """The version that the change made here, if it has it."""
    would_be: str | None = None
    """The digest that it would serve with the change, if it has it not."""

    @property
    def newest(self) -> bool:
        """Whether the change is the last one here."""
        return self.has == self.version


@dataclass(frozen=True)
class Told:
    """What became of telling a server."""

    outcome: Literal["done", "refused", "lost"]
    message: str = ""


@dataclass
class Pushed:
    """What a fleet serves after a push: of each server its version, and the digest of all."""

    digest: str
    versions: dict[str, int] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    """Servers that did not have it before."""


class Fleet:
    """Servers that are to serve the same.

    Args:
        urls: of them.
        key: edit key of all of them.
        wait: seconds that one may be away or busy before it is given up.
        say: told what happens, as (url, text).
    """

    def __init__(
        self, urls: Iterable[str], key: str | None, *, wait: float = 60.0, say: Say | None = None
    ) -> None:
        clients = [Client(url, key) for url in urls]
        self._clients = {client.url: client for client in sorted(clients, key=lambda c: c.url)}
        if not self._clients:
            raise ValueError("got no servers, expected at least one URL")
        self._wait, self._say = wait, say or (lambda url, text: None)

    def close(self) -> None:
        """Let go of the connections."""
        for client in self._clients.values():
            client.close()

    def push(self, delta: EditDelta) -> Pushed:
        """Have all servers serve a change. Those that do so already are left alone.

        Raises:
            PushError: why not; with `half`, run it again or take it back.
        """
        key = f"delta-{delta.digest()}"
        servers = self._look(delta, key)
        have = [server for server in servers if server.has is not None]
        lack = [server for server in servers if server.has is None]
        digest = _agreed(have, lack)
        for server in have:
            self._say(server.url, f"has it, as version {server.has}")
        if lack:
            self._commit(delta, key, lack, digest, bool(have))
        versions = {s.url: s.version + (s.has is None) for s in servers}
        return Pushed(digest, versions, [server.url for server in lack])

    def take_back(self, delta: EditDelta) -> Pushed:
        """Have all servers serve what they served before a change. Those without it are left alone.

        Raises:
            PushError: a server cannot be reached, or has later changes; nothing is changed then. Or
                one failed after others had done it, with `half`: run it again.
        """
        servers = self._look(delta, f"delta-{delta.digest()}", tries=False)
        have = [server for server in servers if server.has is not None]
        if buried := {s.url: _buried(s) for s in have if not s.newest}:
            raise PushError("nothing is changed: later changes would be lost", buried)
        lost: dict[str, str] = {}
        for server in have:
            if problem := self._back(server, server.digest):
                lost[server.url] = problem
        if lost:
            message = "not taken back everywhere; run it again when these servers serve"
            raise PushError(message, lost, half=True)
        digests = {self._clients[s.url].health().digest or "" for s in servers}
        if len(digests) > 1:
            raise PushError("taken back, but the servers differ", _shown(servers), half=False)
        versions = {s.url: s.version - (s.has is not None) for s in servers}
        return Pushed(digests.pop(), versions, [server.url for server in have])

    def status(self) -> dict[str, Health | ServerError]:
        """What each server serves, read back from its weights, or why it does not say."""

        def ask(client: Client) -> Health | ServerError:
            try:
                return client.health(digest=True)
            except ServerError as error:
                return error

        return self._each(self._clients, ask)

    def _each(self, urls: Iterable[str], ask: Callable[[Client], T]) -> dict[str, T]:
        clients = {url: self._clients[url] for url in urls}
        with ThreadPoolExecutor(PARALLEL) as pool:
            return dict(zip(clients, pool.map(ask, clients.values()), strict=True))

    def _look(self, delta: EditDelta, key: str, tries: bool = True) -> list[Server]:
        """Ask all servers, before any is changed. Raises PushError unless all of them can be."""

        def ask(client: Client) -> Server | str:
            try:
                server = _look_at(client, delta, key, self._wait, tries)
            except ServerError as error:
                server = error.message
            told = server if isinstance(server, str) else f"checked, at version {server.version}"
            self._say(client.url, told)
            return server

        found = self._each(self._clients, ask)
        servers = [server for server in found.values() if isinstance(server, Server)]
        problems = {url: server for url, server in found.items() if isinstance(server, str)}
        if problems:
            has = [server.url for server in servers if server.has is not None]
            half = f"; {', '.join(has)} has it already, take it back with --undo" if has else ""
            message = f"nothing is changed: not all servers can take the change{half}"
            raise PushError(message, problems, half=bool(has))
        return servers

    def _commit(
        self, delta: EditDelta, key: str, lack: Seq[Server], digest: str, begun: bool
    ) -> None:
        """Tell the servers that have not got it."""

        def tell(server: Server) -> Told:
            told = self._tell(self._clients[server.url], delta, key, server.digest, digest)
            self._say(server.url, told.message or f"serves it, as version {server.version + 1}")
            return told

        first, rest = ([], list(lack)) if begun else ([lack[0]], list(lack[1:]))
        for server in first:
            if (told := tell(server)).outcome != "done":
                message = "nothing is changed on the others; run it again"
                raise PushError(message, {server.url: told.message}, half=told.outcome == "lost")
        with ThreadPoolExecutor(PARALLEL) as pool:
            outcomes = list(zip(rest, pool.map(tell, rest), strict=True))
        refused = {s.url: told.message for s, told in outcomes if told.outcome == "refused"}
        lost = {s.url: told.message for s, told in outcomes if told.outcome == "lost"}
        if refused:
            done = [*first, *(server for server, told in outcomes if told.outcome == "done")]
            self._undo(done, digest, refused | lost)
        if lost:
            raise PushError(
                "half pushed: all other servers serve the change; run it again when these serve, "
                "or take it back with --undo",
                lost,
                half=True,
            )

    def _undo(self, done: Seq[Server], digest: str, refused: Mapping[str, str]) -> None:
        """Take the change back from those that were told in vain. Raises PushError."""
        problems = {}
        for server in done:
            if problem := self._back(server, digest):
                problems[server.url] = f"serves it still: {problem}"
            else:
                self._say(server.url, f"taken back, at version {server.version}")
        message = "refused, and taken back from all that had it; mend the cause and run it again"
        if problems:
            message = "refused, and not taken back everywhere; run it with --undo"
        raise PushError(message, {**refused, **problems}, half=bool(problems))

    def _back(self, server: Server, digest: str) -> str | None:
        """Have a server serve what it served before the change; why not."""
        client = self._clients[server.url]
        before = server.version if server.has is None else server.version - 1
        try:
            client.rollback(before, serving=digest)
        except ServerError as error:
            if error.status not in (None, 409):
                return str(error)
            try:  # the answer may have been lost
                there = client.wait(self._wait)
                if there.version > before and there.digest == digest:
                    client.rollback(before, serving=digest)
                elif there.version != before:
                    return f"version {there.version} is served, by another change"
            except ServerError as last:
                return str(last)
        return None

    def _tell(self, client: Client, delta: EditDelta, key: str, start: str, digest: str) -> Told:
        deadline = time.monotonic() + self._wait
        while True:
            try:
                answer = client.apply(delta, idempotency_key=key, serving=start)
                if answer.digest == digest:
                    return Told("done")
                return Told("refused", f"serves digest {answer.digest}, expected {digest}")
            except ServerError as error:
                told = error.message
                if error.status is not None and error.status < 500 and error.status != 429:
                    return Told("refused", told)
                if (left := deadline - time.monotonic()) <= 0:
                    return Told("lost", told)
                pause = error.retry_after or AGAIN
            time.sleep(min(pause, left))
            try:
                there = client.wait(max(deadline - time.monotonic(), 0.0))
            except ServerError as error:
                return Told("lost", error.message)
            if there.digest == digest:
                return Told("done")


def _look_at(client: Client, delta: EditDelta, key: str, wait: float, tries: bool) -> Server | str:
    """A server, or why it cannot take the change."""
    health = client.wait(wait)
    if health.status != "ok":
        return "its ranks differ; restart it, so that every rank replays the journal"
    if health.digest is None:
        return "runs an older ultraedit-kernels, which cannot try a delta; update it"
    there = health.version, health.digest
    # Not by the key: where the change was computed, or sent by hand, it has none.
    if health.version and client.delta(health.version).digest() == delta.digest():
        return Server(client.url, *there, has=health.version)
    answer = client.apply(delta, dry_run=True, idempotency_key=key)
    if answer.again:
        return Server(client.url, *there, has=answer.version)
    if not tries:
        return Server(client.url, *there)
    if answer.rejected is not None:
        return f"a guard rejects it: {answer.rejected}"
    if answer.before != health.digest:
        return "another change came meanwhile; run it again"
    return Server(client.url, *there, would_be=answer.digest)


def _agreed(have: Seq[Server], lack: Seq[Server]) -> str:
    """The digest that all will serve. Raises PushError if they would not serve the same."""
    servers = [*have, *lack]
    message = "nothing is changed: the servers do not serve the same"
    if lack and any(not server.newest for server in have):
        told = {
            s.url: _buried(s) if s.has else f"has it not, at version {s.version}" for s in servers
        }
        raise PushError(f"{message}; roll back the later versions, or push them first", told, True)
    if len({server.digest for server in lack}) > 1:
        remedy = "bring them to one version with `ultraedit push` or rollback first"
        raise PushError(f"{message}; {remedy}", _shown(servers), half=bool(have))
    ends = {server.would_be or server.digest for server in servers}
    if len(ends) > 1:
        same = len({server.would_be for server in lack}) <= 1
        why = (
            "some had other changes before this one; take it back with --undo, or bring all there"
            if same
            else "the change makes other weights of equal ones; use equal devices and versions"
        )
        raise PushError(f"{message}, {why}", _shown(servers), half=bool(have and lack))
    return ends.pop()


def _shown(servers: Seq[Server]) -> dict[str, str]:
    return {
        s.url: f"version {s.version}, digest {s.digest[:12]}, "
        + ("has the change" if s.has is not None else f"with it {str(s.would_be)[:12]}")
        for s in servers
    }


def _buried(server: Server) -> str:
    if server.newest:
        return f"has it, as version {server.has}"
    return f"has it as version {server.has}, and later versions up to {server.version}"
