"""Trains the bundled miniature, a DeepSeek-V3 of 26 million parameters, and looks at the result. See docs/miniature.md.

    python scripts/train_miniature.py prepare DATA --stories FOLDER
    python scripts/train_miniature.py train RUN --data DATA --steps 4000 --decay-steps 400
    python scripts/train_miniature.py train RUN2 --data DATA --start RUN/checkpoint.pt --steps 4400 --decay-steps 400
    python scripts/train_miniature.py export RUN2/checkpoint.pt FOLDER --data DATA [--fp8]
    python scripts/train_miniature.py evaluate RUN2/checkpoint.pt --data DATA
    python scripts/train_miniature.py quality RUN2/checkpoint.pt --data DATA
    python scripts/train_miniature.py text DATA held-out.txt
    python scripts/train_miniature.py compare RUN RUN3 [--plot losses.png] [--plot-balance balance.png]

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
    _add_export(commands)
    _add_evaluate(commands)
    _add_quality(commands)
    _add_text(commands)
    _add_compare(commands)
    arguments = parser.parse_args()
    arguments.command(arguments)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("prepare", help="tokenizer and token files from the stories")
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--stories", type=Path, required=True, help="folder with stories.txt and stories_index.tsv")
    parser.add_argument("--only", action="append", metavar="COLLECTION", help="of those in data.py; may be repeated")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use as it is; else one is trained")
    parser.set_defaults(command=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from miniature import data
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.tokenizer)) if arguments.tokenizer else None
    stories = data.read_stories(arguments.stories, arguments.only or data.SOURCES)
    report = data.prepare(stories, arguments.data, arguments.vocab_size, tokenizer)
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
    parser.add_argument("--threads", type=int, default=2, help="1 where others compute, too")
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


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write a Hugging Face checkpoint")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="its last part becomes the model's name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fp8", action="store_true", help="E4M3 with scales by 128x128 blocks instead of BF16")
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> None:
    import torch
    from miniature import export

    state = torch.load(arguments.checkpoint, weights_only=True)
    config = export.trained_config(state["settings"])
    export.export(config, state["model"], arguments.data / "tokenizer.json", arguments.folder, arguments.fp8)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="held-out loss, acceptance of drafts, load, sample texts, as JSON")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stories", type=int, help="the first so many of the held-out ones; all if not given")
    parser.add_argument("--length", type=int, default=512, help="tokens of a story that count")
    parser.add_argument("--precision", choices=("bf16", "fp8", "f32"), default="bf16", help="of linear layers")
    parser.add_argument("--prompt", action="append", default=[], help="beginning of a sample text; may be repeated")
    parser.add_argument("--sample-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the sample texts")
    parser.add_argument("--threads", type=int, default=2, help="1 where others compute, too")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch
    from miniature import data, evaluate
    from miniature.config import Config
    from miniature.model import Model
    from tokenizers import Tokenizer

    torch.set_num_threads(arguments.threads)
    torch.compiler.set_stance("force_eager")  # every length would be compiled for itself
    state = torch.load(arguments.checkpoint, weights_only=True)
    model = Model(Config(**state["settings"]["model"]), arguments.precision)
    model.load_state_dict(state["model"])
    tokenizer = Tokenizer.from_file(str(arguments.data / "tokenizer.json"))
    stories = data.Tokens.load(arguments.data / "validation.npz").first(arguments.stories)
    with torch.inference_mode():
        report = {"step": state["step"], **evaluate.held_out(model, stories, tokenizer, arguments.length)}
        report["greedy_acceptance"] = evaluate.greedy_acceptance(model, stories, n_prompt=32, n_tokens=64, n_stories=32)
        texts = evaluate.samples(model, tokenizer, arguments.prompt, arguments.sample_tokens, arguments.temperature)
    print(json.dumps(report | {"samples": texts}, indent=1, ensure_ascii=False))


def _add_quality(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("quality", help="what packing costs: a table, and as the last line one JSON document")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stories", type=int, help="the first so many of the held-out ones; all if not given")
    parser.add_argument("--length", type=int, default=512, help="tokens of a story that count")
    parser.add_argument("--keep", type=Path, help="folder for the files it makes; else they are removed")
    parser.add_argument("--threads", type=int, default=2, help="1 where others compute, too")
    parser.set_defaults(command=_quality)


def _quality(arguments: argparse.Namespace) -> None:
    import tempfile

    import torch
    from miniature import quality

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        report = quality.table(
            arguments.checkpoint, arguments.data, work, arguments.stories, arguments.length, arguments.threads
        )
    print(quality.markdown(report))
    print(json.dumps(report))


def _add_text(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("text", help="the held-out stories as a text file, for other programs")
    parser.add_argument("data", type=Path, help="what `prepare` wrote")
    parser.add_argument("file", type=Path, help="to write")
    parser.set_defaults(command=_text)


def _text(arguments: argparse.Namespace) -> None:
    from miniature import data
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.data / "tokenizer.json"))
    arguments.file.write_text(data.plain_text(data.Tokens.load(arguments.data / "validation.npz"), tokenizer))


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compare", help="smoothed losses of runs, as JSON, where the shortest ends")
    parser.add_argument("runs", type=Path, nargs="+", help="folders; the others are compared with the first")
    parser.add_argument("--plot", type=Path, help="picture of the losses to write")
    parser.add_argument("--plot-balance", type=Path, help="picture of the experts' load by layer to write")
    parser.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from miniature import compare

    print(json.dumps(compare.compare(arguments.runs), indent=1))
    if arguments.plot:
        compare.draw_losses(arguments.runs, arguments.plot)
    if arguments.plot_balance:
        compare.draw_balance(arguments.runs, arguments.plot_balance)


if __name__ == "__main__":
    main()
