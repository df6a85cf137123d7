"""localrun generate: one prompt, one reply."""

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.figures import timing_line
from cli.output import note, print_json, rate
from cli.text import check_text, read_text
from localrun.errors import LocalrunError

CUT = 3  # the exit code for replies that a limit cut, where it is asked for

if TYPE_CHECKING:
    from cli.batch import Batch, Usual
    from cli.prompts import Prompts
    from localrun.engine import Engine
    from localrun.generate.constraint import Constraint
    from localrun.generate.reasoning import Part
    from localrun.generate.sampling import Sampling
    from localrun.generate.session import Session


Prompt = Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is; control tokens that it spells count.")]
FailOnCut = Annotated[bool, typer.Option("--fail-on-cut", help="Exit with 3 if -n or the context cut a reply.")]


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """Many prompts, and where their results go."""

    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help="Reply to each line of a JSONL file: an object with prompt or messages, and id, max_tokens, seed, ...",
            show_default=False,
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where a batch's results go.", show_default=False),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a batch's results that are there.")] = False

    def opened(self, has_prompt: bool) -> "Batch | None":
        """The batch, if there is one. has_prompt: whether there is an option that goes with one prompt alone."""
        from cli.batch import Batch

        if self.batch is not None and has_prompt:
            raise typer.BadParameter("--batch has the prompts, and writes JSON: it goes with none of -p, -f and --json")
        if self.batch is None and (self.output is not None or self.resume):
            raise typer.BadParameter("-o and --resume go with --batch")
        return None if self.batch is None else Batch(self.batch, self.output, self.resume)


@options.takes(
    batch=BatchOptions(),
    sampling=options.SamplingOptions(),
    load=options.LoadOptions(),
    ranks=options.RankOptions(),
    template=options.TemplateOptions(),
)
def generate(
    model: options.Model = None,
    prompt: Prompt = None,
    file: options.File = None,
    n_tokens: options.NTokens = 128,
    raw: Raw = False,
    system: options.System = None,
    stop: options.Stop = None,
    json_schema: options.JsonSchema = None,
    grammar: options.Grammar = None,
    top_logprobs: options.TopLogprobs = None,
    *,
    batch: BatchOptions,
    fail_on_cut: FailOnCut = False,
    template: options.TemplateOptions,
    sampling: options.SamplingOptions,
    load: options.LoadOptions,
    ranks: options.RankOptions,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Reply once to a prompt from -p, -f, or stdin.

    The prompt is the user's message in the model's chat template; --raw continues it as plain text.
    With --batch there are many, and a line of JSON for each. A reply of a schema or a grammar is whole unless it is cut
    after -n tokens.
    """
    from cli.batch import CUT_REASONS, Usual
    from cli.model import given_sampling, given_variables, max_tokens, open_model, sampling_for
    from cli.prompts import Prompts, collected

    _check_raw(raw, system, template)
    if top_logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs is for --json")
    limit, variables = max_tokens(n_tokens), given_variables(template)
    constraint = _constraint(json_schema, grammar)
    if system is not None:
        system = check_text(system, "the system message")
    work = batch.opened(prompt is not None or file is not None or as_json)
    sampling = dataclasses.replace(sampling, seed=_seed(sampling.seed, work))
    given = given_sampling(sampling, constraint=constraint, top_logprobs=top_logprobs)
    text = "" if work else _prompt(prompt, file)
    started = time.perf_counter()
    with open_model(model, load, verbose, template.chat_template, ranks) as engine:
        load_s = time.perf_counter() - started
        prompts = Prompts(engine, raw, template.think, variables)
        usual = Usual(prompts.constrained(sampling_for(engine, given)), limit, stop or [], system)
        if work is not None:
            is_cut = work.run(engine, prompts, usual)
        else:
            session = engine.session()
            parts = _reply(session, prompts, text, usual)
            if as_json:
                print_json(_document(engine, session, collected(parts), load_s, usual.sampling))
            else:
                _show(parts, session, usual, template.show_thinking, verbose)
            is_cut = session.finish_reason in CUT_REASONS
    if fail_on_cut and is_cut:
        raise typer.Exit(CUT)


def _reply(session: "Session", prompts: "Prompts", text: str, usual: "Usual") -> Iterator["Part"]:
    from cli.model import stream

    ids, stops = prompts.of_text(text, usual.system), prompts.stops(usual.stop)
    return prompts.parts(ids, stream(session, ids, usual.sampling, usual.limit, stops, prompts.spelled))


def _show(parts: Iterator["Part"], session: "Session", usual: "Usual", thoughts: bool, verbose: bool) -> None:
    """Write the reply as it comes; then on stderr what has cut it, if something has, and how fast it was."""
    from cli.terminal.display import FOLD, SHOW, PlainDisplay

    display = PlainDisplay(SHOW if thoughts else FOLD)
    for kind, piece in parts:
        display.push(kind, piece)
    display.end()
    if session.finish_reason == "context":
        note(f"the context of {session.engine.ctx} tokens is full")
    if verbose:
        note(timing_line(session))
    if usual.sampling.constraint and session.finish_reason == "length":
        note(f"the reply was cut after {usual.limit} tokens and is not whole; -n allows more")


def _seed(given: int | None, work: "Batch | None") -> int:
    """Drawn here where none is given, so that --json and a batch's lines can tell it."""
    seed = given if work is None else work.seed(given)
    return secrets.randbelow(2**32) if seed is None else seed


def _check_raw(raw: bool, system: str | None, template: options.TemplateOptions) -> None:
    given = {
        "--system": system is not None,
        "--think": template.think is not options.ThinkChoice.auto,
        "--template-var": bool(template.template_var),
        "--chat-template": template.chat_template is not None,
    }
    for name in (name for name, is_given in given.items() if raw and is_given):
        raise typer.BadParameter(f"{name} needs the chat template, which --raw leaves out")


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise typer.BadParameter("give the prompt with -p or with -f, not both")
    if prompt is not None:
        text = check_text(prompt, "the prompt")
    elif file is not None:
        text = read_text(file)
    elif sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give one with -p or -f, or through a pipe")
    else:
        text = read_text("-")
    if not text:
        raise LocalrunError("the prompt is empty")
    return text


def _constraint(json_schema: str | None, grammar: str | None) -> "Constraint | None":
    """What the reply has to be, from one of two files. Raises LocalrunError if it is broken."""
    if json_schema is not None and grammar is not None:
        raise typer.BadParameter("give --json-schema or --grammar, not both")
    file = json_schema if grammar is None else grammar
    if file is None:
        return None
    from localrun.generate.constraint import Constraint

    text = read_text(file)
    try:
        return Constraint.lark(text) if grammar is not None else Constraint.json_schema(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise LocalrunError(f"{file}: is not JSON: {error}") from None
    except LocalrunError as error:
        raise LocalrunError(f"{file}: {error}") from None


def _document(
    engine: "Engine", session: "Session", parts: dict[str, str], load_s: float, sampling: "Sampling"
) -> dict[str, Any]:
    from cli.model import SETTINGS, placement_document

    stats = session.stats
    logprobs = {} if sampling.top_logprobs is None else {"logprobs": _logprobs(engine, session)}
    return {
        **engine.describe(),
        "path": str(engine.file.path),
        "placement": placement_document(engine),
        "text": parts["content"],
        "reasoning_content": parts.get("reasoning_content"),
        "ids": session.reply_ids,
        **logprobs,
        "finish_reason": session.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "sampling": {name: getattr(sampling, name) for name in SETTINGS},
        "timings": {
            "load_s": round(load_s, 3),
            "prompt_s": round(stats.prefill_s, 3),
            "prompt_tokens_per_s": rate(stats.prompt_tokens - stats.reused_tokens, stats.prefill_s),
            "generate_s": round(stats.decode_s, 3),
            "generated_tokens_per_s": rate(stats.generated_tokens, stats.decode_s),
        },
        "speculation": {
            "draft": session.speculation.draft.name if session.speculation else None,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "steps": stats.steps,
            "tokens_per_step": round(stats.tokens_per_step, 3),
            "speed_up": round(stats.speed_up, 3) if stats.speed_up else None,
        },
    }


def _logprobs(engine: "Engine", session: "Session") -> list[dict[str, Any]]:
    """Of each token of the reply, and the likeliest in its place."""

    def token(id: int, logprob: float) -> dict[str, Any]:
        return {"id": id, "token": engine.tokenizer.decode([id], special=True), "logprob": round(logprob, 6)}

    return [
        {**token(each.id, each.logprob), "top": [token(*other) for other in each.top]}
        for each in session.reply_logprobs
    ]
