"""A link between the ranks of a run: each learns at once that another one died or failed, and ends.

A collective waits for a rank that is gone until the timeout of its group: 30 minutes in training, 30 days where ranks work for
different times. So every rank holds a TCP connection to rank 0, in a thread. The system closes it when a process dies, whatever
it was busy with, and keep-alive packets notice a machine that is gone. A process that is only slow or stopped keeps it.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

GRACE = 10.0
"""Seconds in which a rank may end by itself after another one is gone. Then its process is ended."""
TICK = 0.25
_SILENT = 2.0
"""Seconds before the failure of another rank is told. Often all ranks raise the same error at the same time."""
_KEY = "lightning_align/rank_link"


class Loss(NamedTuple):
    """What became of another rank."""

    rank: int
    run: int
    """The run that it failed in, or the last one that it completed before it died."""
    died: bool
    why: str

    def ends(self, run: int) -> bool:
        """Return whether a run of another rank cannot go on."""
        return self.run < run if self.died else self.run == run

    def __str__(self) -> str:
        return f"Rank {self.rank} {'died' if self.died else 'failed'}: {self.why}"


class RankLink:
    """The connection of this rank. Its methods are called by the main thread, and its own thread does the rest."""

    def __init__(self) -> None:
        """Start the thread. It connects as soon as there is a process group."""
        self.run, self.ended, self.active = 0, 0, False
        self.explain: Callable[[int], str] = lambda rank: ""
        """Returns how the process of a rank ended, if this process knows."""
        self.before_exit: Callable[[], None] = lambda: None
        self.group: Any = None
        """The process group that the link belongs to, or None before there is one."""
        self._rank, self._size, self._token = 0, 1, ""
        self._server: socket.socket | None = None
        self._peers: dict[socket.socket, dict[str, Any]] = {}  # on rank 0 all others, elsewhere rank 0
        self._losses: list[Loss] = []
        self._lost: set[int] = set()
        self._outbox: deque[dict[str, Any]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._sent, self._noticed, self._changed = threading.Event(), threading.Event(), threading.Lock()
        self._since, self._told, self._closed = 0.0, False, False
        _LINKS.add(self)
        threading.Thread(target=self._work, name="lightning-align-ranks", daemon=True).start()

    # -- called by the main thread

    def begin(self) -> None:
        """Begin a run: from now on the loss of another rank ends this process."""
        with self._changed:
            self.run, self.active, self._since, self._told = self.run + 1, True, 0.0, False
        self._noticed.clear()

    def end(self) -> None:
        """Complete the run."""
        with self._changed:
            self.active, self.ended = False, self.run
        self._tell({"kind": "end", "run": self.run})

    def fail(self, why: str) -> None:
        """Leave the run with an error, and tell the others."""
        with self._changed:
            self.active = False
        self._tell({"kind": "failed", "run": self.run, "why": why})
        if self.group is not None:
            self._sent.wait(2.0)

    def warn(self, why: str) -> None:
        """Tell the others of an error before this rank waits for them, to raise it on all ranks together."""
        self._tell({"kind": "failing", "run": self.run, "why": why})

    def met(self) -> None:
        """Tell the others that all ranks know of the error, and may handle it."""
        self._tell({"kind": "met", "run": self.run})

    def loss(self, *, seconds: float = 0.0) -> Loss | None:
        """Return what ended the run on another rank, if anything did.

        Args:
            seconds: How long to wait for the news.
        """
        self._noticed.wait(seconds)
        return self._first_loss()

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        with suppress(OSError):
            self._wake.send(b"x")

    # -- the thread

    def _tell(self, message: dict[str, Any]) -> None:
        self._sent.clear()
        self._outbox.append(message)
        with suppress(OSError):
            self._wake.send(b"x")

    def _first_loss(self) -> Loss | None:
        return next((loss for loss in list(self._losses) if loss.ends(self.run)), None)

    def _work(self) -> None:
        while not (dist.is_available() and dist.is_initialized()):
            if self._closed:
                return
            time.sleep(TICK / 2)
        self.group, self._rank, self._size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            try:
                store: Any = _get_default_store()
                self._open(store.clone(), selector)
            except (OSError, RuntimeError, ValueError) as error:  # a firewall, or a store that cannot be shared
                _write(f"Rank {self._rank} cannot watch the other ranks ({error}). If one dies, it waits for the timeout.")
                self._sent.set()
                return
            while not self._closed:
                for key, _ in selector.select(TICK):
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                    elif key.fileobj is self._server:
                        self._accept(selector)
                    else:
                        self._read(key.fileobj, selector)
                while self._outbox:
                    message = self._outbox.popleft()
                    self._send_all({**message, "rank": self._rank})
                self._sent.set()
                self._judge(selector)
            self._drop_sockets()

    def _open(self, store: Any, selector: selectors.BaseSelector) -> None:
        if self._rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096)
            self._token = secrets.token_hex(16)
            hosts = [os.environ.get("MASTER_ADDR", ""), socket.gethostname(), _address(socket.gethostname())]
            place = {"hosts": [host for host in hosts if host], "port": self._server.getsockname()[1], "token": self._token}
            store.set(_KEY, json.dumps(place))
            selector.register(self._server, selectors.EVENT_READ)
            return
        place = json.loads(store.get(_KEY))
        self._token = place["token"]
        connection = _connect(place["hosts"], place["port"])
        self._peers[connection] = {"rank": 0, "ended": 0, "buffer": b""}
        selector.register(connection, selectors.EVENT_READ)
        connection.sendall(f"{self._token} {self._rank}\n".encode())

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._server is not None
        with suppress(OSError):
            connection, _ = self._server.accept()
            _keep_alive(connection)
            self._peers[connection] = {"rank": None, "ended": 0, "buffer": b""}
            selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: Any, selector: selectors.BaseSelector) -> None:
        peer = self._peers[connection]
        try:
            data = connection.recv(65536)
        except OSError:  # also that its keep-alive packets are not answered
            data = b""
        *lines, peer["buffer"] = (peer["buffer"] + data).split(b"\n")
        for line in lines:
            if peer["rank"] is None:
                own, _, rank = line.partition(b" ")
                if not secrets.compare_digest(own, self._token.encode()):
                    data = b""  # not a rank of this run
                    break
                peer["rank"] = int(rank)
            else:
                self._handle(peer, json.loads(line))
        if not data or len(peer["buffer"]) > 65536:
            selector.unregister(connection)
            connection.close()
            del self._peers[connection]
            if peer["rank"] is not None:
                self._add(Loss(peer["rank"], peer["ended"], True, self._cause(peer["rank"])))

    def _cause(self, rank: int) -> str:
        if known := self.explain(rank):
            return known
        return "its process or its machine is gone, without an error of its own. The system may have killed it to free memory."

    def _handle(self, peer: dict[str, Any], message: dict[str, Any]) -> None:
        if message["kind"] == "end":
            peer["ended"] = message["run"]
        elif message["kind"] == "met":
            self._meet(message["rank"])
        elif message["kind"] in ("failing", "failed", "died"):
            self._add(Loss(message["rank"], message["run"], message["kind"] == "died", message["why"]))

    def _meet(self, rank: int) -> None:
        self._losses = [loss for loss in self._losses if loss.rank != rank or loss.died]
        with self._changed:
            self._since, self._told = 0.0, False
        if self._rank == 0:
            self._send_all({"kind": "met", "rank": rank})

    def _add(self, loss: Loss) -> None:
        if loss.died and loss.rank in self._lost:
            return
        if loss.died:
            self._lost.add(loss.rank)
        self._losses.append(loss)
        if self._rank == 0:
            self._send_all({"kind": "died" if loss.died else "failed", "rank": loss.rank, "run": loss.run, "why": loss.why})
        if self._first_loss() is not None:
            self._noticed.set()

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection, peer in list(self._peers.items()):
            if peer["rank"] is not None:
                self._send(connection, message)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        with suppress(OSError):  # it is gone, which `_read` finds out
            connection.sendall(json.dumps(message).encode() + b"\n")

    def _judge(self, selector: selectors.BaseSelector) -> None:
        with self._changed:
            loss = self._first_loss() if self.active else None
            if loss is None:
                return
            now = time.monotonic()
            self._since = self._since or now
            waited = now - self._since
            if not self._told and (loss.died or waited > _SILENT):
                self._told = True
                _write(f"{loss}\nRank {self._rank} cannot go on without it and ends in {GRACE:.0f} seconds at the latest.")
        if waited > GRACE:
            self._exit(loss, selector)

    def _exit(self, loss: Loss, selector: selectors.BaseSelector) -> None:
        deadline = time.monotonic() + 5
        while self._rank == 0 and self._peers and time.monotonic() < deadline:  # its end would hide the cause from the others
            for key, _ in selector.select(TICK):
                if key.fileobj in self._peers:
                    self._read(key.fileobj, selector)
        _write(f"Rank {self._rank} ends with exit status 1, because rank {loss.rank} {'died' if loss.died else 'failed'}.")
        with suppress(Exception):
            self.before_exit()
        os._exit(1)  # the main thread may wait in a collective, where no exception reaches it

    def _drop_sockets(self) -> None:
        for opened in (*self._peers, self._server, self._wake, self._woken):
            if opened is not None:
                with suppress(OSError):
                    opened.close()


_current: RankLink | None = None
"""The link of the process group. It outlives a run: a rank that is gone between two runs must end the next one."""


def link_of_group() -> RankLink:
    """Return the link of the process group, or of the one that will be made."""
    global _current
    group = None if _current is None else _current.group
    if _current is not None and group is not None and (not dist.is_initialized() or group is not dist.group.WORLD):
        _current.close()
        _current = None
    _current = _current or RankLink()
    return _current


@contextmanager
def failing(error: BaseException) -> Iterator[None]:
    """Tell the other ranks of an error while this rank waits for them. They end if they do not come to the same place."""
    link = _current if _current is not None and _current.active else None
    if link is not None:
        link.warn(f"{type(error).__name__}: {error}"[:500])
    yield
    if link is not None:
        link.met()


_LINKS: "weakref.WeakSet[RankLink]" = weakref.WeakSet()


def _forget_links() -> None:
    """Close the sockets in a forked process, such as a worker of a data loader: it would keep the connection of a dead rank."""
    for link in _LINKS:
        link._drop_sockets()
        link.active = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_links)


def _address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _connect(hosts: list[str], port: int) -> socket.socket:
    problem: OSError = OSError("rank 0 has no address")
    for host in dict.fromkeys(hosts):
        try:
            connection = socket.create_connection((host, port), timeout=10)
        except OSError as error:
            problem = error
            continue
        connection.settimeout(None)
        _keep_alive(connection)
        return connection
    raise problem


def _keep_alive(connection: socket.socket) -> None:
    """Have the system notice within 30 seconds that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _write(text: str) -> None:
    """Write to standard error without its lock, which a thread in the middle of writing may hold."""
    lines = "".join(f"lightning-align: {line}\n" for line in text.split("\n"))
    with suppress(OSError):
        os.write(2, lines.encode())
