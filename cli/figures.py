"""Lines of figures that several commands print: of a reply, of messages between ranks, of prompts read elsewhere."""

from typing import TYPE_CHECKING

from cli.output import rate, size

if TYPE_CHECKING:
    from localrun.generate.session import Session, Stats


def timing_line(session: "Session") -> str:
    """How many tokens the last reply read and wrote, and how fast."""
    stats = session.stats
    read = rate(stats.prompt_tokens - stats.reused_tokens, stats.prefill_s)
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    wrote = rate(stats.generated_tokens, stats.decode_s)
    prompt = f"prompt {stats.prompt_tokens} tokens{reused} {read} t/s"
    return f"[ {prompt} | reply {stats.generated_tokens} tokens {wrote} t/s{_drafts(stats)} ]"


def _drafts(stats: "Stats") -> str:
    """What drafts did for the reply, if there were any."""
    if not stats.drafted_tokens:
        return ""
    accepted = f"{stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted"
    gain = f", {stats.speed_up:.2f} times plain speed" if stats.speed_up else ""
    return f" | {accepted}, {stats.tokens_per_step:.2f} tokens a step{gain}"


def messages_line(figures: dict[str, float]) -> str:
    """What messages between ranks took so far."""
    sent = f"sent {size(int(figures['bytes_out']))}, received {size(int(figures['bytes_back']))}"
    parts = [f"messages between ranks: {sent}"]
    if "overlap" in figures:
        us = f"{figures['message_us_median']:.0f} us a layer (median; 90%: {figures['message_us_p90']:.0f})"
        parts.append(f"{us}, {figures['overlap']:.0%} of the others' time under work of its own")
    if "many_overlap" in figures:
        parts.append(f"of prompts {figures['many_overlap']:.0%}")
    return "; ".join(parts)


def reading_line(figures: dict[str, float]) -> str:
    """What other hosts have read so far."""
    sent = f"rows sent {size(int(figures['bytes_out']))}, received {size(int(figures['bytes_back']))}"
    took = f"{figures['computing_s']:.2f} s of computing, {figures['on_top_s']:.2f} on top"
    return f"read on other hosts: {figures['tokens']:.0f} tokens; {sent}; {took}"
