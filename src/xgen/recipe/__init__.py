"""What a run is: recipes, typed, validated and resolved. Start at `load.load_recipe` and `schema.Recipe`."""
