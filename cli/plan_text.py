"""What `localrun plan` prints for people: lines of its reports' documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cli.output import printable, size


def plan_lines(document: dict[str, Any]) -> list[str]:
    """Of plan.report.make_report, or make_fit_report."""
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


def hosts_lines(document: dict[str, Any]) -> list[str]:
    """Of plan.hosts_report.make_hosts_report."""
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
    parts = f"{'messages':>9} {'waiting':>8}"
    head = f"{'hosts':<6} {'sharing':<14} {'RAM first':>11} {'RAM others':>11}"
    lines += ["", f"{head} {'decode':>9} {parts} {prompt:>16} {parts}   tokens/s; parts of the time"]
    lines += [_host_line(row) for row in document["rows"]]
    pays = document["pays"]
    shared = f", shared by {pays['sharing']}" if pays["sharing"] else ""
    if gpu := document["machine"]["file"].get("gpu"):
        is_left_out = gpu.get("unified")
        lines.append("several hosts compute on CPUs alone" if is_left_out else "only the first host's card computes")
    return [*lines, "", f"what pays for decoding: {pays['n_hosts']} host{'s'[: pays['n_hosts'] - 1]}{shared}"]


def _host_line(row: dict[str, Any]) -> str:
    others = size(row["ram_others"]) if row["ram_others"] else "-"
    line = f"{row['n_hosts']:<6} {row['sharing'] or '-':<14} {size(row['ram_first']):>11} {others:>11}"
    if not row["fits"]:
        return f"{line} does not fit"
    for facts, width in ((row["decode"], 9), (row["prefill"], 16)):
        waiting = facts["waiting_s"] / facts["seconds"]  # for what others compute
        line += f" {facts['tokens_per_s']:>{width}.2f} {facts['messages_part']:>9.0%} {waiting:>8.0%}"
    return line


def readers_lines(document: dict[str, Any]) -> list[str]:
    """Of plan.readers.make_readers_report."""
    facts, rows = document["model"], document["rows"]
    title, link = printable(document["machine"]["title"]), printable(document["link"]["file"]["title"])
    head = f"{'':<18} {'hosts':>5} {'RAM others':>11} {'first token':>11} {'reply':>7} {'meanwhile':>9}"
    lines = [
        f"{printable(facts['name'])}, {facts['type']}, on {rows[-1]['n_hosts']} hosts, each {title}",
        f"between them {link}",
        f"a prompt of {document['prompt']}: {size(document['row_bytes'])} of cache, {document['link_s']:.2f} s on the "
        f"wire, {document['on_top_s']:.3f} s of it not under computing",
        "",
        f"{head} {'requests':>9}   s; tokens/s, and while a prompt is read; an hour",
    ]
    for row in rows:
        others = size(row["ram_others"]) if row["ram_others"] else "-"
        line = f"{row['name']:<18} {row['n_hosts']:>5} {others:>11}"
        rates = f"{row['tokens_per_s']:>7.2f} {row['meanwhile_per_s']:>9.2f} {row['requests_per_hour']:>9.0f}"
        lines.append(f"{line} {row['first_token_s']:>11.2f} {rates}" if row["fits"] else f"{line} does not fit")
    if document["pays"]:
        lines += ["", f"most requests with replies of {document['reply']} tokens: {document['pays']}"]
    return lines


def table_lines(tables: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Of the known models; tables: kv, compute, or both."""
    if kv := tables.get("kv"):
        yield f"{'bytes a token, 16 bits':<20} {'':<4} {'cache':>10} {'all heads':>12} {'8 heads':>10} {'1 head':>10}"
        for row in kv:
            sizes = f"{row['bytes_per_token']:>10,} {row['mha']:>12,} {row['gqa8']:>10,} {row['mqa']:>10,}"
            yield f"{row['model']:<20} {row['attention']:<6} {sizes}{_published(row)}"
    if compute := tables.get("compute"):
        yield f"{'GFLOP a token':<20} {'weights':>10} {'active':>10} {'training':>10} {'decoding':>10}"
        for row in compute:
            counts = f"{row['parameters'] / 1e9:>8.1f} G {row['active'] / 1e9:>8.1f} G"
            costs = f"{row['training_gflop_per_token']:>10.1f} {row['decoding_gflop_per_token']:>10.1f}"
            yield f"{row['model']:<20} {counts} {costs}{_published(row)}"


def _published(row: dict[str, Any]) -> str:
    if row["published"] is None:
        return ""
    remark = f"; {row['note']}" if row["note"] else ""
    return f"  published {row['published']:,} ({row['difference_percent']:+.1f}%){remark}"


def cluster_lines(document: dict[str, Any]) -> list[str]:
    """Of plan.cluster_report.make_report."""
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
