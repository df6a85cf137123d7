"""The options of `localrun plan` and `plan cluster`, declared once; localrun.plan, which uses them, checks most."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.plan.cluster_report import Wanted

_MOST_TOKENS = 10**8

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF, a config.json or its folder, or a name such as deepseek-v3 (--kv-table lists them).",
        show_default=False,
    ),
]
Type = Annotated[
    str | None,
    typer.Option("--type", metavar="TYPE", help="As for convert; Q4_K_M, or a GGUF's own.", show_default=False),
]
Ctx = Annotated[int, typer.Option("-c", "--ctx", help="Tokens of context.")]
Prompt = Annotated[int, typer.Option("--prompt", help="Tokens of the prompt whose reading is timed.")]
MachineName = Annotated[
    str, typer.Option("--machine", metavar="NAME", help="this (measured), a preset, or a JSON file.")
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE|this",
        help="Choose the largest type that fits in so much RAM, 256GB say, or in what the machine has.",
        show_default=False,
    ),
]
Acceptance = Annotated[
    float, typer.Option("--acceptance", help="Part of the drafted tokens that are kept, for models that draft.")
]
Hosts = Annotated[
    int | None,
    typer.Option(
        "--hosts", metavar="N", help="Spread the routed experts over up to N such machines.", show_default=False
    ),
]
Readers = Annotated[
    int | None,
    typer.Option(
        "--prefill-hosts",
        metavar="N",
        help="Have prompts read by N more such machines: whether that pays, against other uses of them.",
        show_default=False,
    ),
]
Reply = Annotated[int, typer.Option("--reply", help="With --prefill-hosts: tokens of a reply.")]
Link = Annotated[
    str | None,
    typer.Option(
        "--link",
        metavar="10GbE|25GbE|100GbE|FILE",
        help="With --hosts or --prefill-hosts: what lies between them; 10GbE if not given.",
        show_default=False,
    ),
]
KvTable = Annotated[bool, typer.Option("--kv-table", help="KV cache a token of the known models.")]
ComputeTable = Annotated[bool, typer.Option("--compute-table", help="GFLOP a token of the known models.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw a picture: png, svg or pdf.", show_default=False)
]


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for which machine."""

    type_: Type = None
    ctx: Ctx = 8192
    prompt: Prompt = 512
    machine: MachineName = "this"
    fit: Fit = None
    threads: options.Threads = None
    acceptance: Acceptance = 0.85
    hosts: Hosts = None
    prefill_hosts: Readers = None
    reply: Reply = 256
    link: Link = None

    def check(self) -> None:
        """Raises LocalrunError on numbers out of range, and on options that do not go together."""
        for name, value in (("-c/--ctx", self.ctx), ("--prompt", self.prompt), ("--reply", self.reply)):
            if not 1 <= value <= _MOST_TOKENS:
                raise LocalrunError(f"{name} {value}; expected 1 to 10^8")
        if not 0 <= self.acceptance <= 1:
            raise LocalrunError(f"--acceptance {self.acceptance}; expected 0 to 1")
        if self.fit is not None and self.type_ is not None:
            raise LocalrunError("--fit chooses the type; leave out --type")
        if self.hosts is not None and self.prefill_hosts is not None:
            raise LocalrunError("--prefill-hosts compares with --hosts by itself: give one of them")
        if self.hosts is None and self.prefill_hosts is None and self.link is not None:
            raise LocalrunError("--link goes with --hosts or --prefill-hosts")


ClusterModel = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="As for plan: a name, a config.json or a GGUF.")
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="h800 or gb200-nvl72.")]
Bandwidth = Annotated[
    float | None,
    typer.Option("--bandwidth", metavar="GB/S", help="Of a device's network, not the device's.", show_default=False),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens a device takes at a time.")]
Hidden = Annotated[
    int | None, typer.Option("--hidden", help="Values of a token's vector, not the model's own.", show_default=False)
]
AttendedCtx = Annotated[int, typer.Option("-c", "--ctx", help="Tokens of context, for attention's time.")]
Kept = Annotated[float, typer.Option("--acceptance", help="Part of the drafted tokens that are kept.")]
Requests = Annotated[float, typer.Option("--requests", help="Requests a second to be served.")]
PromptTokens = Annotated[int, typer.Option("--prompt", help="Tokens of a prompt.")]
ReplyTokens = Annotated[int, typer.Option("--reply", help="Tokens of a reply.")]
Utilisation = Annotated[float, typer.Option("--utilisation", help="Part of the FLOPs that prompts reach.")]
PrefillUnit = Annotated[int, typer.Option("--prefill-unit", help="Devices that read prompts together.")]
DecodeUnit = Annotated[int, typer.Option("--decode-unit", help="Devices that decode together.")]
Ports = Annotated[int, typer.Option("--ports", help="Ports of a switch.")]
Planes = Annotated[int, typer.Option("--planes", help="Planes of the multi-plane fat tree.")]
Endpoints = Annotated[
    int | None,
    typer.Option("--endpoints", help="Endpoints wanted; the largest networks if not given.", show_default=False),
]
Prices = Annotated[
    Path | None,
    typer.Option("--prices", metavar="FILE", help="JSON: dollars of switch, link, endpoint.", show_default=False),
]
Fabric = Annotated[
    str, typer.Option("--fabric", metavar="PxLxSxN", help="Simulated: planes, leaves, spines, nodes a leaf.")
]


@dataclass(frozen=True)
class ClusterOptions:
    """A model on many devices, a load, and the networks between them."""

    model: ClusterModel = "deepseek-v3"
    device: Device = "h800"
    bandwidth: Bandwidth = None
    tokens: Tokens = 32
    hidden: Hidden = None
    ctx: AttendedCtx = 4096
    acceptance: Kept = 0.85
    requests: Requests = 10.0
    prompt: PromptTokens = 4096
    reply: ReplyTokens = 1024
    utilisation: Utilisation = 0.4
    prefill_unit: PrefillUnit = 32
    decode_unit: DecodeUnit = 320
    ports: Ports = 64
    planes: Planes = 8
    endpoints: Endpoints = None
    prices: Prices = None
    fabric: Fabric = "4x4x4x4"

    def wanted(self) -> "Wanted":
        """The same as the report takes it."""
        from localrun.plan.cluster_report import Wanted

        return Wanted(
            model=self.model,
            device=self.device,
            bytes_per_s=None if self.bandwidth is None else self.bandwidth * 1e9,
            n_tokens=self.tokens,
            hidden_size=self.hidden,
            ctx=self.ctx,
            acceptance=self.acceptance,
            requests_per_s=self.requests,
            prompt_tokens=self.prompt,
            reply_tokens=self.reply,
            utilisation=self.utilisation,
            units=(self.prefill_unit, self.decode_unit),
            ports=self.ports,
            planes=self.planes,
            endpoints=self.endpoints,
            prices=self.prices,
            fabric=self.fabric,
        )
