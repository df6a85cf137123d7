"""A reply's tokens to its text: whole characters, up to a stop string."""

from collections.abc import Mapping, Sequence

from localrun.generate.stop_strings import StopStrings, with_marks
from localrun.text.tokenizer import Tokenizer


class ReplyText:
    """Tokens in, pieces of text out; what could be the beginning of a stop string is held back.

    Attributes:
        found: a stop string has come; nothing more will.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], spelled: Mapping[int, str] | None = None):
        """
        Args:
            stop: texts that end the reply and are no part of it; they may spell control tokens.
            spelled: control tokens that are part of the text, with their texts; others are not.
        """
        self._decoder, self._spelled = tokenizer.reply_decoder(), spelled or {}
        stops, self._marks = with_marks(stop, tokenizer.controls if stop else {})
        self._given = [text for text in stop if text]
        self._text, self._hidden = StopStrings(stops), dict.fromkeys(map(ord, self._marks.values()))

    @property
    def found(self) -> bool:
        """Whether a stop text has come."""
        return self._text.found

    @property
    def stop(self) -> str | None:
        """The stop string that has come, as it was given."""
        return None if self._text.which is None else self._given[self._text.which % len(self._given)]

    def push(self, token: int) -> str:
        """The text that is certain by this token."""
        text = self._decoder.push(token) + self._marks.get(token, "") + self._spelled.get(token, "")
        return self._text.push(text).translate(self._hidden)

    def flush(self) -> str:
        """What is held back, at the end of the tokens; nothing after a stop string."""
        return (
            "" if self.found else (self._text.push(self._decoder.flush()) + self._text.flush()).translate(self._hidden)
        )
