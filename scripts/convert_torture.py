"""Converts a large synthetic checkpoint undisturbed, then again with SIGKILL at random moments; compares the bytes.

    python scripts/convert_torture.py FOLDER [--gigabytes 6] [--kills 10] [--type Q4_K_M] [-t N] [--seed 0]

FOLDER needs room for the checkpoint (kept for the next call) and twice the result. The checkpoint has the widths of
DeepSeek-V2-Lite, in FP8 with scales by block. The last line of stdout is one JSON document: sizes, seconds, peak
resident memory of all runs, how far each killed run came, and whether the hashes are equal. The undisturbed run's
seconds are compared with what packing alone takes, and with what the disk takes to read as much and to write as much.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from localrun.hardware import usable_cores
from quant.formats import registry
from quant.quantize import tensor as pack
from quant.threads.pool import Pool

HIDDEN, INNER, DENSE, EXPERTS, VOCAB = 2048, 1408, 10944, 64, 32000
HEADS, NOPE, ROPE, VALUE, LATENT = 16, 128, 64, 128, 512
BLOCK = 128
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}
LAYER_BYTES = 3 * HIDDEN * INNER * (EXPERTS + 2)  # of a layer with experts, near enough


def make_layer(index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The tensors of one layer, random."""
    tensors: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, cols: int) -> None:
        codes = torch.randint(0, 256, (rows, cols), generator=generator, dtype=torch.uint8)
        codes[(codes & 127) == 127] = 0  # the two codes of NaN
        tensors[f"model.layers.{index}.{name}.weight"] = codes.view(torch.float8_e4m3fn)
        scale = torch.rand(-(-rows // BLOCK), -(-cols // BLOCK), generator=generator) * 1e-4
        tensors[f"model.layers.{index}.{name}.weight_scale_inv"] = scale

    def mlp(name: str, inner: int) -> None:
        matrix(f"{name}.gate_proj", inner, HIDDEN)
        matrix(f"{name}.up_proj", inner, HIDDEN)
        matrix(f"{name}.down_proj", HIDDEN, inner)

    for norm, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
        tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    tensors[f"model.layers.{index}.self_attn.kv_a_layernorm.weight"] = torch.ones(LATENT, dtype=torch.bfloat16)
    matrix("self_attn.q_proj", HEADS * (NOPE + ROPE), HIDDEN)
    matrix("self_attn.kv_a_proj_with_mqa", LATENT + ROPE, HIDDEN)
    matrix("self_attn.kv_b_proj", HEADS * (NOPE + VALUE), LATENT)
    matrix("self_attn.o_proj", HIDDEN, HEADS * VALUE)
    if index < CONFIG["first_k_dense_replace"]:
        mlp("mlp", DENSE)
        return tensors
    router = torch.randn(EXPERTS, HIDDEN, generator=generator)
    tensors[f"model.layers.{index}.mlp.gate.weight"] = router.bfloat16()
    mlp("mlp.shared_experts", 2 * INNER)
    for expert in range(EXPERTS):
        mlp(f"mlp.experts.{expert}", INNER)
    return tensors


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A shard a layer, until there are so many bytes."""
    n_layers = 1 + -(-int(gigabytes * 1e9) // LAYER_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text())["num_hidden_layers"] == n_layers:
        return
    generator, index = torch.Generator().manual_seed(0), {}
    ends = {"model.norm.weight": torch.ones(HIDDEN)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ends[name] = torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16()
    for number in range(n_layers + 1):
        tensors = make_layer(number, generator) if number < n_layers else ends
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
        print(f"checkpoint: shard {number + 1} of {n_layers + 1}", file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": n_layers}))  # last: its presence means all is there


def command(arguments: argparse.Namespace, destination: Path, *options: str) -> list[str]:
    """localrun convert, of the checkpoint."""
    threads = ["-t", str(arguments.threads)] if arguments.threads else []
    checkpoint = str(arguments.folder / "checkpoint")
    convert = [sys.executable, "-m", "cli.main", "convert", checkpoint, str(destination), "--type", arguments.type]
    return [*convert, "--json", *threads, *options]


def dry_run(arguments: argparse.Namespace) -> list[dict]:
    """The plan, a dict a tensor."""
    options = command(arguments, arguments.folder / "none.gguf", "--dry-run")
    return json.loads(subprocess.run(options, capture_output=True, check=True).stdout)["plan"]


class Run:
    """One `localrun convert`, watched: its resident memory is read ten times a second."""

    def __init__(self, arguments: argparse.Namespace, destination: Path) -> None:
        self._started = time.perf_counter()
        self._process = subprocess.Popen(command(arguments, destination, "--resume"), stdout=subprocess.PIPE, text=True)
        self.peak_bytes = 0

    def wait(self, seconds: float = float("inf")) -> bool:
        """Watches for so long; whether the process has ended."""
        until = time.perf_counter() + seconds
        while self._process.poll() is None and time.perf_counter() < until:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self._process.pid}/status").read_text())
            if found:
                self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)
            time.sleep(0.1)
        return self._process.poll() is not None

    def wait_for_work(self) -> None:
        """Until it writes, or has ended."""
        io = Path(f"/proc/{self._process.pid}/io")
        while not self.wait(0.1) and int(re.search(r"wchar: (\d+)", io.read_text())[1]) < 1 << 20:
            pass

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def result(self) -> dict:
        """What it said at its end."""
        if self._process.wait():
            raise SystemExit(f"localrun convert ended with {self._process.returncode}")
        return json.loads(self._process.stdout.read()) | {"wall_s": time.perf_counter() - self._started}


def best_of(repetitions: int, function: Callable[[], None]) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def packing_seconds(plan: list[dict], threads: int) -> float:
    """What packing alone takes: as many weights in each type, from memory to memory, by rates of 16 million."""
    pool, shape, seconds = Pool(threads), (8192, HIDDEN), 0.0
    rows = (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(np.float32)
    weights = Counter()
    for tensor in plan:
        weights[tensor["to"]] += prod(tensor["shape"])
    for type_, n_weights in weights.items():
        format_ = registry.get(type_)
        out = np.empty((shape[0], format_.row_bytes(shape[1])), np.uint8)
        once = best_of(4, lambda f=format_, o=out: pack.pack(pool, f, rows.ctypes.data, *shape, o.ctypes.data))
        seconds += once / rows.size * n_weights
    pool.close()
    return seconds


def disk_seconds(arguments: argparse.Namespace, bytes_in: int, bytes_out: int) -> float:
    """What the disk takes to read and write so much, one after the other, by rates of a gigabyte."""
    size, chunk = 1 << 30, memoryview(bytearray(os.urandom(1 << 26)))
    path = arguments.folder / "rate"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(chunk)):
                file.write(chunk)
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from the system's cache
            while file.readinto(chunk):
                pass

    write_s, read_s = best_of(2, write), best_of(2, read)
    path.unlink()
    return bytes_in * read_s / size + bytes_out * write_s / size


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)


def _digest(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def torture(arguments: argparse.Namespace) -> dict:
    """Both conversions, and the comparison."""
    undisturbed, killed = (arguments.folder / f"{name}.gguf" for name in ("undisturbed", "killed"))
    for path in (undisturbed, killed):
        for left in arguments.folder.glob(path.name + "*"):
            left.unlink()
    first = Run(arguments, undisturbed)
    first.wait()
    facts, peaks = first.result(), [first.peak_bytes]
    packing_s = packing_seconds(dry_run(arguments), arguments.threads or usable_cores())
    disk_s = disk_seconds(arguments, facts["bytes_in"], facts["bytes_out"])
    print(f"undisturbed: {facts['seconds']} s; packing {packing_s:.1f} s, disk {disk_s:.1f} s", file=sys.stderr)
    choose, done = random.Random(arguments.seed), []
    for _ in range(arguments.kills):
        run = Run(arguments, killed)
        run.wait_for_work()
        # All kills together take some 80% of the whole on average, of which what was not yet synced is lost.
        if run.wait(choose.uniform(0.0, 1.6) * facts["seconds"] / arguments.kills):
            raise SystemExit(f"the conversion ended before kill {len(done) + 1}; more --gigabytes leave time for all")
        run.kill()
        peaks.append(run.peak_bytes)
        journal = killed.with_name(killed.name + ".journal")
        done.append(json.loads(journal.read_text().splitlines()[-1]).get("done", 0) if journal.exists() else 0)
        print(f"killed at unit {done[-1]}", file=sys.stderr)
    last = Run(arguments, killed)
    last.wait()
    last.result()
    peaks.append(last.peak_bytes)
    keys = ("type", "parameters", "file_bytes", "bytes_in", "bytes_out", "seconds")
    return {key: facts[key] for key in keys} | {
        "weights_per_s": round(facts["parameters"] / facts["seconds"]),
        "part_of_packing_rate": packing_s / facts["seconds"],
        "part_of_disk_rate": disk_s / facts["seconds"],
        "killed_at_unit": done,
        "peak_rss_bytes": max(peaks),
        "sha256": sha256(undisturbed),
        "equal": sha256(undisturbed) == sha256(killed),
    }


def main() -> None:
    """Print the facts; exit 1 if the bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.folder / "checkpoint", arguments.gigabytes)
    document = torture(arguments)
    print(json.dumps(document))
    sys.exit(not document["equal"])


if __name__ == "__main__":
    main()
