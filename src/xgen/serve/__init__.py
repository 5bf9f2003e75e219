"""What is served over HTTP: the OpenAI-compatible interface with its chat page, and the live page of a run."""
