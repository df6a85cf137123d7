"""generate --batch: many prompts in one load, a line of JSON for each; what was killed at any moment can go on.

A line says nothing that differs from run to run, such as times. Every reply begins from the same state, the prefix that
the first two prompts share, and from a seed of its own. So a batch that was killed and resumed writes the same file.
"""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os.path import samefile
from typing import TYPE_CHECKING, Any

import localrun
from cli.model import SETTINGS
from cli.output import progress_bar, write
from cli.prompts import Prompts, collected
from cli.text import read_text
from localrun.errors import ContextFullError, LocalrunError
from localrun.files import Lines, user_path
from localrun.generate.reasoning import CONTENT, REASONING
from localrun.text.chat_template import TemplateError

if TYPE_CHECKING:
    from localrun.engine import Engine
    from localrun.generate.sampling import Sampling
    from localrun.generate.session import Session

_FIELDS = ("id", "prompt", "messages", "system", "max_tokens", "stop", *SETTINGS)
_SEEDS = 1 << 32
CUT_REASONS = ("length", "context")


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of the batch: what names it, a text or messages, and what it sets otherwise than the command."""

    id: str | int
    prompt: str | None
    messages: list[dict[str, Any]] | None
    system: str | None
    max_tokens: int | None
    stop: list[str]
    sampling: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Usual:
    """What the command says of all items, where an item says nothing else.

    Attributes:
        sampling: with the seed of the first item; each has the next one.
        limit: tokens of a reply; None for as many as come.
    """

    sampling: "Sampling"
    limit: int | None
    stop: Sequence[str]
    system: str | None


def read_items(file: str) -> list[Item]:
    """The batch of a file, or of stdin for "-". Raises LocalrunError naming the line that is none."""
    lines = [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    items, seen = [], dict[str | int, int]()
    for index, (number, line) in enumerate(lines):
        try:
            items.append(_item(line, index))
        except LocalrunError as error:
            raise LocalrunError(f"{file}: line {number}: {error}") from None
        if (before := seen.setdefault(items[-1].id, number)) != number:
            raise LocalrunError(f"{file}: line {number}: has the id of line {before}, {items[-1].id!r}")
    if not items:
        raise LocalrunError(f"{file}: holds no prompts")
    return items


def _item(line: str, index: int) -> Item:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise LocalrunError('is no JSON object; expected {"prompt": "..."} or {"messages": [...]}')
    if unknown := [name for name in given if name not in _FIELDS]:
        raise LocalrunError(f"unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    if ("prompt" in given) == ("messages" in given):
        raise LocalrunError("expected one of prompt and messages")
    for name in ("prompt", "system"):
        if name in given and not isinstance(given[name], str):
            raise LocalrunError(f"{name} is no text")
    if "messages" in given and "system" in given:
        raise LocalrunError("system goes with prompt; among messages it is a message")
    id = given.get("id", index)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise LocalrunError("id is neither a text nor a whole number")
    limit = given.get("max_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise LocalrunError("max_tokens is no whole number of 1 or more")
    sampling = {name: given[name] for name in SETTINGS if name in given}
    localrun.Sampling(**sampling)
    messages = localrun.arguments.messages(given["messages"]) if "messages" in given else None
    stop = localrun.arguments.texts("stop", given.get("stop", []))
    return Item(id, given.get("prompt"), messages, given.get("system"), limit, stop, sampling)


class Results:
    """The lines that are written, on stdout or in a file that may have some of them.

    Attributes:
        n_done: items that have their line.
        n_cut, n_failed: those of them whose reply a limit cut, and that got none.
        seed: of the command that wrote the first lines; None if there is none to be known.
    """

    def __init__(self, output: str | None, resume: bool, items: list[Item], batch: str) -> None:
        """Raises LocalrunError where the file is there already, or, to be resumed, is not of this batch."""
        self.n_done = self.n_cut = self.n_failed = 0
        self.seed: int | None = None
        self._file: Lines | None = None
        if output is None:
            return
        path = user_path(output)
        if batch != "-" and path.exists() and samefile(path, user_path(batch)):
            raise LocalrunError(f"{output}: is the batch itself; name another file for its results")
        self._file = Lines(path, resume)
        for line in self._file.read():
            self._resume(line, items, f"{output}: line {self.n_done + 1}")

    def add(self, document: dict[str, Any]) -> None:
        """Write a line: it is there wholly, or the next start takes what there is of it away."""
        text = json.dumps(document, ensure_ascii=False)
        if self._file is None:
            write(f"{text}\n")
        else:
            self._file.append(text.encode("utf-8", "backslashreplace"))  # half characters, as JSON spells them
        self._count(document)

    def _resume(self, line: bytes, items: list[Item], place: str) -> None:
        """Take in a line that is there."""
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or "id" not in document:
            raise LocalrunError(f"{place}: is no result of a batch")
        item = items[self.n_done] if self.n_done < len(items) else None
        if item is None or document["id"] != item.id:
            expected = f"the batch has {item.id!r} there" if item else "the batch has fewer lines"
            raise LocalrunError(f"{place}: is of id {document['id']!r}; {expected}")
        if self.seed is None and "seed" not in item.sampling and type(document.get("seed")) is int:
            self.seed = (document["seed"] - self.n_done) % _SEEDS
        self._count(document)

    def _count(self, document: dict[str, Any]) -> None:
        self.n_cut += document.get("finish_reason") in CUT_REASONS
        self.n_failed += "error" in document
        self.n_done += 1


class Batch:
    """Prompts of a file, and their results as far as there are any."""

    def __init__(self, file: str, output: str | None, resume: bool) -> None:
        """Raises LocalrunError if the file is no batch, or the output cannot be begun, or gone on with."""
        if resume and output is None:
            raise LocalrunError("--resume needs the file of the results, -o")
        self.items = read_items(file)
        self._output, self.results = output, Results(output, resume, self.items, file)

    def seed(self, given: int | None) -> int | None:
        """The first item's: what is given, or what the results were begun with. Raises LocalrunError if they differ."""
        begun = self.results.seed
        if given is not None and begun is not None and given % _SEEDS != begun:
            raise LocalrunError(f"--seed {given}, but {self._output} was begun with {begun}")
        return given if begun is None else begun

    def run(self, engine: "Engine", prompts: Prompts, usual: Usual) -> bool:
        """Write a line for every item that has none; whether a limit cut a reply.

        A prompt that cannot be answered gets a line with the reason, and at the end there is a LocalrunError.
        """
        items, results = self.items, self.results
        if results.n_done < len(items):
            with progress_bar() as report:
                for done in self._replies(engine, prompts, usual):
                    results.add(done)
                    if report:
                        report(results.n_done, len(items), f"{results.n_done} of {len(items)}")
        if results.n_failed:
            raise LocalrunError(f"{results.n_failed} of {len(items)} prompts got no reply; their lines say why")
        return results.n_cut > 0

    def _replies(self, engine: "Engine", prompts: Prompts, usual: Usual) -> Iterator[dict[str, Any]]:
        """The documents of the items that have none."""

        def ids_of(item: Item) -> list[int] | TemplateError:
            try:
                if item.messages is not None:
                    return prompts.of_messages(item.messages)
                return prompts.of_text(item.prompt or "", usual.system if item.system is None else item.system)
            except TemplateError as error:
                return error

        shared = _shared([ids_of(item) for item in self.items[:2]]) if engine.model.can_forget() else []
        session, begun = engine.session(), self.results.n_done
        for index, ids in enumerate(_ahead(ids_of, self.items[begun:]), begun):
            item = self.items[index]
            seed = ((usual.sampling.seed or 0) + index) % _SEEDS
            sampling = dataclasses.replace(usual.sampling, **{"seed": seed, **item.sampling})
            try:
                if isinstance(ids, TemplateError):
                    raise ids
                _begin(session, shared)
                pieces = session.reply(
                    ids,
                    sampling,
                    max_tokens=item.max_tokens or usual.limit,
                    stop=prompts.stops([*usual.stop, *item.stop]),
                    spelled=prompts.spelled,
                )
                parts = collected(prompts.parts(ids, pieces))
                yield {"id": item.id, **_document(session, parts, sampling)}
            except (TemplateError, ContextFullError) as error:
                yield {"id": item.id, "error": str(error)}


def _shared(prompts: list[list[int] | TemplateError]) -> list[int]:
    """What the first two prompts have in common, a system message say."""
    from localrun.generate.session import n_common

    known = [ids for ids in prompts if not isinstance(ids, TemplateError)]
    if len(known) < 2:
        return []
    return known[0][: n_common(*known)]


def _begin(session: "Session", shared: list[int]) -> None:
    """Have the session hold these tokens and no others, read as one prompt."""
    session.forget(len(shared) if session.ids[: len(shared)] == shared else 0)
    if rest := shared[len(session.ids) :]:
        session.advance(rest)


def _ahead(function: Callable[[Item], Any], items: list[Item]) -> Iterator[Any]:
    """The function's results, in order; the next one is computed while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque[Future[Any]]()
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _document(session: "Session", parts: dict[str, str], sampling: "Sampling") -> dict[str, Any]:
    stats = session.stats
    return {
        "text": parts[CONTENT],
        **({REASONING: parts[REASONING]} if REASONING in parts else {}),
        "finish_reason": session.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "seed": sampling.seed,
    }
