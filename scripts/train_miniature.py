"""Trains the bundled miniature, a DeepSeek-V3 of 26 million parameters, and looks at the result. See docs/miniature.md.

    python scripts/train_miniature.py prepare DATA --stories FOLDER
    python scripts/train_miniature.py train RUN --data DATA --steps 4000 --decay-steps 400
    python scripts/train_miniature.py train RUN2 --data DATA --start RUN/checkpoint.pt --steps 4400 --decay-steps 400

`train` goes on from RUN/checkpoint.pt if there is one. Without --decay-steps the learning rate stays, and --start
branches a decayed model off such a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    _add_prepare(commands)
    _add_train(commands)
    arguments = parser.parse_args()
    arguments.command(arguments)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("prepare", help="tokenizer and token files from the stories")
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--stories", type=Path, required=True, help="folder with stories.txt and stories_index.tsv")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.set_defaults(command=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from miniature import data

    report = data.prepare(data.read_stories(arguments.stories), arguments.data, arguments.vocab_size)
    print(json.dumps(report, indent=1))


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train, or go on training")
    parser.add_argument("run", type=Path, help="folder of the run: checkpoint.pt and log.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="what `prepare` wrote")
    parser.add_argument("--steps", type=int, required=True, help="where to end")
    parser.add_argument("--decay-steps", type=int, default=0, help="the last steps, of falling learning rate")
    parser.add_argument("--start", type=Path, help="checkpoint to branch from if RUN has none")
    parser.add_argument("--precision", choices=("bf16", "fp8", "f32"), default="bf16", help="of linear layers")
    parser.add_argument("--no-balance", action="store_true", help="leave the routers' biases at 0")
    parser.add_argument("--dense", action="store_true", help="a dense model of equal active size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    parser.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> None:
    import torch
    from miniature import data, training
    from miniature.config import Config

    training.keep_memory()
    torch.set_num_threads(arguments.threads)
    settings = training.Settings(
        model=Config(n_routed_experts=0) if arguments.dense else Config(),
        precision=arguments.precision,
        balance=not arguments.no_balance,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
    )
    stream = data.Stream(data.Tokens.load(arguments.data / "train.npz"), arguments.seed)
    trainer = training.Trainer(settings, stream)
    arguments.run.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.run / "checkpoint.pt"
    start = checkpoint if checkpoint.exists() else arguments.start
    if start:
        trainer.restore(start)
    schedule = training.Schedule(arguments.steps, arguments.decay_steps)
    training.run(trainer, schedule, arguments.run, arguments.checkpoint_seconds)


if __name__ == "__main__":
    main()
