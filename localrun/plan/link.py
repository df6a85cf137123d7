"""What lies between two hosts: how long messages take; read from JSON, a preset's or what `localrun doctor` wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from localrun.files import user_path
from localrun.plan.fields import Fields
from localrun.plan.known import load_data, read_json

DEFAULT_LINK = "10GbE"


@dataclass(frozen=True)
class Link:
    """Between the first rank and each other one.

    Attributes:
        round_trip_s: two empty messages, there and back, the overhead of both ends included.
        message_s: what each message more costs the one who sends or receives many.
        bytes_per_s: of large messages, one way.
        sources: where each number comes from.
    """

    name: str
    title: str
    round_trip_s: float
    message_s: float
    bytes_per_s: float
    sources: dict[str, str] = field(default_factory=dict)

    def exchange_s(self, out_bytes: float, back_bytes: float, n_remote: int) -> float:
        """From the first of n_remote messages that leave until the last answer is there, without what they answer.

        All go through the first rank's own adapter, one after another.
        """
        each = 2 * self.message_s + (out_bytes + back_bytes) / self.bytes_per_s
        return self.round_trip_s - 2 * self.message_s + n_remote * each

    def document(self) -> dict[str, Any]:
        """As JSON that load_link reads again."""
        numbers = {key: asdict(self)[key] for key in ("round_trip_s", "message_s", "bytes_per_s")}
        return {"title": self.title} | {
            key: {"value": value, "source": self.sources.get(key, "")} for key, value in numbers.items()
        }


def links() -> list[str]:
    """The presets."""
    return list(load_data("links"))


def load_link(name: str) -> Link:
    """A preset, or the description in a JSON file. Raises LocalrunError."""
    known = load_data("links")
    if name in known:
        return parse_link(known[name], name, f"preset {name}")
    path = user_path(name)
    document = read_json(path, name, f"no such link file; presets: {', '.join(known)}")
    return parse_link(document, path.stem, name)


def parse_link(document: Any, name: str, where: str) -> Link:
    """The link that a JSON document describes. Raises LocalrunError naming the key, what was found and expected."""
    fields = Fields(document, where)
    title = fields.text("title", name)
    message_s = fields.number("message_s", at_least=0.0)
    round_trip_s, rate = fields.number("round_trip_s"), fields.number("bytes_per_s")
    if round_trip_s < 2 * message_s:
        fields.fail("round_trip_s", round_trip_s, "at least two of message_s, which it includes")
    fields.refuse_unread()
    return Link(name, title, round_trip_s, message_s, rate, fields.sources)
