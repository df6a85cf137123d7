"""What a trained model is worth: held-out loss, acceptance of its drafts, the load of its experts, sample texts.

B batch, T tokens, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from miniature.data import EOS, Tokens
from miniature.model import Model

N_TOGETHER = 8  # stories of about equal length


def held_out(model: Model, stories: Tokens, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Loss and drafts on stories of which each stands alone, cut behind `length` tokens.

    Returns:
        bits_per_byte: of the text; the nats include those of the token that ends a story.
        loss, mtp_loss: nats a token, of the next and, by the MTP module, of the one after.
        acceptance: how often the module's first choice for a token is the main model's own, given the text before it:
            the drafts that greedy verification would accept if the text were what the main model had chosen.
        max_violation: by layer, of all these tokens together.
    """
    sums = dict.fromkeys(("nats", "mtp_nats", "tokens", "drafts", "accepted", "bytes"), 0.0)
    load = {index: torch.zeros_like(router.load) for index, router in model.routers()}
    for ids, n_valid in _batches(stories, length):
        hidden = model.hidden(ids)
        logits, mask = model.logits(hidden)[:, :-1], torch.arange(1, ids.shape[1]) < n_valid[:, None]
        sums["nats"] += float(_nats(logits, ids[:, 1:])[mask].sum())
        sums["tokens"] += int(mask.sum())
        if model.config.num_nextn_predict_layers:
            drafts = model.logits(model.draft_hidden(hidden[:, :-1], ids[:, 1:]))
            _add_drafts(sums, drafts[:, :-1], logits[:, 1:], ids[:, 2:], mask[:, 1:])
        for index, router in model.routers():
            load[index] += router.load
        sums["bytes"] += sum(
            len(tokenizer.decode(row[:n].tolist()).encode()) for row, n in zip(ids, n_valid, strict=True)
        )
    return {
        "bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        "loss": sums["nats"] / sums["tokens"],
        "mtp_loss": sums["mtp_nats"] / max(sums["drafts"], 1),
        "acceptance": sums["accepted"] / max(sums["drafts"], 1),
        "tokens": int(sums["tokens"]),
        "bytes": int(sums["bytes"]),
        "max_violation": {index: float(n.max() / n.float().mean() - 1) for index, n in load.items()},
    }


def _add_drafts(
    sums: dict[str, float], drafts: torch.Tensor, verified: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> None:
    """Logits of the module and of the main model for the same tokens, (B, T, V)."""
    sums["mtp_nats"] += float(_nats(drafts, targets)[mask].sum())
    sums["drafts"] += int(mask.sum())
    sums["accepted"] += int((drafts.argmax(-1) == verified.argmax(-1))[mask].sum())


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _batches(stories: Tokens, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """ids (B, T), filled up at the right with the token that ends a story, and how many of each row are the story's.

    What fills up cannot be seen from the left; it only adds a little to the experts' load.
    """
    cut = sorted((story[:length].astype(np.int64) for story in stories), key=len)
    for first in range(0, len(cut), N_TOGETHER):
        rows = cut[first : first + N_TOGETHER]
        ids = np.full((len(rows), max(map(len, rows))), int(rows[0][-1]))
        for row, story in zip(ids, rows, strict=True):
            row[: len(story)] = story
        yield torch.from_numpy(ids), torch.tensor([len(story) for story in rows])


def generate(model: Model, ids: torch.Tensor, n_tokens: int, temperature: float = 0.0, seed: int = 0) -> torch.Tensor:
    """ids (B, T + n_tokens), every token computed from the whole text before it; greedy at temperature 0."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_tokens):
        logits = model.logits(model.hidden(ids)[:, -1])
        if temperature:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        ids = torch.cat((ids, chosen), 1)
    return ids


def greedy_acceptance(model: Model, stories: Tokens, n_prompt: int, n_tokens: int, n_stories: int) -> float:
    """Share of second tokens accepted while the model continues beginnings of held-out stories greedily.

    A story that ends earlier than n_tokens counts up to its end.
    """
    begun = [story[:n_prompt].astype(np.int64) for story in stories if len(story) > n_prompt][:n_stories]
    ids = generate(model, torch.from_numpy(np.stack(begun)), n_tokens)
    hidden = model.hidden(ids)
    drafts = model.logits(model.draft_hidden(hidden[:, :-1], ids[:, 1:])).argmax(-1)[:, n_prompt - 1 : -1]
    verified = ids[:, n_prompt + 1 :]
    eos = int(stories.tokens[-1])
    before_end = (ids[:, n_prompt:-1] != eos).cumprod(1).bool()
    return float((drafts == verified)[before_end].float().mean())


def samples(model: Model, tokenizer: Tokenizer, prompts: list[str], n_tokens: int, temperature: float) -> list[str]:
    """Continuations, the prompt included, each up to where the model ends the story."""
    texts = []
    for seed, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        story = generate(model, ids, n_tokens, temperature, seed)[0].tolist()
        end = tokenizer.token_to_id(EOS)
        texts.append(tokenizer.decode(story[: story.index(end)] if end in story else story))
    return texts
