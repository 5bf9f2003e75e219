"""The live page of a run: what its report shows, while it trains. It reads the run folder and writes nothing."""
