"""XGen trains, tunes, tests and serves long-context language models in stages."""
