"""Further APIs in front of the same chat completions: OpenAI's Responses, and Anthropic's Messages.

Each is a body that becomes that of a chat completion, and a format of responses.
"""

MESSAGES_PATH = "/v1/messages"
# What the fields of a chat completion are called there.
FIELD_NAMES = {
    "/v1/responses": {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "verbosity": "text.verbosity",
    },
    MESSAGES_PATH: {"stop": "stop_sequences"},
}
