"""Rates of one core for every type: the rows of a machine description's kernels (docs/plan.md).

    python scripts/measure_kernels.py [--types Q2_K IQ2_XXS] [--columns 2048 7168] [--level avx2] [--add]

With --add the presets' table of this level gets rows for the types that it lacks (or for --types), each rate times what
Q4_K reaches in the table over what it reaches here: presets stay one machine's. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

ROWS = 2048  # of an expert's gate and up in V3
YARDSTICK = "Q4_K"
NOTE = "; types added later: measured on another core, scaled by Q4_K (--add)"
RATES = "gemv", "expand", "gemm"
TABLES = Path(__file__).resolve().parents[1] / "localrun" / "plan" / "data" / "machines.json"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="ggml's names; all if not given")
    parser.add_argument("--columns", type=int, nargs="+", default=[2048, 7168])
    parser.add_argument("--level", help="a lower ISA level, as LOCALRUN_ISA takes it")
    parser.add_argument("--add", action="store_true", help="complete the presets' table of this level")
    arguments = parser.parse_args()
    if arguments.level:
        os.environ["LOCALRUN_ISA"] = arguments.level
    from localrun.plan.measure import kernel_rates
    from quant.formats import registry
    from quant.target import isa
    from quant.threads.pool import Pool

    types = arguments.types or list(registry.NAMES)
    if arguments.add:
        known = {row["type"] for row in table_of(isa.LEVEL)["rates"]} if arguments.types is None else {YARDSTICK}
        types = [YARDSTICK, *(name for name in types if name not in known)]
    pool = Pool(1)
    rates = [kernel_rates(pool, type_, n_cols, [(1, ROWS)]) for type_ in types for n_cols in arguments.columns]
    if arguments.add:
        rates = scaled(rates, table_of(isa.LEVEL)["rates"])
    rounded = [{name: _rounded(value) for name, value in row.items()} for row in rates]
    if arguments.add:
        add(isa.LEVEL, rounded)
    print(json.dumps({"level": isa.LEVEL, "rates": rounded}))


def table_of(level: str) -> dict[str, Any]:
    """The presets' rates of an ISA level. Raises SystemExit if there are none."""
    tables = json.loads(TABLES.read_text(encoding="utf-8"))["kernels"]
    if level not in tables:
        raise SystemExit(f"--add: no preset has the level {level}; there are {', '.join(tables)}")
    return tables[level]


def scaled(rates: list[dict[str, Any]], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rates of all types but the yardstick, as the table's machine would have them."""
    here = {row["n_cols"]: row for row in rates if row["type"] == YARDSTICK}
    there = {row["n_cols"]: row for row in table if row["type"] == YARDSTICK}
    return [
        row | {name: row[name] * there[row["n_cols"]][name] / here[row["n_cols"]][name] for name in RATES}
        for row in rates
        if row["type"] != YARDSTICK
    ]


def add(level: str, rates: list[dict[str, Any]]) -> None:
    """Put the rows into the level's table, in place of those of the same types, and say so in its source."""
    document = json.loads(TABLES.read_text(encoding="utf-8"))
    table, types = document["kernels"][level], {row["type"] for row in rates}
    table["source"] = table["source"].removesuffix(NOTE) + NOTE
    table["rates"] = [row for row in table["rates"] if row["type"] not in types] + rates
    text = json.dumps(document, indent=1, ensure_ascii=False)
    text = re.sub(r'\{\s*("type":[^{}]*?)\s*\}', _in_a_line, text)
    TABLES.write_text(text + "\n", encoding="utf-8")


def _in_a_line(row: re.Match[str]) -> str:
    return f"{{{' '.join(row[1].split())}}}"


def _rounded(value: float | int | str) -> float | int | str:
    return int(float(f"{value:.3g}")) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
