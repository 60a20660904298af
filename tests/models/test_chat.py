"""Chat templates against the tokenizers of `transformers`."""

import json

import pytest

from jaxq.models import ChatTemplate, load_chat_template
from tests.models.peers import REASON

pytest.importorskip("jinja2", reason="templates need it: pip install jaxq[hf]")

# The forms of templates of published models: ChatML, Llama 2 and Mistral style checks.
TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' "
        "+ message.content + '<|im_end|>' }}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "tokens": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}"
        "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "json": (
        "{% for t in tools %}{{ t | tojson }}{% if loop.last %}{% break %}{% endif %}"
        "{% endfor %}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    ),
}
MESSAGES = [
    {"role": "user", "content": " What is <1 & 2>? "},
    {"role": "assistant", "content": "\u00e9\u4e2d"},
]
TOOLS = [{"name": "add", "help": "\u00e9 <b>"}]


def write_config(path, template, **entries):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": template,
        **entries,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_texts_are_those_of_transformers(name, add_generation_prompt, tmp_path):
    pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>"
    )
    peer.chat_template = TEMPLATES[name]
    options = {"add_generation_prompt": add_generation_prompt, "tools": TOOLS}
    expected = peer.apply_chat_template(MESSAGES, tokenize=False, **options)
    write_config(tmp_path, TEMPLATES[name])
    assert load_chat_template(tmp_path)(MESSAGES, **options) == expected


def test_where_templates_are(tmp_path):
    assert load_chat_template(tmp_path) is None
    write_config(tmp_path, None)
    assert load_chat_template(tmp_path) is None
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    write_config(tmp_path, named)
    assert load_chat_template(tmp_path)([]) == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load_chat_template(tmp_path)([]) == "z"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system message') }}",
    ],
)
def test_a_template_reaches_nothing_outside_its_values(source):
    with pytest.raises(ValueError, match="the template refuses the messages"):
        ChatTemplate(source)([{"role": "user", "content": ""}])


def test_damaged_files(tmp_path):
    with pytest.raises(ValueError, match="the source is not a template of jinja2"):
        ChatTemplate("{% for %}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an object of keys and values"):
        load_chat_template(tmp_path)
