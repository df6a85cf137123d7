"""localrun inspect: what a GGUF file holds, without loading it."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import note, print_json, printable, progress_bar, show, size
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.gguf.file import GGUFFile


def inspect(
    model: options.Model = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all weights; fail if one is not finite.")] = False,
    mix: Annotated[bool, typer.Option("--mix", help="Print the tensors' types as lines for `convert --mix`.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show what a model file holds: shapes, types, bits per weight, and where the bytes are."""
    from cli.model import exit_if_cut
    from localrun.bundled import model_path
    from localrun.gguf.file import open_gguf
    from localrun.models.summary import summary_of

    path = model_path(model)
    exit_if_cut(path)
    with open_gguf(path) as file:
        if mix:
            _print_mix(file, as_json)
            return
        document = summary_of(file)
        if verify:
            document["verified"] = _verify(file)
    if as_json:
        print_json(document)
        return
    for line in [*_summary(document), "", *_shares(document), "", *_table(document)]:
        show(line)


def _print_mix(file: "GGUFFile", as_json: bool) -> None:
    from localrun.convert.mixes import mix_lines
    from localrun.gguf.types import plain

    tensors = list(file.tensors.values())
    types = [plain(tensor.type).name for tensor in tensors]
    lines = mix_lines(tensors, types)
    if as_json:
        rows = [{"pattern": line.pattern, "type": line.type, "tensors": line.n_tensors} for line in lines]
        print_json({"paths": [str(path) for path in file.paths], "mix": rows})
        return
    counts = ", ".join(f"{types.count(type_)} {type_}" for type_ in sorted(set(types)))
    show(f"# {printable(file.paths[0].name)}: {counts}")
    if any(plain(tensor.type) != tensor.type for tensor in tensors):
        show("# some rows are interleaved, as by --pack")
    width = max((len(line.pattern) for line in lines), default=0)
    for line in lines:
        show(f"{line.pattern:<{width}}  {line.type}")


def _verify(file: "GGUFFile") -> dict[str, Any]:
    """What was looked at. Raises LocalrunError, after a line for each, if tensors hold numbers that are none."""
    from localrun.gguf.verify import verify

    with progress_bar() as report:
        found = verify(file, report)
    for problem in found.problems:
        note(problem)
    if found.problems:
        raise LocalrunError(f"{file.path}: {len(found.problems)} of {found.n_tensors} tensors are not sound")
    return {"tensors": found.n_tensors, "bytes": found.n_bytes, "unchecked_types": found.unchecked}


def _summary(document: dict[str, Any]) -> list[str]:
    lines = [
        ("file", f"{document['paths'][0]}, {size(document['file_bytes'])}, {len(document['paths'])} part(s)"),
        ("name", document["name"] or "-"),
        _what(document),
        ("parameters", f"{document['parameters']:,}"),
        ("bits per weight", document["bits_per_weight"]),
        ("KV cache", _kv(document)),
    ]
    if not document["native"] and document["kind"] == "model":
        lines.append(("not native", document["not_native_because"]))
    if "verified" in document:
        verified = document["verified"]
        unchecked = ", ".join(verified["unchecked_types"])
        lines.append(("verified", size(verified["bytes"]) + (f", but for {unchecked}" if unchecked else "")))
    config = document["config"] or {}
    known = {name: _counted(value, _KINDS.get(name, {})) for name, value in config.items() if value}
    lines += [(name, value) for name, value in known.items() if name != "architecture"]
    return [f"{name:<24} {printable(str(value))}" for name, value in lines]


def _what(document: dict[str, Any]) -> tuple[str, str]:
    if document["kind"] != "model":
        return "kind", f"{document['kind']}, no model"
    suffix = {"native": "", "llama.cpp": ", through llama.cpp", None: ", which cannot be run"}[document["backend"]]
    return "architecture", document["architecture"] + suffix


_KINDS = {"compress_ratios": {0: "with a window alone", 4: "of ratio 4, with an indexer", 128: "of ratio 128"}}


def _counted(value: Any, kinds: dict[Any, str]) -> Any:
    """What layers are, as how many of each kind."""
    if not isinstance(value, tuple):
        return value
    return ", ".join(f"{count} {kinds.get(kind, kind)}" for kind, count in Counter(value).items())


def _kv(document: dict[str, Any]) -> str:
    n_bytes, fixed = document["kv_bytes_per_token"], document["kv_window_bytes"]
    if n_bytes is None:
        return "not known"
    fewer = document["kv_bytes_per_token_in_8_bits"]
    in_8_bits = f" ({fewer:,} with --cache-bits 8)" if fewer else ""
    what = "windows, and what is pooled next" if document["config"]["compress_ratios"] else "layers with a window"
    return f"{n_bytes:,} bytes a token{in_8_bits}" + (f", and {size(fixed)} of {what}" if fixed else "")


def _shares(document: dict[str, Any]) -> list[str]:
    lines = [f"{'part':<24} {'size':>12} {'share':>8}"]
    for group, share in document["groups"].items():
        lines.append(f"{group:<24} {size(share['bytes']):>12} {share['percent']:>7}%")
    lines += ["", f"{'type':<24} {'size':>12} {'tensors':>8} {'bits a weight':>14}"]
    for name, counts in document["types"].items():
        bits = 8 * counts["bytes"] / counts["weights"]
        lines.append(f"{name:<24} {size(counts['bytes']):>12} {counts['tensors']:>8} {bits:>14.3f}")
    return lines


def _table(document: dict[str, Any]) -> list[str]:
    lines = [f"{'tensor':<40} {'shape':<20} {'type':<8} {'size':>12}"]
    for tensor in document["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        lines.append(f"{printable(tensor['name']):<40} {shape:<20} {tensor['type']:<8} {size(tensor['bytes']):>12}")
    return lines
