"""Conversions for the tests of the converter, in units so small that a tiny model takes hundreds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from localrun.convert import Options, Plan, make_plan

UNIT_BYTES = 1 << 14
EXPERTS, DENSE = "blk.1.ffn_up_exps.weight", "blk.0.ffn_up.weight"


def plan_for(source: Path, destination: Path, mix: str = "Q8_0", **options: Any) -> Plan:
    return make_plan(source, destination, Options(**({"mix": mix, "unit_bytes": UNIT_BYTES} | options)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_imatrix(path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray], **keys: str) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", keys.get("type", "imatrix"))
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
