"""The family that docs/extending.md shows, against its model's published chat template."""

import pytest
from support import documented

from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.records import Record
from dpa_xtuner.families import find_family
from dpa_xtuner.families.template_check import check_template
from dpa_xtuner.registry import FAMILIES

# mistralai/Mistral-7B-Instruct-v0.2, tokenizer_config.json, without its checks of the roles.
MISTRAL = r"""{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] + eos_token}}{%- endif %}
{%- endfor %}"""
TURNS = (("What is shown here?", "Two cats sleep."), ("And the dog?", "It sleeps."))


@pytest.fixture
def mistral():
    exec(compile(documented.files()["my_family.py"], "my_family.py", "exec"), {})
    yield find_family("mistral_v0_2")
    del FAMILIES.module_dict["mistral_v0_2"]


@pytest.mark.parametrize("kind", ["legacy", "new"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tokens_are_those_of_the_published_template(mistral, sentencepiece, kind, system):
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = MISTRAL
    check_template(mistral, tokenizer, "mistral_v0_2")
    encoded = RecordTokenizer(tokenizer, "chat", 1, mistral.template, 4096)(
        [Record("", (), system, TURNS)]
    )
    messages = [{"role": "system", "content": system}] if system else []
    for human, gpt in TURNS:
        messages += [{"role": "user", "content": human}, {"role": "assistant", "content": gpt}]
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert encoded.supervised.any()
