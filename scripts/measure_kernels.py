"""Rates of one core for every type: the rows of a machine description's kernels (docs/plan.md).

    python scripts/measure_kernels.py [--types Q2_K IQ2_XXS] [--columns 2048 7168] [--level avx2]

The last line of stdout is one JSON document.
"""

import argparse
import json
import os

ROWS = 2048  # of an expert's gate and up in V3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", help="ggml's names; all if not given")
    parser.add_argument("--columns", type=int, nargs="+", default=[2048, 7168])
    parser.add_argument("--level", help="a lower ISA level, as LOCALRUN_ISA takes it")
    arguments = parser.parse_args()
    if arguments.level:
        os.environ["LOCALRUN_ISA"] = arguments.level
    from localrun.plan.measure import kernel_rates
    from quant.formats import registry
    from quant.target import isa
    from quant.threads.pool import Pool

    pool = Pool(1)
    types = arguments.types or registry.NAMES
    rates = [kernel_rates(pool, type_, n_cols, [ROWS]) for type_ in types for n_cols in arguments.columns]
    rounded = [{name: _rounded(value) for name, value in row.items()} for row in rates]
    print(json.dumps({"level": isa.LEVEL, "rates": rounded}))


def _rounded(value: float | int | str) -> float | int | str:
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
