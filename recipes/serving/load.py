"""Send a server many requests at once, broken ones among them, and check every answer.

    python -m recipes.serving.load                         # 2,000 requests, 32 at a time, to mini on this machine

It starts `vlmzip serve` in another process, asks every good request once alone, and then all requests in a random
order. It fails unless every good request is answered as alone, every broken one gets a 4xx status with a reason, the
memory of the server stays flat, and nothing waits at the end. It writes two CSVs to benchmarks/results/: a row for each
kind of request, and the memory of the server over time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from recipes.benchmarks import RESULTS
from vlmzip.files import write_csv
from vlmzip.lab.machine import about
from vlmzip.mini.splits import test_split

CHAT = "/v1/chat/completions"
#: Methods of good requests; `None` is the server's.
METHODS: tuple[dict[str, object] | None, ...] = (
    None, {"keep": 36}, {"method": "pool2d"}, {"method": "dfmr"}, {"method": "fastv", "keep": "25%"},
    {"method": "kmeans"},
)  # fmt: skip
#: The largest growth of the server's memory from the second quarter of the requests to the last, in MiB.
MOST_GROWTH = 64

Body = dict[str, Any]


@dataclass
class Kind:
    """A kind of request, and its results."""

    expected: str
    """"answer": the text of the request alone; "4xx": a refusal with a reason; "none": the client goes."""
    share: float
    """Its share of all requests."""
    send: Callable[[httpx.AsyncClient, random.Random], Awaitable[tuple[str, bool]]]
    """Sends a request; returns the status, and whether the result is as expected."""
    statuses: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0


# --- requests ---------------------------------------------------------------------------------------------------------


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def good_bodies(count: int) -> list[Body]:
    """Return different requests: methods, one to three images, one or two turns, greedy and sampled."""
    bodies = []
    for number, sample in enumerate(test_split(count)):
        file = io.BytesIO()
        size = 2_000 if number % 10 == 9 else sample.image.width  # large images wait in the queue, too
        sample.image.resize((size, size)).save(file, "PNG")
        image = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
        question = {"type": "text", "text": sample.question}
        messages: list[Body] = [{"role": "user", "content": [image] * (1 + number % 5 // 3) + [question]}]
        if number % 4 == 3:
            messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": [image, question]}]
        body: Body = {"model": "mini", "messages": messages, "max_tokens": 24}
        if (method := METHODS[number % len(METHODS)]) is not None:
            body["vlmzip"] = method
        if number % 7 == 6:
            body |= {"temperature": (1.0, 1e-40)[number % 2], "seed": number}
        bodies.append(body)
    return bodies


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes that announces side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def large_image() -> bytes:
    """Return a real image with more pixels than the server allows; it has few bytes."""
    file = io.BytesIO()
    Image.new("L", (9_000, 9_000)).save(file, "PNG")
    return file.getvalue()


def broken_bodies(good: Body) -> dict[str, Body | bytes]:
    """Return a broken request of each kind."""

    def with_url(url: object) -> Body:
        image = {"type": "image_url", "image_url": {"url": url}}
        return good | {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "what is there ?"}]}]}

    return {
        "bad base64": with_url("data:image/png;base64,@@@@"),
        "not an image": with_url(data_url(b"hello")),
        "a bomb": with_url(data_url(bomb(60_000))),
        "a large image": with_url(data_url(large_image())),
        "a huge body": with_url("data:image/png;base64," + "A" * 40_000_000),
        "a remote image": with_url("http://169.254.169.254/latest/meta-data"),
        "a wrong type": with_url(17),
        "wrong messages": good | {"messages": "what is there ?"},
        "unknown model": good | {"model": "gpt-5"},
        "negative keep": good | {"vlmzip": {"keep": -4}},
        "unknown method": good | {"vlmzip": {"method": "magic"}},
        "two answers": good | {"n": 2},
        "a long text": good | {"messages": [{"role": "user", "content": "what " * 50_000}]},
        "no JSON": b'{"model": "mini", "messages": [',
    }


# --- clients ----------------------------------------------------------------------------------------------------------


async def whole(client: httpx.AsyncClient, body: Body) -> tuple[str, str]:
    """Return status and text of an answer."""
    answer = await client.post(CHAT, json=body)
    if answer.status_code != 200:
        return str(answer.status_code), answer.text
    return "200", answer.json()["choices"][0]["message"]["content"]


async def streamed(
    client: httpx.AsyncClient, body: Body, pause: float = 0.0, most: int | None = None
) -> tuple[str, str]:
    """Return status and text of a stream, read with a pause after each event; leave after `most` events."""
    parts = []
    async with client.stream("POST", CHAT, json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return str(answer.status_code), (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                parts += [choice["delta"].get("content") or "" for choice in event["choices"]]
                await asyncio.sleep(pause)
                if most is not None and len(parts) >= most:
                    return "left", ""
    return "200", "".join(parts)


async def gone(client: httpx.AsyncClient, body: Body, rng: random.Random) -> None:
    """Send a request, or a part of it, and close the connection."""
    content = json.dumps(body).encode()
    host, port = client.base_url.host, client.base_url.port
    lines = [
        f"POST {CHAT} HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json",
        f"Content-Length: {len(content)}", "", "",
    ]  # fmt: skip
    head = "\r\n".join(lines)
    _, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + content[: rng.choice([len(content), len(content) // 2])])
    await writer.drain()
    await asyncio.sleep(rng.uniform(0, 0.2))
    writer.close()


def kinds_of(good: list[Body], alone: list[str]) -> dict[str, Kind]:
    """Return all kinds of requests, which compare answers with those of the requests alone."""
    count = len(good)

    def answered(send: Callable[[httpx.AsyncClient, Body], Awaitable[tuple[str, str]]]) -> Any:
        async def one(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, bool]:
            number = rng.randrange(count)
            status, text = await send(client, good[number])
            return status, status == "200" and text == alone[number]

        return one

    def refused(body: Body | bytes) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def one(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, bool]:
            answer = await client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
            reason = answer.json()["error"]["message"]
            return str(answer.status_code), 400 <= answer.status_code < 500 and len(reason) > 10

        return one

    async def leaves(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, bool]:
        body = rng.choice(good) | {"temperature": 2.0}
        status, _ = await streamed(client, body, most=rng.randint(1, 3))
        return status, status in ("200", "left")

    async def goes(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, bool]:
        await gone(client, rng.choice(good), rng)
        return "left", True

    kinds = {
        "good": Kind("answer", 0.45, answered(whole)),
        "good, streamed": Kind("answer", 0.22, answered(streamed)),
        "good, read slowly": Kind("answer", 0.05, answered(lambda client, body: streamed(client, body, pause=0.3))),
        "leaves in the stream": Kind("none", 0.05, leaves),
        "goes after or in the request": Kind("none", 0.05, goes),
    }
    broken = broken_bodies(good[0])
    left = 1 - sum(kind.share for kind in kinds.values())
    return kinds | {name: Kind("4xx", left / len(broken), refused(body)) for name, body in broken.items()}


# --- the server -------------------------------------------------------------------------------------------------------


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


async def load(address: str, pid: int, args: argparse.Namespace) -> tuple[dict[str, Kind], list[Body], float]:
    """Send all requests. Return the kinds with their results, the memory over time, and the seconds."""
    limits = httpx.Limits(max_connections=2 * args.concurrency, max_keepalive_connections=args.concurrency)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        good = good_bodies(args.different)
        alone = [(await whole(client, body))[1] for body in good]
        kinds = kinds_of(good, alone)
        rng = random.Random(args.seed)
        order = rng.choices(list(kinds), [kind.share for kind in kinds.values()], k=args.requests)
        order[: len(kinds)] = list(kinds)  # each kind at least once
        memory: list[Body] = []
        waiting, done, start = list(enumerate(order)), 0, time.monotonic()

        async def work() -> None:
            nonlocal done
            while waiting:
                number, name = waiting.pop()
                kind, began = kinds[name], time.monotonic()
                try:
                    status, right = await kind.send(client, random.Random(f"{args.seed} {number}"))
                except (httpx.HTTPError, OSError) as error:
                    status, right = type(error).__name__, False
                kind.seconds.append(time.monotonic() - began)
                kind.statuses[status] = kind.statuses.get(status, 0) + 1
                kind.wrong += not right
                done += 1
                if done % max(args.requests // 40, 1) == 0:
                    seconds = round(time.monotonic() - start, 1)
                    memory.append({"seconds": seconds, "requests": done, "rss_mib": round(resident(pid), 1)})

        await asyncio.gather(*(work() for _ in range(args.concurrency)))
        seconds = time.monotonic() - start
        await settled(client)
        status, text = await whole(client, good[0])
        assert (status, text) == ("200", alone[0]), "the server does not answer at the end"
        print_metrics((await client.get("/metrics")).text)
        return kinds, memory, seconds


async def settled(client: httpx.AsyncClient) -> None:
    """Wait until nothing waits in the server."""
    for _ in range(100):
        health = (await client.get("/health")).json()
        if health == {"status": "ok", "waiting": 0}:
            return
        await asyncio.sleep(0.1)
    raise SystemExit(f"requests are stuck: {health}")


def print_metrics(text: str) -> None:
    """Print what the server counted."""
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in ("vlmzip_batch_size", "vlmzip_time_to_first_token_seconds", "vlmzip_queue_wait_seconds"):
        count = float(values[f"{name}_count"])
        print(f"{name}: mean {float(values[f'{name}_sum']) / count:.3f} over {count:.0f}")
    for name, value in sorted(values.items()):
        if name.startswith(("vlmzip_requests_total", "vlmzip_broken_streams_total")):
            print(f"{name} {float(value):.0f}")


def row_of(name: str, kind: Kind, more: Body) -> Body:
    seconds = sorted(kind.seconds)
    statuses = " ".join(f"{status}:{count}" for status, count in sorted(kind.statuses.items()))
    row = {"kind": name, "expected": kind.expected, "requests": len(seconds), "statuses": statuses, "wrong": kind.wrong}
    row |= {
        "p50_ms": round(1000 * statistics.median(seconds)),
        "p95_ms": round(1000 * seconds[int(0.95 * len(seconds))]),
    }
    return row | more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--different", type=int, default=60, help="different good requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    command = [sys.executable, "-m", "vlmzip.cli.main", "serve", "--engine", "hf", "--port", "0", "--keep", "16"]
    with (
        tempfile.NamedTemporaryFile("w", prefix="server-load-", suffix=".log", delete=False) as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ) as server,
    ):
        print(f"the server's log: {log.name}")
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split()[-1].removesuffix("/v1")
            kinds, memory, seconds = asyncio.run(load(address, server.pid, args))
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    # Medians: the images of the requests at one moment can take 100 MiB.
    quarter = len(memory) // 4
    second, last = memory[quarter : 2 * quarter], memory[-quarter:]
    growth = statistics.median(row["rss_mib"] for row in last) - statistics.median(row["rss_mib"] for row in second)
    machine = about()  # before a file is written: the commit is then that of the code
    whole_run = {"wall_seconds": round(seconds, 1), "concurrency": args.concurrency, "rss_growth_mib": round(growth, 1)}
    rows = [row_of(name, kind, {**whole_run, **machine}) for name, kind in kinds.items()]
    write_csv(args.out / "server-load.csv", rows)
    write_csv(args.out / "server-load-memory.csv", [{**each, **machine} for each in memory])
    for row in rows:
        print(f"{row['kind']:30}{row['requests']:6}  {row['statuses']:24} wrong {row['wrong']}  {row['p50_ms']} ms")
    print(f"{args.requests} requests in {seconds:.0f} s, exit code {code}")
    print(f"memory {growth:+.1f} MiB from the second quarter to the last")
    wrong = sum(kind.wrong for kind in kinds.values())
    if wrong or growth > MOST_GROWTH or code != 0:
        raise SystemExit("not as it should be")


if __name__ == "__main__":
    main()
