"""Serves a model over HTTP, as OpenAI's chat completions."""
