"""The one engine: key-value pages, scheduling, sampling and scoring. Evaluation, chat and server all ask it."""
