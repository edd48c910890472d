#!/usr/bin/env python3
"""Makes chat.json: what Transformers' apply_chat_template renders, or the error it raises.

Run:  python make_chat_goldens.py
With: transformers 5.23.0, jinja2 3.1.6, tokenizers 0.23.3, gguf 0.19.0
Needs the real model in the cache folder (scripts/setup brings it).

The template "smollm2" is read from the real model and not written; the others are written here.
strftime_now tells NOW in UTC.
"""

import datetime
import json
import os
from pathlib import Path

import gguf
import jinja2
import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorikeet"
MODEL = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
NOW = 1732421096  # 2024-11-24 04:04:56 UTC


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).replace(tzinfo=None)


chat_template_utils.datetime = Clock

TEMPLATES = {
    # System, user and assistant turns with headers; trimmed contents; the date in the system turn.
    "llama3_style": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if strftime_now is defined %}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('One call at a time, not ' ~ message.tool_calls | length) }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    # Strict alternation, refused by raise_exception; the system text joins the last user turn.
    "mistral_style": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Turns of user and assistant must alternate!") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"].strip() + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant here, not " + message["role"]) }}
    {%- endif %}
{%- endfor %}
""",
    # Tools as JSON lines, tool results grouped into one user turn, reasoning of old turns dropped.
    "qwen_style": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Functions\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not (message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<result>\\n' + content + '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    # White space: trim_blocks and lstrip_blocks without any minus sign, comments, a macro.
    "blocks": """{# a comment #}
{% macro turn(role, text) %}
[{{ role }}] {{ text }}
{% endmacro %}
begin
  {% for message in messages %}
    {% if message.role == 'user' %}
  {{ turn('U', message.content) }}
    {% else %}
  {{ turn('A', message.content) }}
    {% endif %}
  {% endfor %}
end {% if add_generation_prompt %}yes{% endif %}

""",
    "generation_tag": """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
{% set inside = message.content %}
<{{ inside }}>
{% endgeneration %}
{%- else -%}
{{ message.content }}{{ inside }}
{%- generation -%} x {%- endgeneration -%}
{% endif %}
{% endfor %}
""",
    "loops": """{%- for message in messages -%}
{%- if message.content == 'skip' -%}{%- continue -%}{%- endif -%}
{%- if message.content == 'stop' -%}{%- break -%}{%- endif -%}
{{ loop.index }}/{{ loop.length }}:{{ loop.previtem.role if loop.previtem is defined else '-' }}<{{ message.role }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }} {{ loop.cycle('a', 'b') }} {{ loop.revindex }} {{ loop.first }} {{ loop.last }};
{%- else -%}nothing{%- endfor -%}
{%- for key, value in tools[0].items() if value is string %} {{ key }}={{ value }}{% endfor -%}
{%- for x in range(3) %}{% for y in range(x) %}{{ loop.index }}{{ loop.index0 }} {% endfor %}{% endfor %}
""",
    # Values of every kind as Python writes them.
    "values": """{{ none }}|{{ true }}|{{ false }}|{{ missing }}|{{ 1 }}|{{ -2 }}|{{ 1.0 }}|{{ 2.5 }}|{{ 7 / 2 }}|{{ 7 // 2 }}|{{ 7 % 3 }}|{{ 2 ** 10 }}
{{ extra }}
{{ extra.list }}|{{ extra.map }}|{{ extra['text'] }}|{{ extra.list[-1] }}|{{ extra.list[1:] }}|{{ extra.list[::-1] }}|{{ extra.text[1:3] }}
{{ extra | tojson }}
{{ extra | tojson(indent=2) }}
{{ extra | tojson(indent=4, sort_keys=true) }}
{{ extra | tojson(ensure_ascii=true) }}
{{ extra | tojson(separators=(',', ':')) }}
{{ [] | tojson }}{{ {} | tojson }}{{ [] | tojson(indent=2) }}{{ {'a': {}} | tojson(indent=1) }}
{{ tools | tojson if tools else 'no tools' }}
""",
    "tests": """{% for x in [1, 1.5, 'a', none, true, [1], {'a': 1}, missing] %}
{{ x is defined }} {{ x is none }} {{ x is string }} {{ x is number }} {{ x is integer }} {{ x is float }} {{ x is boolean }} {{ x is mapping }} {{ x is sequence }} {{ x is iterable }} {{ x is true }} {{ x is false }}
{% endfor %}
{{ 'a' in 'cat' }} {{ 'k' in {'k': 1} }} {{ 3 not in [1, 2] }} {{ 'x' is in ['x'] }} {{ 4 is even }} {{ 4 is divisibleby 2 }} {{ 'A' is upper }} {{ 1 == 1.0 }} {{ 'a' < 'b' }} {{ not '' }} {{ [] or 'empty' }}
""",
    "methods": """{% set s = '  Ab, cd, ab  ' %}
[{{ s.strip() }}] [{{ s.lstrip() }}] [{{ s.rstrip() }}] [{{ s.upper() }}] [{{ s.lower() }}] [{{ s.strip().title() }}] [{{ s.strip().capitalize() }}]
{{ s.split(',') }} {{ s.split() }} {{ s.strip().split(', ', 1) }} {{ s.strip().rsplit(', ', 1) }} {{ 'a\\nb'.splitlines() }} {{ 'a=b=c'.partition('=') | list }} {{ 'abc'.partition('=') | list }}
{{ s.replace('ab', 'x') }} {{ 'aaa'.replace('a', 'b', 2) }} {{ s.find('cd') }} {{ s.count('b') }} {{ s.strip().startswith('Ab') }} {{ s.endswith('ab  ') }} {{ '<a>'.strip('<>') }}
{{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.txt'.removesuffix('.txt') }} {{ 'x'.removeprefix('y') }} {{ ', '.join(['a', 'b']) }} {{ 'abc'.isalpha() }} {{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ 'ab'.islower() }}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }} {% endfor %} {{ {'a': 1}.keys() | list }} {{ {'a': 1}.values() | list }} {{ {'a': 1}.get('a') }} {{ {'a': 1}.get('z') }} {{ {'a': 1}.get('z', 'd') }} {% for k, v in {'items': 3}.items() %}{{ k }}{{ v }}{% endfor %}
{{ '%s' }} {{ 'a' ~ 1 ~ 'b' }} {{ 'ab' * 3 }} {{ [1, 2] + [3] }} {{ 'x' + 'y' }}
""",
    "filters": """{{ ' a ' | trim }}|{{ 'aB' | upper }}|{{ 'aB' | lower }}|{{ 'ab cd' | title }}|{{ 'ab cd' | capitalize }}|{{ [3, 1, 2] | sort }}|{{ [3, 1] | first }}|{{ [3, 1] | last }}|{{ [1, 2] | length }}|{{ 'abc' | length }}
{{ missing | default('d') }}|{{ '' | default('d', true) }}|{{ none | default('d') }}|{{ ['a', 'b'] | join('-') }}|{{ 'abc' | replace('b', 'x') }}|{{ 'abc' | reverse }}|{{ [1, 2] | reverse | list }}|{{ '7' | int + 1 }}|{{ '1.5' | float }}|{{ 3 | string + 'x' }}|{{ true | string }}|{{ -3 | abs }}|{{ 2.567 | round(2) }}|{{ [1, 2, 3] | sum }}|{{ [1, 5] | max }}|{{ [1, 5] | min }}
{{ messages | map(attribute='role') | list }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | join(',') }}|{{ ['a', 'B'] | map('upper') | list }}|{{ [1, 2, 3, 4] | select('even') | list }}|{{ [1, 1, 2] | unique | list }}|{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}|{% for k, v in {'b': 1} | items %}{{ k }}{{ v }}{% endfor %}
{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}|{{ '<&>' | safe }}|{{ '<b>' }}|{{ 'a b' | list }}|{{ [[1, 2], [3]] | first | last }}|{{ messages | groupby('role') | map(attribute='grouper') | list }}
""",
    "dates": "{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ strftime_now('%A %B %j %%') }} {{ strftime_now('') }}|",
    "syntax_error": "{% for message in messages %}{{ message.content }",
    "missing_attribute": "{{ messages[0].nothing.more }}",
    "tools_of_its_own": "plain {{ messages[0].content }}",
}
WITH_TOOLS = {"tools_of_its_own": "tools {{ tools | length }} {{ messages[0].content }}"}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "What's it like in <place>? & \"when\"",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1},
                                                    "items": {"type": "array"}}, "required": ["place"]}}}
CHATS = {
    "one": [message("user", "Hello")],
    "system": [message("system", "  Be brief.\n"), message("user", " What is 1+1? ")],
    "turns": [message("user", "Hi"), message("assistant", " Hello!\n"), message("user", "Größe? 你好 😀 \"quoted\" <tag> & 'x'")],
    "think": [message("user", "a"), message("assistant", "<think>\nhm\n</think>\n\nb"), message("user", "c"),
              message("assistant", "<think>\nlast\n</think>\n\nd")],
    "reasons": [message("user", "a"), message("assistant", "b", thinking="why"), message("user", "c"),
                message("assistant", "d", reasoning="how", thinking=None)],
    "not_alternating": [message("user", "a"), message("user", "b")],
    "calls": [message("user", "Rain?"), message("assistant", None, tool_calls=[call("weather", {"place": "Köln", "days": 2})]),
              message("tool", "{\"rain\": true}"), message("tool", "second"), message("user", "Thanks")],
    "two_calls": [message("user", "?"), message("assistant", "Both:", tool_calls=[call("a", {}), call("b", "{\"x\": 1}")])],
    "skips": [message("user", "skip"), message("assistant", "b"), message("user", "c"), message("user", "stop"), message("user", "no")],
}
EXTRA = {"text": "a'b\"c\n\\ é <&> \u0001\u007f", "list": [1, "two", 3.0, None, True, "it's"], "map": {"z": 1, "a": {"n": [], "m": {}}},
         "big": 12345678901234567890, "neg": -5, "floats": [0.1, 1e16, 1e-5, 123456789.125, 1e22, -0.0, 2.5e-10, 1e15],
         "items": "own", "😀": "key"}
CASES = []


def render(template, chat, tools=None, variables=None, add_generation_prompt=True, source=None):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source or TEMPLATES[template]
    if template in WITH_TOOLS:
        tokenizer.chat_template = {"default": TEMPLATES[template], "tool_use": WITH_TOOLS[template]}
    case = {"template": template, "messages": CHATS[chat], "tools": tools, "variables": variables or {},
            "add_generation_prompt": add_generation_prompt}
    try:
        case["text"] = tokenizer.apply_chat_template(
            CHATS[chat], tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **(variables or {}))
    except jinja2.exceptions.TemplateError as error:
        case["error"] = type(error).__name__
        if type(error) is jinja2.exceptions.TemplateError:
            case["raised"] = str(error)
    CASES.append(case)


def main():
    real = gguf.GGUFReader(MODEL).fields["tokenizer.chat_template"].contents()
    for chat in ("one", "system", "turns"):
        for add in (True, False):
            render("smollm2", chat, add_generation_prompt=add, source=real)
            for template in ("llama3_style", "mistral_style", "qwen_style", "blocks", "generation_tag"):
                render(template, chat, add_generation_prompt=add)
    for chat in CHATS:
        render("qwen_style", chat, [WEATHER], {"enable_thinking": False})
        render("qwen_style", chat, variables={"enable_thinking": chat == "think"})
        render("loops", chat, [{"type": "function", "n": 1}])
        render("filters", chat)
    for template, chat in [("llama3_style", "calls"), ("llama3_style", "two_calls"), ("mistral_style", "not_alternating"),
                           ("mistral_style", "think"), ("mistral_style", "calls"), ("generation_tag", "think")]:
        render(template, chat)
    render("values", "one", variables={"extra": EXTRA})
    render("values", "one", [WEATHER, WEATHER], {"extra": {"list": [[]], "map": {}, "text": "''"}})
    for template in ("tests", "methods", "dates", "syntax_error", "missing_attribute"):
        render(template, "one")
    render("tools_of_its_own", "one")
    render("tools_of_its_own", "one", [WEATHER])
    golden = {"now_unix_s": NOW, "bos_token": "<s>", "eos_token": "</s>", "templates": TEMPLATES, "with_tools": WITH_TOOLS,
              "cases": CASES}
    (HERE / "chat.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")
    print(len(CASES), "cases,", sum("error" in case for case in CASES), "of them errors")
    print([(c["template"], c["error"], c.get("raised")) for c in CASES if "error" in c])


if __name__ == "__main__":
    main()
