"""localrun plan: whether a model fits a machine, how fast it should be, and why; and the same for clusters."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from cli import options
from cli.output import note, print_json, show
from cli.plan_options import ClusterOptions, ComputeTable, KvTable, Model, PlanOptions, Plot
from cli.plan_text import cluster_lines, hosts_lines, plan_lines, readers_lines, table_lines
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


@app.command("model")
@options.takes(wanted=PlanOptions())
def model(
    model: Model = None,
    *,
    wanted: PlanOptions,
    kv_table: KvTable = False,
    compute_table: ComputeTable = False,
    plot: Plot = None,
    as_json: options.Json = False,
) -> None:
    """Say whether a model fits a machine, how fast it should be, and what would change that.

    `localrun plan cluster` does so for many machines.
    """
    from localrun.pictures import check_picture
    from localrun.plan.plots import plot_decode, plot_kv
    from localrun.plan.shapes import known_models, load_model

    if plot is not None:
        check_picture(plot)
    if kv_table or compute_table:
        _print_tables(kv_table, compute_table, as_json)
        if plot is not None:
            plot_kv(plot, known_models())
        return
    wanted.check()
    over_hosts = (
        "--hosts" if wanted.hosts is not None else "--prefill-hosts" if wanted.prefill_hosts is not None else ""
    )
    if over_hosts and (wanted.fit is not None or plot is not None):
        raise LocalrunError(f"{over_hosts} goes with neither --fit nor --plot")
    shape = load_model(model, wanted.type_)
    where = _machine(wanted)
    if wanted.hosts is not None:
        _plan_hosts(shape, where, wanted, as_json)
        return
    if wanted.prefill_hosts is not None:
        _plan_readers(shape, where, wanted, wanted.prefill_hosts, as_json)
        return
    document, shape, where = _plan(shape, where, wanted)
    _print(document, plan_lines, as_json)
    if plot is not None:
        plot_decode(plot, shape, where, wanted.ctx)


def _print(document: dict[str, Any], lines_of: Callable[[dict[str, Any]], Iterable[str]], as_json: bool) -> None:
    """A report, for people or as JSON. Raises LocalrunError if it refuses the model."""
    if as_json:
        print_json(document)
    else:
        for line in lines_of(document):
            show(line)
    if document.get("refusal"):
        raise LocalrunError(document["refusal"])


def _plan(shape: "ModelShape", where: "Machine", wanted: PlanOptions) -> "tuple[dict[str, Any], ModelShape, Machine]":
    """The report, the model in the type that was chosen, and the machine with its rates. Raises LocalrunError."""
    from localrun.plan.fit import find_fit, with_ram
    from localrun.plan.memory import plan_memory
    from localrun.plan.report import make_fit_report, make_report

    if wanted.fit is None:
        if plan_memory(shape, where, wanted.ctx).fits:
            where = _measured(where, shape, wanted)
        return make_report(shape, where, wanted.ctx, wanted.prompt, wanted.acceptance), shape, where
    where = with_ram(where, wanted.fit)
    found = find_fit(shape, where, wanted.ctx)
    where = _measured(where, found.chosen, wanted)
    return make_fit_report(found, where, wanted.ctx, wanted.prompt, wanted.acceptance), found.chosen, where


def _plan_hosts(shape: "ModelShape", where: "Machine", wanted: PlanOptions, as_json: bool) -> None:
    """Prints what several hosts would do. Raises LocalrunError if the model does not fit them."""
    from localrun.plan.hosts_report import hosts_refusal, make_hosts_report
    from localrun.plan.link import DEFAULT_LINK, load_link

    between = load_link(wanted.link or DEFAULT_LINK)
    if not hosts_refusal(shape, where, wanted.ctx, wanted.hosts):
        where = _measured(where, shape, wanted)
    document = make_hosts_report(shape, where, between, wanted.ctx, wanted.hosts, wanted.prompt)
    _print(document, hosts_lines, as_json)


def _plan_readers(shape: "ModelShape", where: "Machine", wanted: PlanOptions, n_readers: int, as_json: bool) -> None:
    """Prints whether hosts that read prompts pay. Raises LocalrunError if the model fits in no way."""
    from localrun.plan.link import DEFAULT_LINK, load_link
    from localrun.plan.readers import make_readers_report

    between = load_link(wanted.link or DEFAULT_LINK)
    where = _measured(where, shape, wanted)
    document = make_readers_report(shape, where, between, wanted.ctx, n_readers, wanted.prompt, wanted.reply)
    _print(document, readers_lines, as_json)


def _machine(wanted: PlanOptions) -> "Machine":
    """The machine; of this one only what it holds. Raises LocalrunError."""
    from localrun.plan.machine import load_machine, with_measured_card

    if wanted.machine != "this":
        if wanted.threads is not None:
            raise LocalrunError("-t/--threads goes with --machine this; a description says its cores")
        return with_measured_card(load_machine(wanted.machine))
    from localrun.plan.measure import unmeasured
    from localrun.workers import n_workers

    n_workers(wanted.threads)  # refuses what is none
    return unmeasured()


def _measured(machine: "Machine", shape: "ModelShape", wanted: PlanOptions) -> "Machine":
    """The machine with its rates, which of this one are measured."""
    if wanted.machine != "this":
        return machine
    from localrun.plan.measure import this_machine
    from localrun.workers import n_workers

    note("measuring this machine; the first time kernels are compiled, which takes a minute or two")
    found = this_machine(shape, n_workers(wanted.threads))
    return replace(found, title=machine.title, ram_bytes=machine.ram_bytes, reserved_bytes=machine.reserved_bytes)


def _print_tables(kv: bool, compute: bool, as_json: bool) -> None:
    from localrun.plan.shapes import known_models
    from localrun.plan.tables import compute_row, kv_row

    wanted = {"kv": kv and kv_row, "compute": compute and compute_row}
    tables = {name: [row(model) for model in known_models()] for name, row in wanted.items() if row}
    _print(tables, table_lines, as_json)


@app.command("cluster")
@options.takes(wanted=ClusterOptions())
def cluster(*, wanted: ClusterOptions, plot: Plot = None, as_json: options.Json = False) -> None:
    """Say what an interconnect allows: decoding speed, devices for a load, networks and their failures."""
    from localrun.pictures import check_picture
    from localrun.plan import cluster_report
    from localrun.plan.plots import plot_interconnect

    if plot is not None:
        check_picture(plot)
    described = wanted.wanted()
    document = cluster_report.make_report(described)
    _print(document, cluster_lines, as_json)
    if plot is not None:
        layer_s = document["expert_parallel"]["layer_compute_s"]
        plot_interconnect(plot, cluster_report.model_of(described), wanted.tokens, layer_s)
