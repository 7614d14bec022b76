"""Where text comes from: `builtin`, a local file, or a dataset of the Hugging Face hub.

A source is read as a stream of documents, only as far as it is asked for. Search text and held-out text never
share a document: they are a dataset's own splits where it has a training and a test split, and otherwise every
document goes to one of the two (see `divide`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from discopt.wording import one_line
from discopt_llm.errors import DataError

Role = Literal["search", "heldout", "all"]
Documents = Generator[str, None, None]

ACCEPTED = (
    "builtin, wikitext2, c4, fineweb-edu, a .txt file, a .jsonl or .parquet file (FILE:COLUMN if the text is not "
    "in column 'text'), or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"
)
HELD_OUT_SHARE = 0.2  # of the text, where a source has to be divided
HUB_TOKENS = 131_072  # read from a hub dataset when no number is asked for
PASSAGE_CHARACTERS = 2_000  # paragraphs of a .txt file are gathered into documents of about this length
HUB_SECONDS = 10.0  # to wait for the hub's first answer
HUB_RETRIES = 3  # of a broken connection while documents stream


@dataclass(frozen=True, eq=False)
class Text:
    """Documents of one source for one role, not yet read."""

    name: str
    documents: Documents  # can be read once
    joined: bool  # parts of one running text, to be parted by blank lines only
    default_tokens: int | None  # how many to read when no number is asked for; None: all


def open_text(source: str, role: Role) -> Text:
    """The text of `source` that `role` may see; reading starts with the first document asked for.

    A document is a topic of `builtin`, a row of a .jsonl or .parquet file or of a dataset, and in a .txt file as many
    paragraphs (parted by blank lines) as it takes to reach 2,000 characters.

    role="search" is what a search may measure on, role="heldout" what its result is judged on; role="all" is the
    held-out split of a dataset that has one, else the source undivided. Raises DataError for an unknown source, and
    while documents are read for whatever stands in the way of reading them.
    """
    if role not in get_args(Role):
        raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {role!r}")
    if source == "builtin":
        return Text(source, _for_role(_builtin(), role), joined=False, default_tokens=None)
    if source in _NAMED:
        return _NAMED[source].open(source, role)
    if source.startswith("hf:"):
        return _parse_hub(source).open(source, role)
    file = re.fullmatch(r"(?P<path>.+\.(?:txt|(?P<rows>jsonl|parquet)))(?::(?P<column>[^:/]+))?", source, re.I)
    if file is None or (file["column"] and not file["rows"]):
        raise DataError(f"unknown text source {source!r}; expected {ACCEPTED}")
    path, column = Path(file["path"]), file["column"] or "text"
    if not file["rows"]:
        return Text(source, _for_role(_passages(path), role), joined=True, default_tokens=None)
    rows = _jsonl(path, column) if file["rows"].lower() == "jsonl" else _parquet(path, column)
    return Text(source, _for_role(rows, role), joined=False, default_tokens=None)


def whereabouts(source: str, directory: str | Path = ".") -> str:
    """What a source names when it is given in `directory`: equal for the same files and the same datasets."""
    if source == "builtin" or source in _NAMED or source.startswith("hf:"):
        return source
    return str((Path(directory) / source).resolve())


def divide(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pair every document with whether it is held out: about a fifth of the text, spread evenly over the source.

    A document is held out whenever less than a fifth of the characters before it are. A document that came before
    (up to white space and letter case) follows the first one's side. A pure function of the documents' order.
    """
    seen: dict[bytes, bool] = {}
    held_out, total = 0, 0
    for document in documents:
        key = hashlib.blake2b(_words(document).encode(errors="replace"), digest_size=16).digest()
        side = seen.setdefault(key, held_out < HELD_OUT_SHARE * total)
        held_out += len(document) if side else 0
        total += len(document)
        yield document, side


def _for_role(documents: Iterable[str], role: Role) -> Documents:
    documents = (document for document in documents if document.strip())
    if role == "all":
        yield from documents
    else:
        yield from (document for document, held_out in divide(documents) if held_out == (role == "heldout"))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


# Local text


def _builtin() -> Iterator[str]:
    """The topics of Python's own `help()`, each paragraph once.

    Topics contain one another ("compound" has the text of "if"), so a paragraph stays only in the longest topic that
    has it; topics come in the order of their names' hashes, which mixes long and short ones.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without pydoc_data, which 'builtin' reads; name another source") from None
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in _paragraphs(topics[name]):
            key = _words(paragraph)
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        documents[name] = "\n\n".join(fresh)
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield documents[name]


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in re.split(r"\n[^\S\n]*\n", text) if paragraph.strip()]


def _passages(path: Path) -> Iterator[str]:
    """Documents of a .txt file: paragraphs, parted by blank lines, gathered up to PASSAGE_CHARACTERS."""
    with _reading(path):
        text = path.read_text(encoding="utf-8-sig")
    passage: list[str] = []
    for paragraph in _paragraphs(text):
        passage.append(paragraph)
        if sum(map(len, passage)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(passage)
            passage = []
    yield "\n\n".join(passage)


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with _reading(path):
        file = path.open("rb")
    with file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            with _reading(path, where):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {one_line(error)}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield _cell(row, column, where)


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow, which is not installed") from None
    with _reading(path):
        path.open("rb").close()  # so that a missing file is reported as such
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {one_line(error)}") from None
    with file:
        if column not in file.schema_arrow.names:
            raise DataError(_no_column(str(path), column, file.schema_arrow.names))
        batches = file.iter_batches(batch_size=256, columns=[column])
        for number in itertools.count():
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} is damaged after row {number * 256}: {one_line(error)}") from None
            if batch is None:
                return
            for row in rows:
                yield _cell(row, column, str(path))


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a row's column; an empty cell is an empty text."""
    if column not in row:
        raise DataError(_no_column(where, column, row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: column {column!r} holds {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: column {column!r} holds half a character (an unpaired surrogate)") from None
    return text


def _no_column(where: str, column: str, columns: Iterable[str]) -> str:
    return f"{where}: no column {column!r}; there is {one_line(', '.join(map(repr, columns)) or 'none at all')}"


@contextmanager
def _reading(path: Path, where: str = "") -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{where or path}: not UTF-8 text: byte 0x{byte:02x} at position {error.start}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


# The hub


@dataclass(frozen=True)
class _Hub:
    """A dataset of the hub. With the same split for both roles, or one unknown split, its documents are divided."""

    name: str
    config: str | None
    search: str | None = None  # split; None: found out when the dataset is opened
    heldout: str | None = None
    column: str = "text"
    lines: bool = False  # rows are the lines of one running text
    heldout_documents: int | None = None  # a benchmark of this many documents, joined by blank lines

    def open(self, source: str, role: Role) -> Text:
        benchmark = role != "search" and (self.lines or self.heldout_documents is not None)
        return Text(
            source,
            self._documents(source, role),
            joined=self.lines or benchmark,
            default_tokens=None if benchmark else HUB_TOKENS,
        )

    def _documents(self, source: str, role: Role) -> Documents:
        obstacle = _hub_obstacle(self.name)
        with _hub_settings(offline=obstacle is not None):
            rows, divided = self._rows(source, role, obstacle)
            texts = (_cell(row, self.column, source) for row in rows)
            if divided:
                yield from _for_role(texts, role)
            elif self.lines:
                yield from texts  # blank lines included: they belong to the benchmark's text
            else:
                texts = (text for text in texts if text.strip())
                yield from itertools.islice(texts, None if role == "search" else self.heldout_documents)

    def _rows(self, source: str, role: Role, obstacle: str | None) -> tuple[Iterator[dict[str, Any]], bool]:
        """The rows that `role` may see, and whether they are still to be divided between the roles."""
        import datasets

        split = self.search if role == "search" else self.heldout
        divided = self.search == self.heldout
        with _loading(source, obstacle):
            dataset = datasets.load_dataset(self.name, self.config, split=split, streaming=True)
            if split is None:
                train = "train" if "train" in dataset else None
                test = next((name for name in ("test", "validation", "dev") if name in dataset), None)
                divided = train is None or test is None
                whole = train or test or next(iter(dataset))
                dataset = dataset[whole if divided else train if role == "search" else test]
        return _guarded(dataset, source), divided


def _guarded(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    while True:
        with _loading(source):
            row = next(iterator, None)
        if row is None:
            return
        yield row


_NAMED = {
    "wikitext2": _Hub("Salesforce/wikitext", "wikitext-2-raw-v1", search="train", heldout="test", lines=True),
    "c4": _Hub("allenai/c4", "en", search="train", heldout="validation", heldout_documents=1100),
    "fineweb-edu": _Hub("HuggingFaceFW/fineweb-edu", "sample-10BT", search="train", heldout="train"),
}


def _parse_hub(source: str) -> _Hub:
    parts = source.removeprefix("hf:").split(":")
    if len(parts) > 4 or not parts[0]:
        raise DataError(f"expected hf:NAME[:CONFIG[:SPLIT[:COLUMN]]], got {source!r}")
    name, config, split, column = (part or None for part in parts + [""] * (4 - len(parts)))
    assert name is not None
    return _Hub(name, config, search=split, heldout=split, column=column or "text")


def _hub_obstacle(name: str) -> str | None:
    """Ask the hub once, with a time limit, for the dataset: what stands in the way of reaching it, None if nothing.

    `datasets` itself asks again and again with growing pauses: 23 seconds without a network, minutes where a firewall
    swallows the packets. Raises DataError if there is no such dataset.
    """
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    except ImportError:
        raise DataError(f"reading the dataset {name} needs the package 'datasets', which is not installed") from None
    if Path(name).is_dir():
        return None
    missing = DataError(f"the Hugging Face hub has no dataset {name!r} that can be read from here")
    if name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}"):
        raise missing  # "json" and the like would read whatever lies in the working directory
    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS, expand=["sha"])
    except (RepositoryNotFoundError, HFValidationError):
        raise missing from None
    except Exception as error:  # its class depends on the HTTP library that huggingface_hub was built on
        return one_line(error)
    return None


@contextmanager
def _hub_settings(*, offline: bool) -> Iterator[None]:
    """While inside: few retries, no progress bars, and nothing but the local cache when offline."""
    import datasets

    settings: dict[str, Any] = {
        "STREAMING_READ_MAX_RETRIES": HUB_RETRIES,
        "STREAMING_OPEN_MAX_RETRIES": HUB_RETRIES,
        "HF_HUB_OFFLINE": offline or datasets.config.HF_HUB_OFFLINE,
    }
    before = {name: getattr(datasets.config, name) for name in settings}
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for name, value in settings.items():
            setattr(datasets.config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(datasets.config, name, value)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _loading(source: str, obstacle: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets` raises whatever its readers, codecs and servers raise
        if obstacle is None:
            raise DataError(f"cannot load {source}: {one_line(error)}") from error
        message = f"cannot reach the Hugging Face hub for {source} ({obstacle}), and the local cache does not have it"
        raise DataError(message) from error
