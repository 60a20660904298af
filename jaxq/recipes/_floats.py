"""What named recipes leave in floats: embeddings, routers, output heads, norms, biases.

A small error in one of these arrays changes the outputs most. The arrays are recognised
by the kind of their layer and by their name. A name is a word of the path. Components
of a path are separated by "/", or by "." in the flat dicts of Hugging Face checkpoints.
"LMHead_0" is the name that linen gives to an LMHead without an explicit name.
"""

from __future__ import annotations

from jaxq.recipes._kinds import kinds
from jaxq.recipes._rule import Rule

# At any depth of the model.
_ANYWHERE = r"re:(?i)(?:.*[/.])?"
# At the top of the model. Attention layers deeper down have an `out` as well.
_TOP = r"re:(?i)(?:(?:base_model|model|module|params|transformer)[/.])*"
# The layer itself and everything inside it.
_AND_BELOW = r"(?:_\d+)?(?:[/.].*)?"

# A weight with such a name is a factor of a product. It is not an embedding table, for
# example "embedding_proj/kernel".
_PROJECTION = r"(.*[/._])?(dense|linear|mlp|patch|proj|projection)s?\d*([/._].*)?$"
_TABLES = (
    r"([^/.]*_)?(bias_table|emb|embed|embedder|embeddings?|relative_attention_bias"
    r"|wpe|wte)"
    r"(_[^/.]*)?([/.].*)?"
)
# Gains and biases. A stack of them has two axes, as a matrix has.
_NORMS = (
    rf"(?!{_PROJECTION})([^/.]*_)?(bn|(batch|group|layer|rms)?_?norm|ln)"
    r"(_?\d+|_[^/.]*)?([/.](w|weight))?"
)
_VECTORS = r"([^/.]*_)?(beta|bias|gain|gamma|mean|scale|var)(es|s)?"
_HEADS = (
    r"embed_out|(?:[^/.]*_)?head|(lm|mlm|output)head|(to_)?logits?(_?dense)?"
    r"|unembed|unembedding"
)
_TOP_HEADS = (
    "classifier|cls|out|output|output_(layer|projection)|qa_outputs|readout|score"
)
_ROUTERS = r"router|[^/.]*moe[^/.]*[/.]gate|(?:[^/.]*_)?(expert|moe)_gate"

# A layer of such a kind is quantized at the top of a model too. Attention calls its own
# output projection `out`, and this layer is a LinearGeneral. The outputs of a
# convolution are not the logits of a model. Embed has its own row below.
_NOT_TOP_HEADS = ("LinearGeneral", "DenseGeneral", "Conv", "ConvTranspose", "Embed")
_TREE = ("Array",)


def _rows() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(what it is, pattern, kinds) of everything that stays in floats."""
    # A kind that a user registered is among these kinds, like Linear.
    top_head_kinds = tuple(kind for kind in kinds() if kind not in _NOT_TOP_HEADS)
    return (
        ("embedding", "**", ("Embed",)),
        ("router", rf"{_ANYWHERE}({_ROUTERS}){_AND_BELOW}", kinds()),
        ("output head", rf"{_ANYWHERE}({_HEADS}){_AND_BELOW}", kinds()),
        ("output head", rf"{_TOP}({_TOP_HEADS}){_AND_BELOW}", top_head_kinds),
        ("embedding", rf"{_ANYWHERE}(?!{_PROJECTION}){_TABLES}", _TREE),
        # T5's embedding.
        ("embedding", rf"{_TOP}shared[/.]weight", _TREE),
        ("norm or bias", rf"{_ANYWHERE}({_NORMS}|{_VECTORS})", _TREE),
        ("adapter", rf"{_ANYWHERE}lora_?[ab]{_AND_BELOW}", _TREE),
    )


def default_rules() -> tuple[Rule, ...]:
    """The rules that every named recipe begins with."""
    return tuple(
        Rule(
            pattern,
            kinds=kind_names,
            skip=True,
            reason=f"{what}, left in floats by default",
            optional=True,
        )
        for what, pattern, kind_names in _rows()
    )
