"""OpenAI's client of a year ago."""

import client_openai  # noqa: F401 - it runs
