"""Completion of commands, and of what stands behind them, on a terminal."""

from collections.abc import Iterable, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document


class CommandCompleter(Completer):
    """Names of commands behind a slash; then words, or names of files."""

    def __init__(self, commands: Mapping[str, tuple[str, tuple[str, ...] | None]]) -> None:
        """commands: what each does, and the words that may follow it; None for names of files."""
        self._commands = commands
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Commands that begin as the line does; behind a command its words. Nothing elsewhere."""
        name, space, rest = document.text_before_cursor.partition(" ")
        if not name.startswith("/") or "\n" in document.text:
            return
        if not space:
            for command, (what, _) in self._commands.items():
                if command.startswith(name):
                    yield Completion(command, start_position=-len(name), display_meta=what)
            return
        words = self._commands.get(name, ("", ()))[1]
        if words is None:
            yield from self._files.get_completions(Document(rest), complete_event)
        elif " " not in rest:
            yield from (Completion(word, start_position=-len(rest)) for word in words if word.startswith(rest))
