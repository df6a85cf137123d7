"""scripts/miniature: the model against transformers, the emulation against tile-by-tile code, the run against itself.

Sizes are tiny and weights random: nothing here needs a trained model.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import hf_checkpoints
import numpy as np
import pytest
import torch
from paths import SCRIPTS
from tokenizers import Tokenizer

import localrun
from cli.main import run as run_localrun
from localrun.convert import Options, convert, make_plan, pretokenizers

sys.path.insert(0, str(SCRIPTS))

from miniature import compare, data, evaluate, precision, quality, training
from miniature.config import Config
from miniature.export import export
from miniature.model import Model, cross_entropy
from miniature.routing import Router

TINY = Config(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=160,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    n_routed_experts=8,
    num_experts_per_tok=3,
    q_lora_rank=48,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
WORDS = ["the", "cat", "saw", "a", "dog", "and", "they", "ran", "to", "big", "tree", "then", "sat", "down", "happy"]


@pytest.fixture(autouse=True)
def small_scale() -> Iterator[None]:
    """torch.compile would take longer than all tests together; threads only wait for each other on such sizes."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(n_threads)


def lively(config: Config = TINY) -> Model:
    """A model with every bias and norm away from where training starts."""
    model = Model(config, seed=3)
    hf_checkpoints.randomise(model, 4, matrices=False)
    return model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of 150 random stories."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 40)).capitalize() + "." for _ in range(150)]
    folder = tmp_path_factory.mktemp("data")
    data.prepare([data.Story("tf1-fables", text) for text in texts], folder, vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def exported(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model and its BF16 checkpoint; the model has the rounded weights."""
    model = lively()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("e_score_correction_bias"):
                tensor.copy_(tensor.bfloat16())
    folder = tmp_path_factory.mktemp("exported") / "Miniature"
    export(TINY, model.state_dict(), prepared / "tokenizer.json", folder)
    return model, folder


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.ptp(expected))


def our_logits(model: Model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids])))[0].numpy()


def test_transformers_agrees_on_the_exported_checkpoint(exported: tuple[Model, Path]) -> None:
    from transformers import DeepseekV3ForCausalLM

    model, folder = exported
    loaded = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected = hf_checkpoints.logits(loaded)
    # float32 summation in another order gives 1e-6; a permuted head or a wrong expert moves logits by over 1e-2
    assert error(our_logits(model, hf_checkpoints.PROMPT), expected) < 1e-4


def test_transformers_tokenises_as_the_trainer_does(exported: tuple[Model, Path]) -> None:
    from transformers import AutoTokenizer

    text = "One day, the cat said 1234!\n\nThen"
    ours = Tokenizer.from_file(str(exported[1] / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(exported[1])(text)["input_ids"] == ours.encode(text).ids
    assert ours.encode(text).ids[0] == 0
    assert ours.decode(ours.encode(text).ids) == text


def test_the_vocabulary_is_split_in_a_way_that_has_a_name(prepared: Path) -> None:
    document = json.loads((prepared / "tokenizer.json").read_text())
    assert pretokenizers.recognise(document["pre_tokenizer"], ignore_merges=False) == "deepseek-v3"


def test_the_exported_checkpoint_converts_and_runs(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = exported
    path = tmp_path / "miniature.gguf"
    convert(make_plan(folder, path, Options(mix="F32")))
    with localrun.load(path, device="cpu", threads=1, ctx=64, backend="native") as runner:
        found = runner.logits(hf_checkpoints.PROMPT)
        assert runner.tokenizer.decode(runner.tokenizer.encode("the cat ran")) == "the cat ran"
        assert "blk.3.nextn.eh_proj.weight" in runner.file.tensors
    assert error(found, our_logits(model, hf_checkpoints.PROMPT)) < 1e-5  # both float32


def test_the_fp8_checkpoint_converts_to_the_rounded_weights(prepared: Path, tmp_path: Path) -> None:
    model = lively()
    export(TINY, model.state_dict(), prepared / "tokenizer.json", tmp_path / "fp8", fp8=True)
    convert(make_plan(tmp_path / "fp8", tmp_path / "fp8.gguf", Options(mix="F32")))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if any(part in name for part in ("embed_tokens", "lm_head", "gate.weight", "norm", "eh_proj")):
                tensor.copy_(tensor.bfloat16())
            elif "gate_up_proj" in name:  # stored as two matrices, whose blocks do not reach over
                tensor.copy_(torch.cat([precision.to_fp8_blocks(half) for half in tensor.chunk(2, 1)], 1))
            elif tensor.ndim > 1:
                tensor.copy_(precision.to_fp8_blocks(tensor))
    with localrun.load(tmp_path / "fp8.gguf", device="cpu", threads=1, ctx=64, backend="native") as runner:
        found = runner.logits(hf_checkpoints.PROMPT)
    assert error(found, our_logits(model, hf_checkpoints.PROMPT)) < 1e-5  # both float32


def test_rounding_to_e4m3_is_torchs() -> None:
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = finite[finite.isfinite()].sort().values.double()
    near = [(values + factor * 2.0**-20 * values.abs()).float() for factor in (-1, 0, 1)]
    between = ((values[1:] + values[:-1]) / 2).float()  # ties
    x = torch.cat((*near, between, between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(-1e9))))
    assert torch.equal(precision.to_e4m3(x), x.to(torch.float8_e4m3fn).float())


def by_tiles(x: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Through torch's E4M3 tile by tile, the scale of each its largest magnitude over 448."""
    out = torch.empty_like(x)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            place = np.s_[i : i + tile[0], j : j + tile[1]]
            scale = x[place].abs().max() / 448
            out[place] = (x[place] / scale).to(torch.float8_e4m3fn).float() * scale if scale else 0.0
    return out


def test_fp8_rounding_is_that_of_obvious_code() -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 300)
    x[3], x[:, 128:256] = 0.0, x[:, 128:256] * 1e-30
    assert torch.equal(precision.to_fp8_tiles(x), by_tiles(x, (1, 128)))
    assert torch.equal(precision.to_fp8_blocks(x), by_tiles(x, (128, 128)))
    assert torch.equal(precision.to_fp8_blocks(x[None])[0], by_tiles(x, (128, 128)))


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_a_linear_layer_is_autograds_on_rounded_operands(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((160, 256), (192, 256), (160, 192)))
    rounding = precision.PRECISIONS[name]
    rounded_x, rounded_w = (t.requires_grad_() for t in (rounding.activation(x), rounding.weight(weight)))
    expected = rounded_x @ rounded_w.t()
    expected.backward(rounding.gradient(grad))
    x.requires_grad_(), weight.requires_grad_()
    found = precision.linear(x, weight, rounding)
    found.backward(grad)
    # the same float32 products; libraries may sum transposed operands in another order
    for ours, autograds in ((found, expected), (x.grad, rounded_x.grad), (weight.grad, rounded_w.grad)):
        torch.testing.assert_close(ours, autograds, rtol=1e-5, atol=1e-4)
    assert (name == "f32") == torch.equal(rounded_x, x)


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_a_grouped_linear_layer_is_one_linear_layer_a_group(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((50, 128), (4, 64, 128), (50, 64)))
    n_rows, rounding = [20, 0, 29, 1], precision.PRECISIONS[name]
    x.requires_grad_(), weight.requires_grad_()
    parts = zip(x.split(n_rows), weight, strict=True)
    expected = torch.cat([precision.linear(rows, w, rounding) for rows, w in parts])
    expected_grads = torch.autograd.grad(expected, (x, weight), grad)
    found = precision.grouped_linear(x, weight, n_rows, rounding)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, (x, weight), grad), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # float32, perhaps in another order


def test_the_loss_and_its_gradients_are_torchs() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, head = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((2500, 16), (90, 16)))
    targets = torch.randint(90, (2500,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), targets)
    found = cross_entropy(hidden, head, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # float32 sums of 2500 terms
    grads, expected_grads = (torch.autograd.grad(3 * loss, (hidden, head)) for loss in (found, expected))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_gradients_reach_every_parameter() -> None:
    model = Model(TINY)
    main, mtp = model.losses(torch.randint(320, (4, 66), generator=torch.Generator().manual_seed(0)))
    (main + 0.3 * mtp).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_module_drafts_from_the_normed_state_and_the_next_embedding() -> None:
    model, ids = lively(), torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[-1]
    with torch.no_grad():
        hidden = model.hidden(ids[:, :-1])
        embedded = model.model.embed_tokens(ids[:, 1:])
        joined = torch.cat((layer.enorm(embedded), layer.hnorm(hidden)), -1) @ layer.eh_proj.weight.t()
        expected = layer.shared_head["norm"](layer(joined, model._rope_of(11)))
        # one product of another shape: float32 rounding
        torch.testing.assert_close(model.draft_hidden(hidden, ids[:, 1:]), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 11), rtol=0.5, atol=0)  # behind the norm


def test_the_bias_moves_against_the_load_and_only_selects() -> None:
    router = Router(TINY)
    torch.nn.init.normal_(router.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) + 0.5
    weights, experts = router(x)
    assert torch.equal(router.load, torch.bincount(experts.flatten(), minlength=8))
    torch.testing.assert_close(weights.sum(1), torch.full((64,), TINY.routed_scaling_factor))
    affinity = (x @ router.weight.t()).sigmoid().gather(1, experts)
    torch.testing.assert_close(weights, 1.5 * affinity / affinity.sum(1, keepdim=True))
    router.load = torch.tensor([30, 24, 24, 0, 24, 42, 24, 24])
    assert router.max_violation() == 42 / 24 - 1
    router.balance(0.001)
    torch.testing.assert_close(router.e_score_correction_bias * 1000, torch.tensor([-1.0, 0, 0, 1, 0, -1, 0, 0]))


def test_balancing_evens_out_the_load() -> None:
    router = Router(TINY)
    torch.nn.init.normal_(router.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)) + 1.0
    router(x)
    before = router.max_violation()
    for _ in range(300):
        router(x)
        router.balance(0.002)
    assert before > 0.9
    assert router.max_violation() < 0.1


def settings(**changes: object) -> training.Settings:
    return training.Settings(**({"model": TINY, "n_sequences": 2, "length": 32, "warmup_steps": 4} | changes))


def train(folder: Path, prepared: Path, schedule: training.Schedule, start: Path | None = None) -> training.Trainer:
    stream = data.Stream(data.Tokens.load(prepared / "train.npz"), seed=0)
    trainer = training.Trainer(settings(), stream)
    folder.mkdir(exist_ok=True)
    if start:
        trainer.restore(start)
    training.run(trainer, schedule, folder, checkpoint_seconds=1e9)
    return trainer


def test_a_run_goes_on_bit_by_bit(prepared: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", prepared, training.Schedule(8, decay_steps=3))
    part = tmp_path / "part"
    train(part, prepared, training.Schedule(5))
    (part / "log.jsonl").open("a").write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # behind the checkpoint
    resumed = train(part, prepared, training.Schedule(8, decay_steps=3), start=part / "checkpoint.pt")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "part")]
    lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, 9))
    assert [line["mtp_weight"] for line in lines[0]] == [0.3] * 5 + [0.1] * 3
    assert lines[0][-1]["lr"] == pytest.approx(settings().learning_rate / 3, abs=1e-8)  # as rounded in the log


def test_a_checkpoint_of_other_settings_is_refused(prepared: Path, tmp_path: Path) -> None:
    train(tmp_path, prepared, training.Schedule(1))
    stream = data.Stream(data.Tokens.load(prepared / "train.npz"), seed=0)
    with pytest.raises(SystemExit, match="was trained with"):
        training.Trainer(settings(precision="fp8"), stream).restore(tmp_path / "checkpoint.pt")


def test_training_learns(prepared: Path, tmp_path: Path) -> None:
    train(tmp_path, prepared, training.Schedule(40))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 1.0  # from ln(320) nats to less than a third of the vocabulary
    assert log[-1]["mtp_loss"] < log[0]["mtp_loss"] - 0.5


def test_the_stream_is_all_stories_once_an_epoch(prepared: Path) -> None:
    stories = data.Tokens.load(prepared / "train.npz")
    stream, n_tokens = data.Stream(stories, seed=1), len(stories.tokens)
    read = np.concatenate([stream.batch(step, 2, 16)[:, :16].ravel() for step in range(2 * n_tokens // 32)])
    epochs = read[:n_tokens], read[n_tokens : 2 * n_tokens]
    for epoch in epochs[:1]:
        assert np.array_equal(np.sort(epoch), np.sort(stories.tokens))
    assert not np.array_equal(epochs[0][:100], epochs[1][:100])
    first = stream.batch(0, 2, 16)
    assert np.array_equal(first[0, 16:], first[1, :2])  # the two tokens behind a sequence begin the next


def test_no_story_is_in_both_parts(prepared: Path) -> None:
    parts = [data.Tokens.load(prepared / f"{name}.npz") for name in ("train", "validation")]
    train_stories, held_out = ({story.tobytes() for story in part} for part in parts)
    assert len(train_stories) + len(held_out) == 150
    assert held_out
    assert not train_stories & held_out


def test_held_out_loss_is_that_of_single_stories(prepared: Path) -> None:
    model, stories = lively(), data.Tokens.load(prepared / "validation.npz")
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    with torch.inference_mode():
        report = evaluate.held_out(model, stories, tokenizer, length=100)  # all of them, of different lengths
        nats, n_tokens, n_bytes = 0.0, 0, 0
        for story in stories:
            ids = torch.from_numpy(story[:100].astype(np.int64))[None]
            logits = model.logits(model.hidden(ids))[0]
            nats += float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
            n_tokens, n_bytes = n_tokens + ids.shape[1] - 1, n_bytes + len(tokenizer.decode(ids[0].tolist()))
    assert (report["tokens"], report["bytes"]) == (n_tokens, n_bytes)
    assert report["loss"] == pytest.approx(nats / n_tokens, rel=1e-5)  # float32 sums
    assert report["bits_per_byte"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)
    assert 0 <= report["acceptance"] <= 1


def test_a_dense_model_is_evaluated_too(prepared: Path) -> None:
    model = Model(dataclasses.replace(TINY, n_routed_experts=0), seed=3)
    stories = data.Tokens.load(prepared / "validation.npz")
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    with torch.inference_mode():
        report = evaluate.held_out(model, stories, tokenizer, length=100)
        accepted = evaluate.greedy_acceptance(model, stories, n_prompt=8, n_tokens=4, n_stories=1)
    assert report["max_violation"] == {} and report["bits_per_byte"] > 0
    assert 0 <= accepted <= 1


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Logs of two runs, the first ten steps longer and with experts."""
    losses = {"a": [4.0] * 150 + [2.0] * 60, "b": [4.0] * 150 + [3.0] * 50}
    for name, values in losses.items():
        violation = {"1": 0.5, "2": 0.25} if name == "a" else {}
        lines = [
            {"tokens": 10 * (i + 1), "loss": loss, "mtp_loss": loss + 1, "max_violation": violation}
            for i, loss in enumerate(values)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [tmp_path / name for name in losses]


def test_runs_are_compared_where_the_shortest_ends(runs: list[Path]) -> None:
    a, b = compare.compare(runs)
    at_the_end = {"tokens": 2000, "mean_of_steps": 100}
    violation = {"1": 0.5, "2": 0.25}
    assert a == {"run": "a", **at_the_end, "loss": 3.0, "mtp_loss": 4.0, "max_violation": violation, "over_first": 0.0}
    assert (b["run"], b["tokens"], b["loss"], b["max_violation"]) == ("b", 2000, 3.5, {})
    assert b["over_first"] == pytest.approx(3.5 / 3 - 1)


def test_pictures_of_runs(runs: list[Path], tmp_path: Path) -> None:
    compare.draw_losses(runs, tmp_path / "losses.svg")
    text = (tmp_path / "losses.svg").read_text()
    assert "<!-- b, at the end +16.67% -->" in text  # matplotlib notes a text before it draws its letters
    compare.draw_balance(runs, tmp_path / "balance.svg")
    text = (tmp_path / "balance.svg").read_text()
    assert "<!-- layer 2 -->" in text and "<!-- a -->" in text and "<!-- b -->" not in text
    with pytest.raises(SystemExit, match="none of the runs"):
        compare.draw_balance(runs[1:], tmp_path / "none.svg")


def test_the_figures_of_packed_weights_are_those_of_obvious_code() -> None:
    generator = np.random.default_rng(0)
    stories = [generator.integers(0, 50, length) for length in (9, 5)]
    p, q = ([torch.from_numpy(generator.normal(0, 2, (len(ids), 50))) for ids in stories] for _ in "pq")
    logits = {len(ids): rows for ids, *rows in zip(stories, p, q, strict=True)}
    reference, found = (
        quality.log_probabilities(lambda ids, which=which: logits[len(ids)][which].float().numpy(), stories)
        for which in (0, 1)
    )
    figures = quality.compare(found, reference, stories)
    p, q = (torch.cat([rows[:-1] for rows in part]).log_softmax(1) for part in (p, q))
    targets = torch.from_numpy(np.concatenate([ids[1:] for ids in stories]))
    # log-probabilities are held in float32
    assert figures["loss"] == pytest.approx(float(torch.nn.functional.nll_loss(q, targets)), rel=1e-6)
    divergence = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert figures["kl"] == pytest.approx(float(divergence), rel=1e-5)
    assert figures["top_1"] == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))


def test_the_quality_table(prepared: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """All commands, in this process. Random weights: what matters is which file each row is of."""

    def in_process(*arguments: str) -> dict:
        capsys.readouterr()
        assert run_localrun([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(quality, "_localrun", in_process)
    monkeypatch.setattr(quality, "PACKED", {"Q8_0": False, "Q4_0": True})
    model = lively()
    state = {"settings": {"model": TINY.to_dict(), "length": 64}, "step": 7, "model": model.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    report = quality.table(tmp_path / "checkpoint.pt", prepared, tmp_path, stories=2, length=40, threads=1)
    rows = {(row["name"], row["imatrix"]): row for row in report["rows"]}
    fp8, fp8_too = "FP8 (block)", "FP8 (block), activations too"
    names = [("F32", False), ("BF16", False), (fp8, False), (fp8_too, False)]
    assert list(rows) == [*names, ("Q8_0", False), ("Q4_0", False), ("Q4_0", True)]
    assert report["tokens"] == 2 * 39
    assert json.loads((tmp_path / "Miniature" / "config.json").read_text())["max_position_embeddings"] == 64
    kl = {key: row["kl"] for key, row in rows.items()}
    assert kl["F32", False] == 0 < kl["BF16", False] < kl[fp8, False] < kl[fp8_too, False]
    assert kl["BF16", False] < kl["Q8_0", False] < kl["Q4_0", False] != kl["Q4_0", True]
    nats = [
        float(torch.nn.functional.cross_entropy(torch.from_numpy(our_logits(model, ids[:-1])), torch.tensor(ids[1:])))
        for ids in (story[:40].tolist() for story in data.Tokens.load(prepared / "validation.npz").first(2))
    ]
    assert rows["F32", False]["loss"] == pytest.approx(np.mean(nats), rel=1e-5)  # both float32
    assert report["fp8_loss_over_bf16"][fp8] == rows[fp8, False]["loss"] / rows["BF16", False]["loss"] - 1
    bits = {key: row["bits_per_weight"] for key, row in rows.items()}
    assert (bits["F32", False], bits["BF16", False], bits["Q4_0", False]) == pytest.approx((32, 16, 5), abs=0.7)
    assert 8 < bits[fp8, False] < 16
    assert "| Q4_0 | yes |" in quality.markdown(report)


def test_the_script_runs_from_stories_to_a_report(prepared: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    train(tmp_path, prepared, training.Schedule(1))
    command = ["evaluate", str(tmp_path / "checkpoint.pt"), "--data", str(prepared), "--prompt", "The cat"]
    monkeypatch.setattr(sys, "argv", ["train_miniature.py", *command, "--sample-tokens", "4", "--threads", "1"])
    capsys.readouterr()
    runpy.run_path(str(SCRIPTS / "train_miniature.py"), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 1
    assert report["samples"][0].startswith("The cat")
    assert report["bits_per_byte"] > 0
