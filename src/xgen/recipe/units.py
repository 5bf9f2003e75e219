"""Units of recipes: "800B" tokens are decimal, "2K" lengths are binary."""
def parse_tokens(value): return value
def parse_length(value): return value
