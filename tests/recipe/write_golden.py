"""Write the golden resolved forms of the shipped recipes anew, after a change that is meant:

python tests/recipe/write_golden.py
"""

from pathlib import Path

from xgen.recipe.load import dump_toml, load_recipe, shipped_recipes

GOLDEN = Path(__file__).parent / "golden"

if __name__ == "__main__":
    for name in shipped_recipes():
        (GOLDEN / f"{name}.toml").write_text(dump_toml(load_recipe(name).recipe), encoding="utf-8")
