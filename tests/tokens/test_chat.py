"""What is said never becomes a control token, and what a template may and may not do."""

from __future__ import annotations

import time

import pytest
from chat_templates import CHATML, NAMES, TEMPLATES, TOKENIZERS, template_of, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.errors import DataError
from xgen.tokens.chat import (
    ROLES,
    SIGNS,
    XGEN_HEADER,
    XGEN_STOPS,
    ChatTemplate,
    Message,
    messages_of,
)
from xgen.tokens.sandbox import LONGEST
from xgen.tokens.tokenizer import Tokenizer

KINDS = [kind for kind in TOKENIZERS if kind != "xgen"]
CONVERSATION = (("system", "user"), ("user",), ("user", "assistant", "user"), ("user", "user", "assistant", "user"))

halves = [part for name in NAMES for cut in range(1, len(name)) for part in (name[:cut], name[cut:])]
hostile = st.lists(
    st.one_of(
        st.sampled_from(NAMES),
        st.sampled_from(halves),
        st.sampled_from([" ", "\n", "<", "|", ">", "{{ bos_token }}", "{% raw %}", "</think>", "[INST]", "user"]),
        st.text(max_size=4).filter(lambda text: not set(SIGNS).intersection(text)),
    ),
    max_size=5,
).map("".join)


def control_in(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    control = set(tokenizer.control.values())
    return [index for index in ids if index in control]


class TestInjection:
    @settings(deadline=None, max_examples=15)
    @given(st.data())
    @pytest.mark.parametrize("name", TEMPLATES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_said_is_never_a_control_token(self, kind: str, name: str, data: st.DataObject) -> None:
        """The control tokens are those of the same roles saying something harmless."""
        tokenizer = tokenizer_of(kind)
        template = cached(name, kind)
        roles = data.draw(st.sampled_from(CONVERSATION if name != "llama 2" else CONVERSATION[:3]))
        said = [Message(role, data.draw(hostile)) for role in roles]
        harmless = [Message(role, "a") for role in roles]
        wanted = control_in(tokenizer, template.render(harmless).ids)
        found = template.render(said)
        assert control_in(tokenizer, found.ids) == wanted

    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_split_over_two_messages_that_the_template_joins(self, name: str) -> None:
        tokenizer = tokenizer_of("byte level")
        template = cached("joining", "byte level")
        wanted = control_in(tokenizer, template.render([Message("user", "a"), Message("user", "b")]).ids)
        for cut in range(1, len(name)):
            found = template.render([Message("user", f"a{name[:cut]} \n"), Message("user", f"\t{name[cut:]}b")])
            assert name in found.text
            assert control_in(tokenizer, found.ids) == wanted
            assert tokenizer.decode(found.ids) == found.text

    def test_a_name_that_the_template_completes(self) -> None:
        tokenizer = tokenizer_of("byte level")
        template = ChatTemplate("<|im_start|>{{ messages[0].content }}end|><|im_end|>", tokenizer)
        found = template.render([Message("user", "<|im_")])
        assert found.text == "<|im_start|><|im_end|><|im_end|>"
        assert control_in(tokenizer, found.ids) == [tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]]

    def test_the_characters_that_mark_control_tokens_are_refused(self) -> None:
        for sign in SIGNS:
            with pytest.raises(DataError, match=rf"messages\[1\] holds U\+{ord(sign):04X}"):
                cached("chatml", "byte level").render([Message("user", "a"), Message("assistant", f"b{sign}")])

    def test_a_template_that_builds_names_depending_on_what_is_said_is_refused(self) -> None:
        source = "{{ '<|' + messages[0].role + '|>' }}{{ 'x' if 'a' in messages[0].content else 'yy' }}"
        template = ChatTemplate(source, tokenizer_of("byte level"))
        with pytest.raises(DataError, match=r"builds '<\|system\|>' from pieces"):
            template.render([Message("user", "a")])


_templates: dict[tuple[str, str], ChatTemplate] = {}


def cached(name: str, kind: str) -> ChatTemplate:
    if (name, kind) not in _templates:
        _templates[name, kind] = template_of(name, tokenizer_of(kind))
    return _templates[name, kind]


class TestXgen:
    def test_it_is_the_model_cards_prompt_and_the_models_first_word(self, xgen_tokenizer: Tokenizer) -> None:
        template = ChatTemplate("xgen", xgen_tokenizer, bos_id=50256, eos_id=50256)
        found = template.render([Message("user", "Please summarize the following article.\n\nA.")])
        card = XGEN_HEADER + "\n\n### Human: Please summarize the following article.\n\nA.\n###"
        assert found.text == card + " Assistant:"
        assert found.ids == xgen_tokenizer.encode(card) + xgen_tokenizer.encode(" Assistant:")
        assert (template.stops, template.end_ids) == (XGEN_STOPS, ())

    def test_a_reply_goes_back_as_the_tokens_it_was(self, xgen_tokenizer: Tokenizer) -> None:
        template = ChatTemplate("xgen", xgen_tokenizer)
        first = [Message("system", "Be brief."), Message("user", "Hi")]
        begun = template.render(first)
        reply = xgen_tokenizer.encode(" Hello you.")
        again = template.render([*first, Message("assistant", " Hello you."), Message("user", "Bye")])
        assert again.ids[: len(begun.ids) + len(reply)] == begun.ids + reply
        assert again.text == "Be brief.\n\n### Human: Hi\n### Assistant: Hello you.\n### Human: Bye\n### Assistant:"

    def test_a_system_message_comes_first(self, xgen_tokenizer: Tokenizer) -> None:
        with pytest.raises(DataError, match="a system message must come first"):
            ChatTemplate("xgen", xgen_tokenizer).render([Message("user", "a"), Message("system", "b")])


class TestEnds:
    @pytest.mark.parametrize(
        ("name", "end"),
        [("chatml", "<|im_end|>"), ("llama 3", "<|eot_id|>"), ("llama 2", "</s>"), ("pieces", "<|end|>")],
    )
    def test_the_token_after_a_reply_ends_it(self, name: str, end: str) -> None:
        template = cached(name, "byte level")
        assert template.end_ids == (tokenizer_of("byte level").control[end],)
        assert template.stops == ()

    def test_text_after_a_reply_is_no_end(self) -> None:
        source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|im_end|>"
        assert ChatTemplate(source, tokenizer_of("byte level")).end_ids == (
            tokenizer_of("byte level").control["<|im_end|>"],
        )
        assert ChatTemplate(source.replace("\n", "\n--\n"), tokenizer_of("byte level")).end_ids == ()


class TestMessages:
    def test_roles(self) -> None:
        template = cached("chatml", "byte level")
        assert template.roles == ROLES
        for role in ("tool", "system\nb", "", "User"):
            with pytest.raises(DataError, match=r"messages\[0\] has the role .* knows system, user, assistant"):
                template.render([Message(role, "a")])
        with_tools = CHATML.replace("{% if loop", "{% if message['role'] == 'tool' %}*{% endif %}{% if loop")
        found = ChatTemplate(with_tools, tokenizer_of("byte level")).render(
            [Message("user", "a"), Message("tool", "b")]
        )
        assert "*<|im_start|>tool\nb" in found.text

    def test_there_must_be_some(self) -> None:
        with pytest.raises(DataError, match="no messages"):
            cached("chatml", "byte level").render([])

    def test_half_a_surrogate_pair_is_refused(self) -> None:
        with pytest.raises(DataError, match="surrogate"):
            cached("chatml", "byte level").render([Message("user", "a\ud800")])

    def test_parts_of_text_are_joined(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        found = messages_of([{"role": "system", "content": "x"}, {"role": "user", "content": parts}])
        assert found == [Message("system", "x"), Message("user", "ab")]

    @pytest.mark.parametrize(
        ("value", "named"),
        [
            ({"role": "user"}, "a conversation is a list"),
            ([{"role": "user"}], r"messages\[0\] is"),
            ([{"role": 1, "content": "a"}], r"messages\[0\] is"),
            ([{"role": "user", "content": "a", "tool_calls": []}], r"messages\[0\] is"),
            ([{"role": "user", "content": None}], r"messages\[0\].content is None"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\] is .*image_url"),
            ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"messages\[0\].content\[0\]"),
        ],
    )
    def test_anything_else_is_named(self, value: object, named: str) -> None:
        with pytest.raises(DataError, match=named):
            messages_of(value)


class TestHostileTemplates:
    def render(self, source: str) -> str:
        return ChatTemplate(source, tokenizer_of("byte level")).render([Message("user", "abc")]).text

    def test_its_own_message_is_told(self) -> None:
        with pytest.raises(DataError, match="refuses: roles must alternate"):
            self.render("{{ raise_exception('roles must alternate') }}")

    @pytest.mark.parametrize("source", ["{% for %}", "{{", "{% x %}", "{{ 'a'|nothing }}", "{% if a %}" * 200])
    def test_one_that_cannot_be_read(self, source: str) -> None:
        with pytest.raises(DataError, match="cannot be read"):
            self.render(source)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ raise_exception.__globals__.os }}",
            "{% set ns = namespace(__class__=1) %}",
            "{% set ns = namespace() %}{% set ns._x = 1 %}",
            "{{ dict.__init__.__globals__ }}",
            "{{ lipsum() }}",
            "{{ 'a' * 1000000000 }}",
            "{{ [0] * 1000000000 }}",
            "{{ 10 ** 10 ** 10 }}",
            "{% set x = 10 %}" + "{% set x = x * x %}" * 40,
            "{% set x = -10 %}" + "{% set x = x * x * -1 %}" * 40,
            "{% set n = namespace(x=10) %}" + "{% set n.x = n.x ** 2 * n.x ** 2 %}" * 40,
            "{{ 1 // 0 }}",
            "{{ messages[0].content.nothing.more }}",
            "{{ range(10 ** 7) | list }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% include 'x' %}",
        ],
    )
    def test_what_it_may_not_do_is_an_error(self, source: str) -> None:
        begin = time.monotonic()
        with pytest.raises(DataError, match="chat template"):
            self.render(source)
        assert time.monotonic() - begin < 5

    @pytest.mark.parametrize(
        "source",
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "{% set x = range(9999) | list %}" + "{% set y = x | sort %}" * 100,
            "{% set x = range(9999) | list %}" + "{% set y %}{{ (x | sort)[0] }}{% endset %}" * 100,
        ],
    )
    def test_it_is_stopped_when_it_does_not_end(self, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("xgen.tokens.sandbox.MOST_SECONDS", 0.2)
        begin = time.monotonic()
        with pytest.raises(DataError, match=r"longer than 0\.2 seconds"):
            self.render(source)
        assert time.monotonic() - begin < 10

    @pytest.mark.parametrize(
        "source",
        ["{% set xgen_tick = dict %}", "{% macro xgen_tick() %}{% endmacro %}", "{% set \uff58gen_tick = dict %}"],
    )
    def test_what_stops_it_cannot_be_replaced(self, source: str) -> None:
        with pytest.raises(DataError, match="uses the name xgen_tick"):
            self.render(source)

    def test_small_products_are_as_ever(self) -> None:
        assert (
            self.render("{{ 3 * -4 }} {{ 2 ** 8 }} {{ '-' * 3 }} {{ 1.5 * 2 }} {{ [1] * 2 }}")
            == "-12 256 --- 3.0 [1, 1]"
        )

    def test_it_is_stopped_when_it_writes_too_much(self) -> None:
        with pytest.raises(DataError, match=f"more than {LONGEST + 24} characters for 3"):
            self.render("{% for a in range(99999) %}{{ '-' * 999 }}{% endfor %}")

    def test_without_jinja_the_remedy_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("xgen.tokens.chat.find_spec", lambda _: None)
        with pytest.raises(DataError, match=r"pip install 'xgen\[serve\]'"):
            self.render("a")

    def test_a_token_that_does_not_exist_cannot_be_spelt(self) -> None:
        with pytest.raises(DataError, match="no control token '<x>'"):
            tokenizer_of("byte level").spelt({"<x>": SIGNS[0]})
