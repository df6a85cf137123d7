"""The arguments and options that commands share, declared once. localrun, which uses the values, checks them.

Those that go together are fields of a dataclass: LoadOptions, SamplingOptions. A command takes one of them as a
parameter, and takes() declares its fields to typer in that place.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


def _device(given: str) -> str:
    """Raises BadParameter unless it is one."""
    from localrun.placement.devices import DEVICES, EXPECTED

    if not DEVICES.fullmatch(given):
        raise typer.BadParameter(f"{given!r}; expected {EXPECTED}")
    return given


class CacheBits(str, Enum):
    """Of a value that the GPU keeps of a token."""

    sixteen = "16"
    eight = "8"


class ThinkChoice(str, Enum):
    """Whether a model thinks before it replies."""

    auto = "auto"
    on = "on"
    off = "off"


class MessageChoice(str, Enum):
    """How hidden states and sums travel between ranks."""

    bf16 = "bf16"
    f32 = "f32"
    fp8 = "fp8"


class ShareChoice(str, Enum):
    """What each rank has of the routed experts."""

    auto = "auto"
    slices = "slices"
    experts = "experts"


class BackendChoice(str, Enum):
    """Whose code computes."""

    auto = "auto"
    native = "native"
    llama_cpp = "llama.cpp"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, the first part of a split one, REPO:QUANT that was pulled, or a bundled model: miniature "
        "(the default) or smollm2.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|cuda:N",
        help="Where to compute; cuda:N: on that one of several cards, counted from 0.",
        callback=_device,
    ),
]
Vram = Annotated[
    float | None,
    typer.Option(
        "--vram", metavar="GIB", help="Memory of each GPU to use; all that is free if not given.", show_default=False
    ),
]
GpuExperts = Annotated[
    str,
    typer.Option(
        "--gpu-experts",
        metavar="auto|N|cache|cache:N",
        help="Experts of each layer on the GPU: those of whole layers that fit, or N; or as a cache of all in RAM.",
    ),
]
ExpertUsage = Annotated[
    Path | None,
    typer.Option(
        "--expert-usage",
        metavar="FILE",
        help="An imatrix file: the experts that its text used most go to the GPU first.",
        show_default=False,
    ),
]
Repack = Annotated[
    bool,
    typer.Option("--repack", help="Lay experts out anew in free RAM at load: slower to start, faster to reply."),
]
Unproven = Annotated[
    bool, typer.Option("--unproven", help="With --device cuda: use a card that has not proven itself, or failed to.")
]
DenseAttention = Annotated[
    bool, typer.Option("--dense-attention", help="Attend to all tokens where an indexer would choose some.")
]
CacheBitsChoice = Annotated[
    CacheBits, typer.Option("--cache-bits", help="Of the cache's values; 8 halves it and changes the text a little.")
]
Threads = Annotated[
    int | None,
    typer.Option("-t", "--threads", help="Worker threads; one a physical core if not given.", show_default=False),
]
Ctx = Annotated[
    int | None,
    typer.Option("-c", "--ctx", help="Tokens of context; 8192 or the model's own if not given.", show_default=False),
]
Backend = Annotated[BackendChoice, typer.Option("--backend", help="Whose code computes.")]
Speculative = Annotated[
    str,
    typer.Option(
        "--speculative",
        metavar="auto|off|K",
        help="Verify K drafts (1 to 4) a step, as many as pay, or none; the reply is the same.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft", metavar="MODEL", help="A small model of the same vocabulary, for the drafts.", show_default=False
    ),
]
NRanks = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        metavar="N|numa",
        help="Share the routed experts among N processes of this machine, or one on each NUMA node.",
        show_default=False,
    ),
]
Hosts = Annotated[
    str | None,
    typer.Option(
        "--hosts",
        metavar="A,B:N,...",
        help="Share them among this machine and others: NAME, NAME:RANKS, NAME=PATH where the model lies elsewhere.",
        show_default=False,
    ),
]
RankMessages = Annotated[
    MessageChoice,
    typer.Option("--rank-messages", help="How vectors travel between ranks; f32 for one machine's results."),
]
RankShare = Annotated[
    ShareChoice,
    typer.Option(
        "--rank-share",
        help="Each rank has a slice of every expert, or whole ones, by --expert-usage; auto: slices if that can be.",
    ),
]
RankSizes = Annotated[
    str | None,
    typer.Option(
        "--rank-sizes",
        metavar="auto|A,B,...",
        help="Shares of ranks relative to each other; auto: so that all are done at once. Equal if not given.",
        show_default=False,
    ),
]
RankCopies = Annotated[
    int, typer.Option("--rank-copies", help="With whole experts: most used ones that each rank has besides its own.")
]
PrefillHosts = Annotated[
    str | None,
    typer.Option(
        "--prefill-hosts",
        metavar="A,B,...",
        help="Have prompts read there, by the whole model on each, while replies are made here.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say on stderr what runs where, and how fast.")]

NTokens = Annotated[int, typer.Option("-n", "--n-tokens", help="Tokens to generate; -1 until the end.")]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="The system message.", show_default=False),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the reply before this text; may be repeated.", show_default=False),
]
Think = Annotated[
    ThinkChoice, typer.Option("--think", help="Have the model think before it replies; auto is its template's choice.")
]
TemplateVar = Annotated[
    list[str] | None,
    typer.Option(
        "--template-var",
        metavar="NAME=VALUE",
        help="Set a variable of the chat template, reasoning_effort=low say; may be repeated.",
        show_default=False,
    ),
]
ChatTemplateName = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE|NAME",
        help="A chat template in place of the model's: a file, chatml, or another one that the model's file has.",
        show_default=False,
    ),
]
ShowThinking = Annotated[bool, typer.Option("--show-thinking", help="Show what the model thought as well.")]
_UNSET = "the model's own if it names one"
Temperature = Annotated[
    float | None,
    typer.Option("--temp", help=f"Temperature, 0 for the likeliest token; {_UNSET}, or 0.8.", show_default=False),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help=f"Keep the k likeliest tokens, 0 for all; {_UNSET}, or 40.", show_default=False),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help=f"Keep the likeliest that reach this sum; {_UNSET}, or 0.95.", show_default=False),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help=f"Drop those below this part of the best; {_UNSET}, or 0.05.", show_default=False),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option("--repeat-penalty", help=f"Weaken recent tokens, 1 for no; {_UNSET}, or 1.0.", show_default=False),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="Off the logit of recent tokens; 0 if not given.", show_default=False),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option("--frequency-penalty", help="The same, for each occurrence; 0 if not given.", show_default=False),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="For the same reply again; drawn if not given.", show_default=False),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema", metavar="FILE", help="The reply is JSON that this schema accepts.", show_default=False
    ),
]
Grammar = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE", help="The reply is what this makes: Lark or GBNF.", show_default=False),
]
TopLogprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="N",
        help="With --json: log-probabilities of the tokens and the N likeliest, 0 to 20.",
        show_default=False,
    ),
]
File = Annotated[
    str | None,
    typer.Option("-f", "--file", metavar="FILE", help="Read it from a file, - for stdin.", show_default=False),
]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is opened: localrun.load's options."""

    device: Device = "auto"
    vram: Vram = None
    gpu_experts: GpuExperts = "auto"
    expert_usage: ExpertUsage = None
    cache_bits: CacheBitsChoice = CacheBits.sixteen
    repack: Repack = False
    unproven: Unproven = False
    dense_attention: DenseAttention = False
    threads: Threads = None
    ctx: Ctx = None
    backend: Backend = BackendChoice.auto
    speculative: Speculative = "auto"
    draft: Draft = None


@dataclass(frozen=True)
class RankOptions:
    """Where other processes hold shares of the routed experts, and which read prompts."""

    ranks: NRanks = None
    hosts: Hosts = None
    rank_messages: RankMessages = MessageChoice.bf16
    rank_share: RankShare = ShareChoice.auto
    rank_sizes: RankSizes = None
    rank_copies: RankCopies = 0
    prefill_hosts: PrefillHosts = None


@dataclass(frozen=True)
class SamplingOptions:
    """What of localrun.Sampling the user may set; None for what the model recommends."""

    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    repeat_penalty: RepeatPenalty = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    seed: Seed = None


@dataclass(frozen=True)
class TemplateOptions:
    """How a conversation becomes a prompt, and what of the reply is shown."""

    think: Think = ThinkChoice.auto
    template_var: TemplateVar = None
    chat_template: ChatTemplateName = None
    show_thinking: ShowThinking = False


def takes(*, without: tuple[str, ...] = (), **groups: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of commands: declares a dataclass's fields as options, in place of the parameter that gets it.

    Args:
        without: fields that are no options of this command; they keep their values.
        groups: parameter -> its value if the user gives no option.
    """

    def declared(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
        if parameter.name not in groups:
            yield parameter.replace(kind=parameter.KEYWORD_ONLY)
            return
        group = groups[parameter.name]
        for field in fields(group):
            if field.name not in without:
                default = getattr(group, field.name)
                yield parameter.replace(name=field.name, default=default, annotation=field.type)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command).parameters.values()

        def run(**given: Any) -> None:
            for name, group in groups.items():
                own = {field.name: given.pop(field.name) for field in fields(group) if field.name in given}
                given[name] = replace(group, **own)
            command(**given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([option for each in parameters for option in declared(each)])
        return run

    return decorate
