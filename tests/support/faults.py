"""What files and command lines suffer, from a seed, and how the answer is judged."""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from atlas_lm.cli.errors import explain

PAGE = 4096


class TooLong(BaseException):
    """Not an Exception: nothing shall catch it."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TooLong is raised when the body takes longer."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flip_bit(raw: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << r.randrange(8)]) + raw[at + 1 :]


def flip_byte(raw: bytes, r: random.Random) -> bytes:
    at = r.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


def truncate(raw: bytes, r: random.Random) -> bytes:
    return raw[: r.randrange(len(raw))]


def append(raw: bytes, r: random.Random) -> bytes:
    return raw + r.choice([b"\0", b" ", b"\n", r.randbytes(r.randrange(1, 200))])


def zero_page(raw: bytes, r: random.Random) -> bytes:
    size = min(PAGE, max(1, len(raw) // 4))
    at = r.randrange(max(1, len(raw) // size)) * size
    return raw[:at] + bytes(min(size, len(raw) - at)) + raw[at + size :]


def swap_blocks(raw: bytes, r: random.Random) -> bytes:
    size = min(PAGE, max(1, len(raw) // 5))
    a, b = sorted(r.sample(range(max(2, len(raw) // size)), 2))
    first, second = raw[a * size : (a + 1) * size], raw[b * size : (b + 1) * size]
    return raw[: a * size] + second + raw[(a + 1) * size : b * size] + first + raw[(b + 1) * size :]


def repeat_block(raw: bytes, r: random.Random) -> bytes:
    a, b = sorted(r.sample(range(len(raw) + 1), 2))
    return raw[:b] + raw[a:b] + raw[b:]


def cut_out(raw: bytes, r: random.Random) -> bytes:
    a, b = sorted(r.sample(range(len(raw) + 1), 2))
    return raw[:a] + raw[b:]


def twice(raw: bytes, r: random.Random) -> bytes:
    return raw + raw


def empty(raw: bytes, r: random.Random) -> bytes:
    return b""


Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: list[Mutation] = [
    flip_bit, flip_byte, truncate, append, zero_page, swap_blocks, repeat_block, cut_out, twice, empty,
]  # fmt: skip


def mutated(raw: bytes, others: list[bytes], r: random.Random) -> tuple[str, bytes]:
    """The name of a change, and bytes that do differ."""
    while True:
        chosen = r.choice([*MUTATIONS, None])
        changed = chosen(raw, r) if chosen else r.choice(others)
        if changed != raw:
            return chosen.__name__ if chosen else "another file", changed


def outcome(function: Callable[[], Any], seconds: int) -> tuple[Any, str | None]:
    """What a function returns, or the line that explains its error to the user. Raises what cannot be explained."""
    with at_most(seconds):
        try:
            return function(), None
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            assert line
            assert "\n" not in line
            return None, line
