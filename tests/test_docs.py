"""What the documentation shows is true: its recipes load, its verbs and files exist, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from xgen.recipe.load import Base, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/train-on-your-documents.md"], ids=lambda p: p.name)
def test_recipes_shown_to_users_load(page: Path, tmp_path: Path) -> None:
    shown = blocks(page, "toml")
    assert shown
    continued = Base("a model", load_recipe("xgen-125m").recipe.model, 4096)
    for number, text in enumerate(shown):
        file = tmp_path / f"{number}.toml"
        file.write_text(text, encoding="utf-8")
        whole = "[model]" in text or "extends" in text
        recipe = load_recipe(file, vocabulary=lambda _: 8192, base=None if whole else continued).recipe
        assert [stage.length for stage in recipe.stages] == sorted(stage.length for stage in recipe.stages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_shown_are_verbs_with_the_options_they_have(page: Path) -> None:
    from xgen.cli.app import app

    command = typer.main.get_command(app)
    verbs = command.commands  # type: ignore[attr-defined]
    for line in "\n".join(blocks(page, "sh")).splitlines():
        for call in re.findall(r"(?:^|&& )xgen ([^#&|]+)", line):
            words = call.split()
            verb = verbs[words[0]]
            if hasattr(verb, "commands"):
                verb = verb.commands[words[1]]
            known = {option for parameter in verb.params for option in parameter.opts} | {"--help", "--debug"}
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line


def test_the_readme_begins_with_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:24])
    assert "xgen train tiny --run" in first_screen
    assert "python -m pytest" in first_screen


def test_the_examples_ask_for_the_model_by_the_name_that_its_server_is_given() -> None:
    text = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    asked = re.findall(r'"model(?:": "|=)(\w+)', text)
    assert len(asked) == 2
    assert set(asked) == set(re.findall(r"xgen serve \S+ --name (\w+)", text))
