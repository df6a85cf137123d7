"""localrun plan: whether a model fits a machine, how fast it should be, and why; and the same for clusters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cli import options
from cli.output import note, print_json, printable, show, size
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.plan.machine import Machine
    from localrun.plan.shapes import ModelShape


class _PlanGroup(TyperGroup):
    """`plan MODEL ...` is `plan model MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name before arguments that begin with none."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["model", *args])


app = typer.Typer(
    cls=_PlanGroup,
    help="Say whether a model fits a machine or a cluster, how fast it should be, and why.",
    add_completion=False,
    rich_markup_mode=None,
)

_PLOT = typer.Option("--plot", metavar="FILE", help="Draw a picture: png, svg or pdf.", show_default=False)


@app.command("model")
def model(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF, a config.json or its folder, or a name such as deepseek-v3 (--kv-table lists them).",
            show_default=False,
        ),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="As for convert; Q4_K_M, or a GGUF's own.", show_default=False),
    ] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", help="Tokens of context.")] = 8192,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt whose reading is timed.")] = 512,
    machine: Annotated[
        str, typer.Option("--machine", metavar="NAME", help="this (measured), a preset, or a JSON file.")
    ] = "this",
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE|this",
            help="Choose the largest type that fits in so much RAM, 256GB say, or in what the machine has.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    acceptance: Annotated[
        float, typer.Option("--acceptance", help="Part of the drafted tokens that are kept, for models that draft.")
    ] = 0.85,
    hosts: Annotated[
        int | None,
        typer.Option(
            "--hosts", metavar="N", help="Spread the routed experts over up to N such machines.", show_default=False
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            metavar="10GbE|25GbE|100GbE|FILE",
            help="With --hosts: what lies between them; 10GbE if not given.",
            show_default=False,
        ),
    ] = None,
    kv_table: Annotated[bool, typer.Option("--kv-table", help="KV cache a token of the known models.")] = False,
    compute_table: Annotated[bool, typer.Option("--compute-table", help="GFLOP a token of the known models.")] = False,
    plot: Annotated[Path | None, _PLOT] = None,
    as_json: options.Json = False,
) -> None:
    """Say whether a model fits a machine, how fast it should be, and what would change that.

    `localrun plan cluster` does so for many machines.
    """
    from localrun.pictures import check_picture
    from localrun.plan.fit import find_fit, with_ram
    from localrun.plan.memory import plan_memory
    from localrun.plan.plots import plot_decode, plot_kv
    from localrun.plan.report import make_fit_report, make_report
    from localrun.plan.shapes import known_models, load_model

    if plot is not None:
        check_picture(plot)
    if kv_table or compute_table:
        _print_tables(kv_table, compute_table, as_json)
        if plot is not None:
            plot_kv(plot, known_models())
        return
    for name, value in (("-c/--ctx", ctx), ("--prompt", prompt)):
        if not 1 <= value <= 10**8:
            raise LocalrunError(f"{name} {value}; expected 1 to 10^8")
    if not 0 <= acceptance <= 1:
        raise LocalrunError(f"--acceptance {acceptance}; expected 0 to 1")
    if fit is not None and type_ is not None:
        raise LocalrunError("--fit chooses the type; leave out --type")
    if hosts is None and link is not None:
        raise LocalrunError("--link goes with --hosts")
    if hosts is not None and (fit is not None or plot is not None):
        raise LocalrunError("--hosts goes with neither --fit nor --plot")
    shape = load_model(model, type_)
    where = _machine(machine, threads)
    if hosts is not None:
        _plan_hosts(shape, where, machine, hosts, link, ctx, prompt, threads, as_json)
        return
    if fit is None:
        if plan_memory(shape, where, ctx).fits:
            where = _measured(machine, where, shape, threads)
        document = make_report(shape, where, ctx, prompt, acceptance)
    else:
        where = with_ram(where, fit)
        found = find_fit(shape, where, ctx)
        shape, where = found.chosen, _measured(machine, where, found.chosen, threads)
        document = make_fit_report(found, where, ctx, prompt, acceptance)
    if as_json:
        print_json(document)
    else:
        for line in _text(document):
            show(line)
    if document["refusal"]:
        raise LocalrunError(document["refusal"])
    if plot is not None:
        plot_decode(plot, shape, where, ctx)


def _plan_hosts(
    shape: ModelShape,
    where: Machine,
    machine: str,
    n_hosts: int,
    link: str | None,
    ctx: int,
    prompt: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Prints what N hosts would do. Raises LocalrunError if the model does not fit them."""
    from localrun.plan.hosts_report import hosts_refusal, make_hosts_report
    from localrun.plan.link import load_link

    between = load_link(link or "10GbE")
    if not hosts_refusal(shape, where, ctx, n_hosts):
        where = _measured(machine, where, shape, threads)
    document = make_hosts_report(shape, where, between, ctx, n_hosts, prompt)
    if as_json:
        print_json(document)
    else:
        for line in _hosts_text(document):
            show(line)
    if document["refusal"]:
        raise LocalrunError(document["refusal"])


def _hosts_text(document: dict[str, Any]) -> list[str]:
    facts, memory, sent = document["model"], document["memory"], document["messages"]
    title, link = printable(document["machine"]["title"]), printable(document["link"]["file"]["title"])
    lines = [
        f"{printable(facts['name'])}, {facts['type']}, on {document['n_hosts']} hosts, each {title}",
        f"between them {link}",
        f"a layer: {sent['per_layer']} messages, {sent['out_bytes']:,} bytes to each other host and "
        f"{sent['back_bytes']:,} back; a token: {sent['bytes_per_token'] / 1e6:.1f} MB",
        "",
        f"{'memory':<8} {'size':>12}  of the first host",
        *_memory_lines(memory),
        f"RAM      {size(memory['others']):>12}  needed of each other host",
    ]
    if document["refusal"]:
        return lines
    prompt = f"prompt of {document['prompt']}"
    head = f"{'hosts':<6} {'sharing':<8} {'RAM first':>11} {'RAM others':>11} {'decode':>9} {'messages':>9}"
    lines += ["", f"{head} {prompt:>16} {'messages':>9}   tokens/s; part of the time that messages take"]
    lines += [_host_line(row) for row in document["rows"]]
    pays = document["pays"]
    shared = f", shared by {pays['sharing']}" if pays["sharing"] else ""
    if document["machine"]["file"].get("gpu"):
        lines.append("ranks compute on CPUs: of more than one host the card is left out")
    return [*lines, "", f"what pays for decoding: {pays['n_hosts']} host{'s'[: pays['n_hosts'] - 1]}{shared}"]


def _host_line(row: dict[str, Any]) -> str:
    others = size(row["ram_others"]) if row["ram_others"] else "-"
    line = f"{row['n_hosts']:<6} {row['sharing'] or '-':<8} {size(row['ram_first']):>11} {others:>11}"
    if not row["fits"]:
        return f"{line} does not fit"
    decode, prefill = row["decode"], row["prefill"]
    return (
        f"{line} {decode['tokens_per_s']:>9.2f} {decode['messages_part']:>9.0%} "
        f"{prefill['tokens_per_s']:>16.2f} {prefill['messages_part']:>9.0%}"
    )


def _machine(name: str, threads: int | None) -> Machine:
    """The machine; of this one only what it holds. Raises LocalrunError."""
    from localrun.plan.machine import load_machine, with_measured_card

    if name != "this":
        if threads is not None:
            raise LocalrunError("-t/--threads goes with --machine this; a description says its cores")
        return with_measured_card(load_machine(name))
    from localrun.plan.measure import unmeasured
    from localrun.workers import n_workers

    n_workers(threads)  # refuses what is none
    return unmeasured()


def _measured(name: str, machine: Machine, shape: ModelShape, threads: int | None) -> Machine:
    """The machine with its rates, which of this one are measured."""
    if name != "this":
        return machine
    from localrun.plan.measure import this_machine
    from localrun.workers import n_workers

    note("measuring this machine; the first time kernels are compiled, which takes a minute or two")
    found = this_machine(shape, n_workers(threads))
    return replace(found, title=machine.title, ram_bytes=machine.ram_bytes, reserved_bytes=machine.reserved_bytes)


def _text(document: dict[str, Any]) -> list[str]:
    facts, memory = document["model"], document["memory"]
    lines = [
        f"{printable(facts['name'])}, {facts['type']}: {facts['weights'] / 1e9:.2f} G weights, "
        f"{facts['active_weights'] / 1e9:.2f} G active, {facts['bits_per_weight']} bits a weight",
        f"on {printable(document['machine']['title'])}",
        *_fit_lines(document.get("fit")),
        "",
        f"{'memory':<8} {'size':>12}  of",
        *_memory_lines(memory),
        "",
        f"{'read a token':<20} {'weights':>10} {'size':>12}",
        *(f"{name:<20} {part['weights_per_token'] / 1e9:>8.2f} G {size(part['bytes_per_token']):>12}"
          for name, part in facts["parts"].items() if part["bytes_per_token"]),
    ]  # fmt: skip
    if "unpredicted" in document:
        lines += ["", f"no speeds: {document['unpredicted']}"]
    elif not document["refusal"]:
        lines += ["", *_speed_lines(document), "", *_sensitivity_lines(document["sensitivity"])]
    return lines


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    rows = [f"{row['where']:<8} {size(row['n_bytes']):>12}  {row['what']}" for row in memory["rows"]]
    usable = {where: size(max(0, n_bytes)) for where, n_bytes in memory["available"].items()}
    sums = [f"{where:<8} {size(n):>12}  needed, {usable[where]} usable" for where, n in memory["needed"].items()]
    return rows + sums


def _fit_lines(fit: dict[str, Any] | None) -> list[str]:
    """What was chosen, and what the next larger type would need."""
    if fit is None:
        return []
    imatrix = ", with an importance matrix" if fit["imatrix"] else ""
    lines = [f"largest type that fits: {fit['type']}, {size(fit['bytes'])}{imatrix}"]
    if fit["next"]:
        lines.append(f"the next larger, {fit['next']['type']}, needs {fit['next']['lacks']}")
    return lines


def _speed_lines(document: dict[str, Any]) -> list[str]:
    lines = []
    for name, key in (("decode", "decode"), ("decode", "decode_full_context"), ("prompt", "prefill")):
        speed = document[key]
        what = f"{speed['tokens']} tokens" if key == "prefill" else f"at {speed['ctx']} tokens"
        split = ", ".join(f"{kind} {1e3 * seconds:.1f}" for kind, seconds in speed["split_s"].items())
        lines.append(f"{name:<7} {what:<18} {speed['tokens_per_s']:>9.2f} tokens/s   ms: {split}")
    return [*lines, f"bound by {document['decode']['bottleneck']}; prompts by {document['prefill']['bottleneck']}"]


def _sensitivity_lines(rows: list[dict[str, Any]]) -> list[str]:
    def cell(row: dict[str, Any], key: str) -> str:
        value, ratio = row[f"{key}_tokens_per_s"], row[f"{key}_ratio"]
        return f"{value:>9.2f} {ratio:>6.2f}x" if value else f"{'-':>9} {'':>7}"

    head = f"{'what if':<58} {'decode':>17} {'prompt':>17}"
    return [head, *(f"{row['change']:<58} {cell(row, 'decode')} {cell(row, 'prefill')}" for row in rows)]


def _print_tables(kv: bool, compute: bool, as_json: bool) -> None:
    from localrun.plan.shapes import known_models
    from localrun.plan.tables import compute_row, kv_row

    tables = {"kv": kv and [kv_row(name) for name in known_models()]}
    tables["compute"] = compute and [compute_row(name) for name in known_models()]
    if as_json:
        print_json({name: rows for name, rows in tables.items() if rows})
        return
    if tables["kv"]:
        show(f"{'bytes a token, 16 bits':<20} {'':<4} {'cache':>10} {'all heads':>12} {'8 heads':>10} {'1 head':>10}")
        for row in tables["kv"]:
            sizes = f"{row['bytes_per_token']:>10,} {row['mha']:>12,} {row['gqa8']:>10,} {row['mqa']:>10,}"
            show(f"{row['model']:<20} {row['attention']:<6} {sizes}{_published(row)}")
    if tables["compute"]:
        show(f"{'GFLOP a token':<20} {'weights':>10} {'active':>10} {'training':>10} {'decoding':>10}")
        for row in tables["compute"]:
            counts = f"{row['parameters'] / 1e9:>8.1f} G {row['active'] / 1e9:>8.1f} G"
            costs = f"{row['training_gflop_per_token']:>10.1f} {row['decoding_gflop_per_token']:>10.1f}"
            show(f"{row['model']:<20} {counts} {costs}{_published(row)}")


def _published(row: dict[str, Any]) -> str:
    if row["published"] is None:
        return ""
    remark = f"; {row['note']}" if row["note"] else ""
    return f"  published {row['published']:,} ({row['difference_percent']:+.1f}%){remark}"


@app.command("cluster")
def cluster(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="As for plan: a name, a config.json or a GGUF.")
    ] = "deepseek-v3",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="h800 or gb200-nvl72.")] = "h800",
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", metavar="GB/S", help="Of a device's network, not the device's.", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens a device takes at a time.")] = 32,
    hidden: Annotated[
        int | None,
        typer.Option("--hidden", help="Values of a token's vector, not the model's own.", show_default=False),
    ] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", help="Tokens of context, for attention's time.")] = 4096,
    acceptance: Annotated[float, typer.Option("--acceptance", help="Part of the drafted tokens that are kept.")] = 0.85,
    requests: Annotated[float, typer.Option("--requests", help="Requests a second to be served.")] = 10.0,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of a prompt.")] = 4096,
    reply: Annotated[int, typer.Option("--reply", help="Tokens of a reply.")] = 1024,
    utilisation: Annotated[float, typer.Option("--utilisation", help="Part of the FLOPs that prompts reach.")] = 0.4,
    prefill_unit: Annotated[int, typer.Option("--prefill-unit", help="Devices that read prompts together.")] = 32,
    decode_unit: Annotated[int, typer.Option("--decode-unit", help="Devices that decode together.")] = 320,
    ports: Annotated[int, typer.Option("--ports", help="Ports of a switch.")] = 64,
    planes: Annotated[int, typer.Option("--planes", help="Planes of the multi-plane fat tree.")] = 8,
    endpoints: Annotated[
        int | None,
        typer.Option("--endpoints", help="Endpoints wanted; the largest networks if not given.", show_default=False),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option("--prices", metavar="FILE", help="JSON: dollars of switch, link, endpoint.", show_default=False),
    ] = None,
    fabric: Annotated[
        str, typer.Option("--fabric", metavar="PxLxSxN", help="Simulated: planes, leaves, spines, nodes a leaf.")
    ] = "4x4x4x4",
    plot: Annotated[Path | None, _PLOT] = None,
    as_json: options.Json = False,
) -> None:
    """Say what an interconnect allows: decoding speed, devices for a load, networks and their failures."""
    from localrun.pictures import check_picture
    from localrun.plan import cluster_report
    from localrun.plan.plots import plot_interconnect

    if plot is not None:
        check_picture(plot)
    wanted = cluster_report.Wanted(
        model=model,
        device=device,
        bytes_per_s=None if bandwidth is None else bandwidth * 1e9,
        n_tokens=tokens,
        hidden_size=hidden,
        ctx=ctx,
        acceptance=acceptance,
        requests_per_s=requests,
        prompt_tokens=prompt,
        reply_tokens=reply,
        utilisation=utilisation,
        units=(prefill_unit, decode_unit),
        ports=ports,
        planes=planes,
        endpoints=endpoints,
        prices=prices,
        fabric=fabric,
    )
    document = cluster_report.make_report(wanted)
    if as_json:
        print_json(document)
    else:
        for line in _cluster_text(document):
            show(line)
    if plot is not None:
        shape = cluster_report.model_of(wanted)
        plot_interconnect(plot, shape, tokens, document["expert_parallel"]["layer_compute_s"])


def _cluster_text(document: dict[str, Any]) -> list[str]:
    limit, split = document["expert_parallel"], document["split"]
    lines = [
        f"{printable(document['model'])} on {document['device']}, {limit['gb_per_s']:g} GB/s a device",
        f"a step moves {limit['bytes_per_step']:,} bytes a device and takes {1e6 * limit['step_s']:.2f} us",
        f"messages alone: {1e6 * limit['ideal_layer_s']:.2f} us a layer, {1e3 * limit['ideal_token_s']:.2f} ms "
        f"a token: {limit['ideal_tokens_per_s']:.1f} tokens/s",
        f"with drafts kept at {limit['acceptance']:.0%}: {limit['ideal_mtp_tokens_per_s']:.1f} tokens/s",
        f"with {1e6 * limit['layer_compute_s']:.0f} us of arithmetic a layer: {1e3 * limit['token_s']:.2f} ms a token "
        f"overlapped, {1e3 * limit['token_without_overlap_s']:.2f} ms not",
        "",
        f"for the load: {split['prefill_devices']} devices read prompts ({split['prefill_tokens_per_device_s']:,.0f} "
        f"tokens/s each), {split['decode_devices']} decode ({split['decode_tokens_per_device_s']:,.0f} tokens/s each; "
        f"bound by {split['bound']}), {split['concurrent']:.0f} requests at a time",
        "",
        f"{'network':<8} {'endpoints':>10} {'switches':>9} {'links':>9} {'M$':>9} {'k$ each':>8}  ",
    ]
    for row in document["topologies"]:
        costs = f"{row['cost'] / 1e6:>9.1f} {row['cost_per_endpoint'] / 1e3:>8.2f}"
        lines.append(
            f"{row['name']:<8} {row['endpoints']:>10,} {row['switches']:>9,} {row['links']:>9,} {costs}  {row['note']}"
        )
    lines += ["", f"all-to-all on {document['fabric']}: bandwidth kept when this fails in plane 0"]
    lines.append(f"{'failure':<16} {'mean':>6} {'slowest':>8} {'others':>7}   without other planes' help")
    for name, kept in document["failures"].items():
        alone = document["failures_without_rerouting"][name]
        lines.append(
            f"{name:<16} {kept['mean']:>6.3f} {kept['slowest']:>8.3f} {kept['other_planes']:>7.3f}   mean "
            f"{alone['mean']:.3f}, others {alone['other_planes']:.3f}, {alone['lost']} flows lost"
        )
    kept = ", ".join(f"{name} {value:.2f}" for name, value in document["isolation"].items())
    return [*lines, f"kept while all send to one node on plane 0: {kept}"]
