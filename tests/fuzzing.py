"""Damaged and hostile input for readers, and what is owed for it: a value, or one line of ours.

Inputs are mutations of valid ones and bytes drawn at random, the same in every run.
"""

from __future__ import annotations

import copy
import json
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt import DiscoptError
from discopt.encoding import checksum

Rng = np.random.Generator

LONGEST_LINE = 1000  # characters of a message, its paths and names included
SECONDS = 20.0  # for one input, on a busy machine
MEMORY = 2**30  # bytes more than there were
FAILURES = 8  # told of

RAW = "\ue000raw:"  # a text that `as_json` writes as it is, without quotes
NUMBERS = (0, 1, -1, 2, 255, 256, 2**31, 2**32 + 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30)
FLOATS = (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", " ", "0", "-1", "1e9", "nan", "None", "true", "../../etc/passwd", "/etc/passwd", "a/b", "%s%n", "{0}")
ODD = ("\0", "a\nb", "\r\n", "\t", "\ufeff", "\ud800", "\u202e", "\x1b[31m", "é" * 30, "🙂", "x" * 5000)
SHAPES = ([], [[]], {}, {"": None}, [None], [0] * 300, {"float": "NaN"}, {"float": []}, {"float": "x"})
DEEP = tuple(RAW + "[" * depth + "]" * depth for depth in (50, 240, 400, 900))
BROKEN = (RAW + "9" * 400, RAW + "9" * 5000, RAW + "1e999", RAW + "[" * 100_000, RAW + '{"a":' * 20_000)
HOSTILE: tuple[Any, ...] = (None, True, False, *NUMBERS, *FLOATS, *TEXTS, *ODD, *SHAPES, *DEEP, *BROKEN)
BYTES = (
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"],:-",
    b"9" * 60,
)
_RAW = re.compile(re.escape(json.dumps(RAW)[:-1]) + r'((?:[^"\\]|\\.)*)"')


class Late(BaseException):
    """Raised inside a reader that takes too long; no reader may catch it."""


@dataclass(frozen=True)
class Reader:
    """A reader, which also checks that what it has read makes sense, and what it is fed."""

    read: Callable[[Any], Any]
    inputs: Callable[[Rng], Iterator[Any]]
    errors: tuple[type[Exception], ...] = (DiscoptError,)


@dataclass(frozen=True)
class Tally:
    """How many inputs came to what."""

    read: int
    refused: int

    @property
    def inputs(self) -> int:
        return self.read + self.refused


def fuzz(reader: Reader, count: int, seed: int = 0) -> Tally:
    """Feed so many inputs to a reader; fails with what came out but a value or an error of its kind, and of what."""
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    with _bounded_memory():
        for number, given in enumerate(islice(reader.inputs(np.random.default_rng(seed)), count)):
            try:
                with _in_time():
                    reader.read(given)
                outcomes["read"] += 1
            except reader.errors as error:
                outcomes["refused"] += 1
                if fault := fault_of(str(error), given if isinstance(given, str) else ""):
                    failures.setdefault(f"{fault}: {_where(error)}", _told(number, given, error))
            except (Exception, Late) as error:
                failures.setdefault(f"{type(error).__name__} {_where(error)}", _told(number, given, error))
            if len(failures) >= FAILURES:
                break
    assert not failures, "\n\n".join(f"{where}\n{told}" for where, told in failures.items())
    return Tally(outcomes["read"], outcomes["refused"])


def shared_out(total: int, shares: Mapping[Callable[..., Reader], int]) -> list[Any]:
    """Each of the readers, with its number of inputs, as parameters of a test; `total` in all at least."""
    whole = sum(shares.values())
    return [pytest.param(reader, -(-total * share // whole), id=reader.__name__) for reader, share in shares.items()]


def fault_of(message: str, typed: str = "") -> str | None:
    """What a message is that no person should get; `typed` is what a person typed, who may see it again."""
    line = " ".join(message.split()) if typed else message  # as the command line prints it
    if not line.strip():
        return "an empty message"
    if len(line) > LONGEST_LINE + 6 * len(typed):
        return f"a message of {len(line)} characters"
    if not line.isprintable() and (typed.isprintable() or not typed):
        return "a message of several lines, or with characters that cannot be printed"
    return None


# inputs


def both(seeds: Sequence[Any], seal: Callable[[Any], Any] | None = None) -> Callable[[Rng], Iterator[bytes]]:
    """Documents mutated as JSON, then sealed again or not, and as bytes."""

    def inputs(rng: Rng) -> Iterator[bytes]:
        kinds = (
            mutated_json(seeds, rng, seal or sealed_again),
            mutated_json(seeds, rng),
            mutated_bytes([as_json(seed) for seed in seeds], rng),
        )
        while True:
            yield next(kinds[rng.choice(3, p=[0.6, 0.2, 0.2])])

    return inputs


def mutated_bytes(seeds: Sequence[bytes], rng: Rng) -> Iterator[bytes]:
    """Without end: the seeds with bytes flipped, cut, doubled, moved and put in; and random bytes."""
    while True:
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 4)):
            at, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 9))
            match rng.integers(9):
                case 0 if data:
                    data[at % len(data)] ^= 1 << int(rng.integers(8))
                case 1:
                    del data[at:]
                case 2:
                    del data[at : at + size]
                case 3:
                    data[at:at] = BYTES[rng.integers(len(BYTES))]
                case 4:
                    data[at:at] = data[at : at + 8 * size]
                case 5:
                    data[at:at] = rng.bytes(size)
                case 6:
                    data[at:] = data[int(rng.integers(len(data) + 1)) :]
                case 7:
                    data[at : at + size] = b"\0" * size
                case 8 if not rng.integers(8):
                    data = bytearray(rng.bytes(int(rng.integers(200))))
        yield bytes(data)


def mutated_text(seeds: Sequence[str], rng: Rng) -> Iterator[str]:
    """Without end: the seeds mutated by character, among them ones that are no text on a disk."""
    for data in mutated_bytes([seed.encode("utf-8", "surrogatepass") for seed in seeds], rng):
        text = data.decode("utf-8", "surrogateescape" if rng.integers(2) else "replace")
        if not rng.integers(4):
            at = int(rng.integers(len(text) + 1))
            text = text[:at] + (*TEXTS, *ODD)[rng.integers(len(TEXTS) + len(ODD))] + text[at:]
        yield text


def mutated_json(
    seeds: Sequence[Any], rng: Rng, seal: Callable[[Any], Any] = lambda document: document
) -> Iterator[bytes]:
    """Without end: the documents with some of their values changed; `seal` puts right what says that they are whole."""
    while True:
        document = {"": copy.deepcopy(seeds[rng.integers(len(seeds))])}
        for _ in range(rng.integers(1, 4)):
            _mutate_(document, rng)
        yield as_json(seal(document.get("")))


def as_json(document: Any) -> bytes:
    """The document as text, with what JSON does not have: NaN, numbers as they are written, half characters."""
    return _RAW.sub(lambda found: json.loads(f'"{found[1]}"'), json.dumps(document)).encode()


def sealed_again(document: Any) -> Any:
    """The document with the checksum of what is in it now, where it can have one."""
    if not isinstance(document, dict) or "checksum" not in document:
        return document
    content = {name: value for name, value in document.items() if name != "checksum"}
    try:
        return {**document, "checksum": checksum(json.loads(as_json(content)))}
    except (ValueError, RecursionError):
        return document


def _mutate_(document: Any, rng: Rng) -> None:
    """One change somewhere in a JSON value, in place."""
    if not (places := list(_places(document))):
        return
    parent, key = places[rng.integers(len(places))]
    other, foreign = places[rng.integers(len(places))]
    match rng.integers(9):
        case 0 | 1 | 2 | 3:
            parent[key] = copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])
        case 4:
            del parent[key]
        case 5 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        case 5:
            parent[str(HOSTILE[rng.integers(len(HOSTILE))])] = parent.pop(key)
        case 6:
            parent[key] = copy.deepcopy(other[foreign])
        case 7 if isinstance(parent[key], int | float):
            parent[key] = [-parent[key], parent[key] + 1, parent[key] * 2**40, float(parent[key]), str(parent[key])][
                rng.integers(5)
            ]
        case 7:
            parent[key] = [parent[key]]
        case 8 if isinstance(parent[key], str) and parent[key]:
            at = int(rng.integers(len(parent[key])))
            parent[key] = parent[key][:at] + chr(int(rng.integers(1, 0x300))) + parent[key][at + 1 :]
        case _:
            parent[key] = {"a": parent[key]}


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a JSON value, as what holds it and where."""
    for key in document if isinstance(document, dict) else range(len(document)):
        yield document, key
        if isinstance(document[key], dict | list):
            yield from _places(document[key])


# limits


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """While inside, the process may have so much more memory; beyond that there is a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late(f"more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _where(error: BaseException) -> str:
    """The last line of the project that an error came through."""
    at, frame = error.__traceback__, ""
    while at is not None:
        code = at.tb_frame.f_code
        if "discopt" in code.co_filename and "tests" not in code.co_filename:
            frame = f"{code.co_filename.rpartition('/')[2]}:{at.tb_lineno} in {code.co_name}"
        at = at.tb_next
    return frame


def _told(number: int, given: Any, error: BaseException) -> str:
    return f"  input {number}: {_short(repr(given))}\n  {type(error).__name__}: {_short(str(error))!r}"


def _short(text: str) -> str:
    return text if len(text) < 700 else f"{text[:400]} ... {text[-200:]}"
