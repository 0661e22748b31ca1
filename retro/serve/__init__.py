"""The HTTP server: an API that OpenAI's clients speak, questions with sources, the live index, and a page."""
