"""Every mistake is named by its dotted path, with the value and a remedy, and all are named at once."""

from pathlib import Path

import pytest
from samples import SMALLEST, write

from xgen.errors import RecipeError
from xgen.recipe.load import load_recipe

ONE_MISTAKE = [
    # override, the path that is named, words of what is wrong and of the remedy
    ("model.headz=3", "model.headz", "unknown key", "model.heads"),
    ("modle.heads=3", "modle", "unknown key", "did you mean model?"),
    ("heads=3", "heads", "unknown key", "model.heads"),
    ("data.length=3", "data.length", "unknown key", "stages.0.length"),
    ("lr=3e-4", "lr", "unknown key", "optimizer.learning_rate"),
    ("model.num_hidden_layers=3", "model.num_hidden_layers", "unknown key", "model.layers"),
    ("mesh.zzzz=3", "mesh.zzzz", "unknown key", "replica, fsdp, context, tensor"),
    ("model.heads=7", "model.heads", "7 does not divide model.hidden_size 64", "2, 4, 8 or 16 heads"),
    ("model.heads=0", "model.heads", "0 is not above 0", "larger"),
    ("model.heads=true", "model.heads", "true is not a whole number", "digits"),
    ("model.heads=4.0", "model.heads", "4.0 is not a whole number", "digits"),
    ("model.heads='4'", "model.heads", "'4' is not a whole number", "without quotes"),
    ("model.kv_heads=3", "model.kv_heads", "3 does not divide heads 4", "2 or 4"),
    ("model.head_size=15", "model.head_size", "15 is odd", "even"),
    ("model.hidden_size=65", "model.heads", "4 does not divide model.hidden_size 65", "hidden_size 64 or 72"),
    ("model.hidden_size=12", "model.head_size", "3 (from model.hidden_size / model.heads) is odd", "even"),
    ("model.activation=relu", "model.activation", "'relu' is none of", "'swiglu', 'gelu'"),
    ("model.norm=3", "model.norm", "3 is none of", "'rms', 'layer'"),
    ("model.tied_embeddings='yes'", "model.tied_embeddings", "'yes' is neither", "true nor false"),
    ("model.vocab_size=299", "model.vocab_size", "299 rows are too few for the 300 ids", "300 or more"),
    ("model.rope_scaling.factor=2", "model.rope_scaling.factor", "no effect", "model.rope_scaling.kind"),
    ("model.rope_scaling={ kind = 'yarn', factor = 0.5 }", "model.rope_scaling.factor", "0.5 would", "1 or more"),
    ("model.rope_scaling.kind=ntk", "model.rope_scaling.kind", "'ntk' is none of", "'dynamic', 'llama3', 'yarn'"),
    ("model.rope_scaling.low_turns=2", "model.rope_scaling.low_turns", "2 has no effect while kind", '"yarn"'),
    ("model.rope_scaling={ kind = 'dynamic', factor = 2, high_turns = 32 }", "model.rope_scaling.high_turns",
     '32 has no effect while kind is "dynamic"', 'set kind to "llama3" or "yarn"'),
    ("model.rope_scaling={ kind = 'llama3', attention_factor = 1.5 }", "model.rope_scaling.attention_factor",
     '1.5 has no effect while kind is "llama3"', 'set kind to "yarn"'),
    ("model.rope_scaling={ kind = 'llama3', low_turns = 4 }", "model.rope_scaling.high_turns",
     "4 is not above low_turns 4", "fewer low_turns"),
    ("model.rope_scaling={ kind = 'yarn', high_turns = 0.5 }", "model.rope_scaling.high_turns",
     "0.5 is not above low_turns 1", "use more"),
    ("model.rope_scaling={ kind = 'dynamic', factor = 0.5 }", "model.rope_scaling.factor", "0.5 would", "1 or more"),
    ("model={ layers = 1, hidden_size = 8, heads = 4, rope_scaling = { kind = 'dynamic' } }", "model.head_size",
     "2 has no slower plane", "4 or more"),
    ("model={ layers = 1, hidden_size = 8, heads = 4, rope_theta = 1, rope_scaling = { kind = 'yarn' } }",
     "model.rope_theta", "1 lets no plane turn slower", "more than 1"),
    ("model.attention_bias=1", "model.attention_bias", "1 is neither", "true nor false"),
    ("model=3", "model", "3 is not a table", "layers, hidden_size"),
    ("tokenizer.name=bpe:many", "tokenizer.name", "'bpe:many' is no tokenizer", "bpe:2048"),
    ("tokenizer.name=bpe:256", "tokenizer.name", "'bpe:256' has no room", "bpe:257"),
    ("tokenizer.name=''", "tokenizer.name", "'' is no tokenizer", "xgen"),
    ("data.sources={}", "data.sources", "is empty", "stores/mine"),
    ("data.sources=stores/a", "data.sources", "'stores/a' is not a table", "sources = {"),
    ("data.sources={ a = 3, b = 'x' }", "data.sources.a", "3 is not text", "quotes"),
    ("data.sources.'a/b'=x", "data.sources.\"a/b\"", "'a/b' is not a name", "letters"),
    ("data.seed=-1", "data.seed", "-1 is below 0", "at least"),
    ("data.held_out=1.0", "data.held_out", "1.0 is not below 1", "smaller"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate", "'fast' is not a number", "without quotes"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate", "nan", "finite"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas", "1.0 is not below 1", "smaller"),
    ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9] has too few values", "give 2"),
    ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas", "too many values", "give 2"),
    ("optimizer.betas=0.9", "optimizer.betas", "0.9 is not a list", "brackets"),
    ("optimizer.warmup=1M", "optimizer.warmup", "1M is not shorter than the run of 15_360 tokens", "use 153"),
    ("stages=[]", "stages", "[] is not a list of stages", "[[stages]]"),
    ("stages.1.name=first", "stages.1.name", "'first' is also the name of stage 0", "its own"),
    ("stages.0.name=a b", "stages.0.name", "'a b' is not a name", "letters"),
    ("stages.0.length=4", "stages.0.length", "4 is below 8", "at least"),
    ("stages.0.length=1B", "stages.0.length", "'1B' is not a length", '"2K"'),
    ("stages.0.tokens=0", "stages.0.tokens", "0 is not above 0", "larger"),
    ("stages.0.tokens=12Q", "stages.0.tokens", "'12Q' is not a count of tokens", '"8B"'),
    ("stages.0.batch_tokens=100", "stages.0.batch_tokens", "100 is not a multiple of stages.0.length 32", "use 128"),
    ("stages.0.batch_tokens=300", "stages.0.batch_tokens", "300 is not a multiple of", "256 or 384"),
    ("stages.1.length=100", "stages.1.batch_tokens", "256 (from stages.0.batch_tokens)", "200 or 300"),
    ("stages.1.length=300", "stages.1.batch_tokens", "not a multiple of stages.1.length 300", "use 300"),
    ("stages.0.microbatch_tokens=48", "stages.0.microbatch_tokens", "48 is not whole sequences of 32", "32, 64 or 128"),
    ("stages.0.microbatch_tokens=96", "stages.0.microbatch_tokens", "divide the batch of 256", "32, 64, 128 or 256"),
    ("stages.0.mixture={}", "stages.0.mixture", "is empty", "the sources a, b"),
    ("stages.0.mixture={ a = 0 }", "stages.0.mixture.a", "0 is not above 0", "larger"),
    ("stages.0.mixture={ a = 1, b = 1e-12 }", "stages.0.mixture.b", "1e-12 is less than 2**-32", "take the source out"),
    ("stages.1.mixture={ a = 1, c = 1 }", "stages.1.mixture.c", "no source 'c'", "the sources are a, b"),
    ("stages.0.mixture=a", "stages.0.mixture", "'a' is not a table", "mixture = {"),
    ("stages.0.mesh.replica=rest", "stages.0.mesh", 'cannot both be "rest"', "a number"),
    ("mesh.replica=rest", "mesh", 'cannot both be "rest"', "a number"),
    ("mesh.fsdp=0", "mesh.fsdp", "0 is neither", '"rest"'),
    ("mesh.tensor=3", "mesh.tensor", "3 does not divide model.heads 4", "2 or 4"),
    ("stages.0.mesh.context=3", "stages.0.mesh.context", "3 does not divide stages.0.length 32", "2, 4 or 8"),
    ("checkpoints.every=0", "checkpoints.every", "0 is not above 0", "larger"),
    ("evaluation.contexts=[64, 32]", "evaluation.contexts", "64, 32 do not rise", "use 32, 64"),
    ("evaluation.contexts=[]", "evaluation.contexts", "[] has too few values", "at least 1"),
    ("evaluation.contexts=[16, 2000]", "evaluation.contexts", "more than 8 times", "1K at most"),
    ("evaluation={ target = 32, contexts = [32, 64] }", "evaluation.target", "32 leaves no context", "smaller"),
    ("evaluation.stride=0.0", "evaluation.stride", "0.0 is not above 0", "larger"),
    ("notes.foo=x", 'notes."foo"', "a key this recipe does not have", "optimizer.learning_rate"),
    ("notes=x", "notes", "'x' is not a table", "notes = {"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "path", "wrong", "remedy"), ONE_MISTAKE, ids=[each[0] for each in ONE_MISTAKE])
def test_one_mistake_is_one_line(tmp_path: Path, override: str, path: str, wrong: str, remedy: str) -> None:
    source = write(tmp_path, SMALLEST)
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"recipe {source}: {path}: ")
    assert wrong in message
    assert remedy in message.partition(wrong)[2] or remedy in wrong


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.heads", "is not key=value"),
        ("=8", "is not key=value"),
        ("model.heads=", "has no value"),
        ("a b=8", "'a b' is not a key"),
        ("model.heads.x=3", "model.heads is a value, not a table"),
        ("stages.5.tokens=1", "there is no stages.5; stages are numbered from 0, this recipe has 0 to 1"),
        ("stages.first.tokens=1", "there is no stages.first"),
        ("data.sources={ a = stores/a }", "text inside a table or a list goes in quotes"),
        ("evaluation.contexts=[64, 4K]", "text inside a table or a list goes in quotes"),
        ("model.heads=8\nmodel.layers=3", "sets more than one key"),
        ("extends=tiny", "belongs in a recipe file"),
        ("stages.1.mixture.a=3", "stages.1.mixture='{ a = 1, b = 1 }'"),
    ],
)
def test_an_override_that_cannot_be_laid_is_quoted(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, SMALLEST), [override])
    assert repr(override) in str(caught.value)
    assert words in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    overrides = ["model.headz=1", "model.layers='2'", "optimizer.learning_rate=-1", "stages.1.tokens=1Q"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, SMALLEST), overrides)
    lines = str(caught.value).splitlines()
    assert "4 problems" in lines[0]
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "model.headz", "model.layers", "optimizer.learning_rate", "stages.1.tokens",
    }  # fmt: skip


def test_an_unknown_key_and_a_contradiction_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, SMALLEST), ["model.foo=1", "model.kv_heads=3"])
    assert "2 problems" in str(caught.value)


def test_what_is_missing_is_told_without_what_only_follows(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, '[model]\nlayers = 2\n[[stages]]\nname = "a"\nlength = 32\n'))
    paths = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert paths == [
        "model.hidden_size", "model.heads", "data.sources", "optimizer.learning_rate",
        "stages.0.tokens", "stages.0.batch_tokens",
    ]  # fmt: skip


def test_a_mistake_that_was_inherited_names_its_file(tmp_path: Path) -> None:
    parent = write(tmp_path, SMALLEST.replace("heads = 4", 'heads = "x"'), "parent.toml")
    with pytest.raises(RecipeError, match=r"model\.heads: 'x' .*") as caught:
        load_recipe(write(tmp_path, 'extends = "parent.toml"\n'))
    assert str(parent) in str(caught.value)


def test_a_store_tokenizer_needs_a_store(tmp_path: Path) -> None:
    overrides = ["tokenizer.name=store", "data.sources={ a = 'embedded:code' }"]
    with pytest.raises(RecipeError, match=r"tokenizer\.name: 'store' .* no source is one"):
        load_recipe(write(tmp_path, SMALLEST), overrides)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"tokens = 800B", r"not TOML: .*line 1.*quotes"),
        (b"a = \xff", "not UTF-8 text at byte 4"),
        (b"extends = 3", "extends: 3 is not a recipe"),
        (b'extends = "no-such"', "there is no recipe 'no-such'"),
        (b'extends = "no-such.toml"', r"there is no recipe file .*no-such\.toml"),
        (b"stages = 3", "stages: 3 is not a list of stages"),
        (b"model = 3", "model: 3 is not a table"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert "mine.toml" in str(caught.value) or "no-such" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tinny", "did you mean tiny"),
        ("xgen-7b", "did you mean xgen-7b-4k or xgen-7b-8k"),
        ("nowhere/at/all", "no recipe file nowhere/at/all"),
        ("mine.toml", "no recipe file mine.toml"),
        ("x" * 300 + ".toml", "cannot be read"),
    ],
)
def test_a_recipe_that_is_not_there(source: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(source)


def test_a_folder_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no recipe\.toml"):
        load_recipe(tmp_path)
