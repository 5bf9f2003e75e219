"""`xgen generate`: where the prompt comes from, where the text goes, and what cannot be."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from generating import no_model, pipe, template
from micro_runs import Micro, assert_one_error, command, run_process

__all__ = ["no_model", "template"]

TOKENS = ("--max-tokens", 8, "--seed", 1)


@pytest.mark.usefixtures("no_model")
class TestPrompts:
    def test_from_wherever_it_comes_the_text_is_the_same(
        self, micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stated = command("generate", micro.straight, "--prompt", "abc\n", *TOKENS)
        assert stated.code == 0, stated.err
        assert len(stated.out) > 1
        (tmp_path / "prompt.txt").write_text("abc\n")
        assert command("generate", micro.straight, "--file", tmp_path / "prompt.txt", *TOKENS).out == stated.out
        pipe(monkeypatch, "abc\n")
        assert command("generate", micro.straight, *TOKENS).out == stated.out
        assert command("generate", micro.straight, "--prompt", "abd\n", *TOKENS).out != stated.out

    def test_standard_output_has_the_text_alone(self, micro: Micro, tmp_path: Path) -> None:
        place = tmp_path / "answer.json"
        done = command("generate", micro.straight, "--prompt", "abc", *TOKENS, "--json", place)
        answer = json.loads(place.read_text())
        assert done.out == answer["choices"][0]["text"] + "\n"
        assert "nothing: ready after 0.0 s" in done.err
        assert "it ends after 8 tokens; --max-tokens allows more" in done.err
        printed = command("generate", micro.straight, "--prompt", "abc", *TOKENS, "--json", "-", "--quiet")
        assert json.loads(printed.out)["choices"] == answer["choices"]
        assert printed.err == ""

    def test_a_chat_template_makes_it_a_chat(self, micro: Micro, template: Path, tmp_path: Path) -> None:
        asked = ("generate", micro.straight, "--template", template, "--prompt", "b", *TOKENS)
        talked = command(*asked, "--system", "a")
        (tmp_path / "rendered").write_text("<system>a\n<user>b\n<assistant>")
        raw = command("generate", micro.straight, "--file", tmp_path / "rendered", *TOKENS)
        assert talked.out == raw.out
        place = tmp_path / "answer.json"
        command(*asked, "--json", place)
        assert json.loads(place.read_text())["object"] == "chat.completion"

    def test_a_text_is_as_long_as_fits_unless_it_is_told(self, micro: Micro, template: Path, tmp_path: Path) -> None:
        place = tmp_path / "answer.json"
        for prompt, more in (("abc", ()), ("abc" * 20, ()), ("abc", ("--template", template))):
            done = command("generate", micro.straight, "--prompt", prompt, "--seed", 1, *more, "--json", place)
            assert done.code == 0, done.err
            used = json.loads(place.read_text())["usage"]
            assert used["completion_tokens"] > 0
            assert used["total_tokens"] == 64, "the whole of the context"
            assert f"(it ends after {used['completion_tokens']} tokens: the context is full)" in done.err
        room = used["completion_tokens"]
        asked = ("generate", micro.straight, "--template", template, "--prompt", "abc", "--seed", 1)
        assert command(*asked, "--max-tokens", room).code == 0
        told = assert_one_error(command(*asked, "--max-tokens", room + 1), 2, f"give --max-tokens {room} or less")
        assert "truncation" not in told

    def test_a_text_for_which_there_is_much_room_ends_at_the_default(
        self, micro: Micro, template: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("xgen.cli.generate.DEFAULT_TOKENS", 40)
        for more in ((), ("--template", template)):
            done = command("generate", micro.straight, "--prompt", "abc", "--seed", 1, *more)
            assert "(it ends after 40 tokens; --max-tokens allows more)" in done.err

    def test_every_option_arrives(self, micro: Micro, monkeypatch: pytest.MonkeyPatch) -> None:
        from xgen.serve.translate import Translator

        bodies = []
        translate = Translator.completion

        def seen(self: Translator, body: dict[str, object]) -> object:
            bodies.append(body)
            return translate(self, body)

        monkeypatch.setattr(Translator, "completion", seen)
        options = ("--temperature", 0.5, "--top-p", 0.9, "--top-k", 3, "--min-p", 0.1, "--stop", "x", "--stop", "yy")
        done = command("generate", micro.straight, "--prompt", "abc", *TOKENS, *options)
        assert done.code == 0, done.err
        sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "stop": ["x", "yy"]}
        assert bodies == [{"prompt": "abc", "max_tokens": 8, "seed": 1, **sampling}]


@pytest.mark.usefixtures("no_model")
class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--prompt", "a", "--file", "b"], "--prompt and --file are two prompts"),
            (["--prompt", "a", "--chat"], "give one with --template, or let it go on with the text: give --raw"),
            (["--prompt", "a", "--system", "b"], "no chat template that --system could go into"),
            (["--prompt", "a", "--raw", "--system", "b"], "leave out --system and --template"),
            (["--prompt", "a", "--temperature", "3"], "'temperature'"),
            (["--prompt", "a", "--max-tokens", "99"], "the context holds 64; give --max-tokens 63 or less"),
            (["--prompt", "ab" * 40], "context holds 64 with the answer; shorten the prompt"),
            (["--prompt", "ab" * 40, "--max-tokens", "1"], "context holds 64 with the answer; shorten the prompt"),
            (["--prompt", "a", "--adapter", "a=none"], "there is no adapter folder none"),
            (["--prompt", "a", "--window", "99"], "beyond the 64 tokens"),
            (["--prompt", "a", "--template", "none.jinja"], "cannot read the chat template none.jinja"),
            (["--prompt", "a", "--out", "b"], "--out belongs to --batch"),
            (["--prompt", "a", "--resume"], "--resume belongs to --batch"),
            (["--prompt", "a", "--adapter", "a=b", "--adapter", "c=d"], "one of the adapters a, c"),
            (["--file", "none.txt"], "cannot read none.txt"),
            (["--batch", "in.jsonl"], "--batch needs --out"),
            (["--batch", "a", "--out", "b", "--prompt", "c", "--top-k", "1"], "leave out --top-k, --prompt"),
            (["--batch", "none.jsonl", "--out", "b"], "cannot read none.jsonl"),
        ],
    )
    def test_one_message_names_it(self, micro: Micro, words: list[str], told: str) -> None:
        assert_one_error(command("generate", micro.straight, *words), 2, told)

    def test_a_prompt_that_is_no_text(self, micro: Micro, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, b"ab\xff")
        assert_one_error(command("generate", micro.straight), 2, "standard input is not UTF-8: byte 2 is 0xff")

    def test_a_template_that_refuses(self, micro: Micro, tmp_path: Path) -> None:
        source = tmp_path / "refuses.jinja"
        source.write_text("{{ raise_exception('nobody may talk') }}")
        done = command("generate", micro.straight, "--template", source, "--prompt", "a")
        assert_one_error(done, 2, "nobody may talk")


@pytest.mark.usefixtures("no_model")
class TestBatches:
    def test_every_line_has_its_answer(self, micro: Micro, tmp_path: Path, template: Path) -> None:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        body = {"max_tokens": 4, "seed": 1}
        chat = {"messages": [{"role": "user", "content": "b"}], **body}
        lines = [
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", **body}},
            {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        ]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked = ("generate", micro.straight, "--batch", source, "--out", target, "--template", template)
        done = command(*asked)
        assert done.code == 0, done.err
        assert "2 requests: done after" in done.err
        assert done.out == ""
        answers = [json.loads(line) for line in target.read_text().splitlines()]
        assert [answer["custom_id"] for answer in answers] == ["a", "b"]
        alone = command("generate", micro.straight, "--prompt", "a", "--max-tokens", 4, "--seed", 1)
        assert alone.out == answers[0]["response"]["body"]["choices"][0]["text"] + "\n"
        assert_one_error(command(*asked), 2, "is there already; go on with it with --resume")
        for more in ([], ["--resume"]):
            itself = command("generate", micro.straight, "--batch", source, "--out", source, *more)
            assert_one_error(itself, 2, "in.jsonl has the requests themselves")
        again = target.read_text()
        assert command(*asked, "--resume").code == 0
        assert target.read_text() == again

    def test_answers_of_another_batch_are_found_before_the_model_is_loaded(self, micro: Micro, tmp_path: Path) -> None:
        source, other, target = (tmp_path / f"{name}.jsonl" for name in ("in", "other", "out"))
        body = {"prompt": "a", "max_tokens": 2}
        for path in (source, other):
            asked = {"custom_id": path.stem, "method": "POST", "url": "/v1/completions", "body": body}
            path.write_text(json.dumps(asked) + "\n")
        assert "ready after" in command("generate", micro.straight, "--batch", other, "--out", target).err
        resumed = ("generate", micro.straight, "--batch", source, "--resume", "--out")
        done = command(*resumed, target)
        assert_one_error(done, 2, "out.jsonl is of another batch: its line 1 answers 'other'")
        assert "ready after" not in done.err
        assert_one_error(command(*resumed, tmp_path), 2, f"cannot read {tmp_path}: Is a directory")

    def test_a_resumed_batch_does_not_try_failed_lines_again(self, micro: Micro, tmp_path: Path) -> None:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "top_p": 2}}
        source.write_text(json.dumps(line) + "\n")
        asked = ("generate", micro.straight, "--batch", source, "--out", target)
        assert_one_error(command(*asked), 2, "1 of 1 requests failed")
        before = target.read_text()
        assert command(*asked, "--resume").code == 0
        assert target.read_text() == before

    def test_the_exit_code_says_that_one_failed(self, micro: Micro, tmp_path: Path) -> None:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        body = {"prompt": "a", "max_tokens": 2}
        good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
        source.write_text(f"{json.dumps(good)}\nnothing\n")
        done = command("generate", micro.straight, "--batch", source, "--out", target)
        assert_one_error(done, 2, "1 of 2 requests failed", str(target))
        assert len(target.read_text().splitlines()) == 2

    def test_an_empty_file_has_no_answers(self, micro: Micro, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text("\n")
        done = command("generate", micro.straight, "--batch", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
        assert done.code == 0, done.err
        assert (tmp_path / "out.jsonl").read_text() == ""


def test_a_terminal_is_not_let_to_act_on_generated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from xgen.cli.generation import write

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, wanted in ((Terminal(), "a\n\tb␛]0;x␇␍\u2426é"), (io.StringIO(), "a\n\tb\x1b]0;x\x07\r\x9bé")):
        monkeypatch.setattr(sys, "stdout", screen)
        write("a\n\tb\x1b]0;x\x07\r\x9bé")
        assert screen.getvalue() == wanted


@pytest.mark.slow
def test_with_the_model_itself(micro: Micro, tmp_path: Path) -> None:
    """Greedily, what it writes is what the likeliest tokens of the loaded model are."""
    import numpy as np

    import xgen

    place = tmp_path / "answer.json"
    words = ("--prompt", "abc", "--max-tokens", 5, "--temperature", 0, "--precision", "float32", "--json", place)
    done = run_process("generate", micro.straight, *words)
    assert done.code == 0, done.err
    model = xgen.load(micro.straight)
    ids = model.tokenizer.encode("abc")
    for _ in range(5):
        ids.append(int(model.logits(np.array([ids]))[0, -1].argmax()))
    answer = json.loads(place.read_text())
    written = ids[3:] if model.tokenizer.end_of_text not in ids else ids[3 : ids.index(model.tokenizer.end_of_text)]
    assert answer["choices"][0]["text"] == model.tokenizer.decode(written)
    assert done.out == model.tokenizer.decode(written) + "\n"
