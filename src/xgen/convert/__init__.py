"""Models come and go: Hugging Face, GGUF and XGen's own folders, both ways, driven by the weights table."""
