"""`cai-scale serve`: the flags, the socket, and how the process ends."""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cai_scale.commands import Parser, require
from cai_scale.errors import CaiError, ConfigError
from cai_scale.records import sha256
from cai_scale.runtime.bundle import MANIFEST, open_bundle

if TYPE_CHECKING:
    from fastapi import FastAPI

    from cai_scale.runtime.serve.engine import Engine

TOKEN = "CAI_SCALE_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
BACKLOG = 2048
GOODBYE = 5  # seconds for responses that are complete to reach their clients


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog="cai-scale serve",
        description="Serve a bundle: the OpenAI protocol under /v1, scores at /v1/score, a page "
        "at /, /healthz, and /metrics for Prometheus. SIGTERM drains: new requests get 503, open "
        "ones finish, then the process ends with 0.",
        epilog=f"Clients must send the value of the environment variable {TOKEN}, where it is set, "
        f"as 'Authorization: Bearer …'; without it the server stays on loopback. Refusals: 401 "
        f"token, 413 body, 422 what a body asks for, 429 full queue, 503 draining, 504 timeout.",
        allow_abbrev=False,
    )
    flag = made.add_argument
    made.add_bundle()
    flag("--variant", help="fp32, q8 … (default: the bundle's own choice)")
    flag("--name", type=_name, default="cai-scale", help="the model's name (default: %(default)s)")
    flag("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    flag("--port", type=_whole(0, 65535), default=8000, help="0 takes a free one (default: 8000)")
    flag(
        "--rows",
        type=_whole(1, 4096),
        default=32,
        help="answers written at once: more serve more clients, each more slowly (default: 32)",
    )
    flag(
        "--queue",
        type=_whole(0, 10**6),
        default=512,
        help="answers that may wait for a row; then 429 (default: 512)",
    )
    flag("--max_body", type=_size, default="1MB", help="largest request (default: 1MB)")
    flag(
        "--max_new_tokens",
        type=_whole(1, 10**6),
        default=1024,
        help="longest answer that a request may ask for (default: 1024)",
    )
    flag(
        "--timeout",
        type=_whole(1, 10**6),
        default=120,
        help="seconds for a request, its wait in the queue included; then 504 (default: 120)",
    )
    flag(
        "--drain_timeout",
        type=_whole(0, 10**6),
        default=30,
        help="seconds that open requests have to finish after SIGTERM (default: 30)",
    )
    flag(
        "--no_auth",
        action="store_true",
        help="let everyone in who can reach --host, where something before the server checks",
    )
    return made


def serve(arguments: Sequence[str] | None) -> int:
    """Serve until SIGTERM or SIGINT."""
    options = parser().parse_args(arguments)
    token = _token(options)
    require("serving", "serve", "fastapi", "uvicorn", "prometheus_client")
    listener = _listen(options.host, options.port)
    from cai_scale.runtime.generate import Generator, Policy
    from cai_scale.runtime.scorer import Scorer
    from cai_scale.runtime.serve.app import Model, Service, make_app
    from cai_scale.runtime.serve.engine import Engine
    from cai_scale.runtime.serve.guard import Limits
    from cai_scale.runtime.serve.metrics import Metrics

    bundle = open_bundle(options.bundle, options.expect_sha256)
    policy = Policy(bundle, options.variant)
    manifest = options.bundle / MANIFEST
    limits = Limits(
        max_body=options.max_body,
        max_new_tokens=options.max_new_tokens,
        queue=options.queue,
        timeout=options.timeout,
        token=token,
        hosts={*LOOPBACK, options.host} if not token and _is_loopback(options.host) else None,
    )
    metrics = Metrics()
    engine = Engine(
        Generator(policy, options.rows), rows=options.rows, queue=options.queue, metrics=metrics
    )
    model = Model(
        name=options.name,
        created=int(manifest.stat().st_mtime),
        fingerprint=sha256(manifest)[:16],
    )
    scorer = Scorer(bundle.constitution, bundle)
    app = make_app(Service(model, policy, engine, scorer, limits, metrics))
    run(app, engine, listener, model.name, options.drain_timeout)
    return 0


def run(
    app: "FastAPI", engine: "Engine", listener: socket.socket, name: str, drain_timeout: float
) -> None:
    """Serve `app` on a socket that listens, until a signal or a failure of the engine.

    Raises:
        CaiError: the engine failed.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Drains before it stops listening, so that new requests are told; ends with 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            draining: list[asyncio.Task[None]] = []

            def drain() -> None:
                if draining:  # asked twice: now
                    self.should_exit = self.force_exit = True
                else:
                    draining.append(loop.create_task(engine.drain(drain_timeout)))

            def stop() -> None:
                self.should_exit = True

            ended = loop.create_task(engine.ended.wait())
            ended.add_done_callback(lambda _: stop())
            wanted = (signal.SIGINT, signal.SIGTERM)
            before = {
                number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(drain))
                for number in wanted
            }
            try:
                yield
            finally:
                ended.cancel()
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {name} at http://{shown}:{port}", flush=True)

    config = uvicorn.Config(
        app,
        access_log=False,  # a path may say what was asked; /metrics counts
        log_level="warning",
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=GOODBYE,
    )
    Server(config).run(sockets=[listener])
    if engine.failed:
        raise CaiError("the model failed; the lines above say where; restart the server")


def _token(options: argparse.Namespace) -> str | None:
    token = os.environ.get(TOKEN)
    if token is not None and (not token.strip() or token != token.strip()):
        raise ConfigError(f"{TOKEN} is empty or has blanks around it; set a long random text")
    if token is not None and options.no_auth:
        raise ConfigError(f"--no_auth lets everyone in, but {TOKEN} is set; leave one of them out")
    if token is None and not options.no_auth and not _is_loopback(options.host):
        raise ConfigError(
            f"--host {options.host} is open to others; set {TOKEN} to a long random text, or say "
            f"--no_auth"
        )
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror or error}; choose others"
        ) from None


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})\s*([KMG]B)?", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 1MB, 512KB or 65536")
    return int(match[1]) * UNITS[match[2] or ""]


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w./:-]{1,128}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text}: expected letters, digits and . _ / : -")
    return text


def _whole(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: expected a number from {least} to {most}")
        return value

    number.__name__ = "int"
    return number
