"""An ensemble behind OpenAI's HTTP API, and a web page to try it.

`http_server.serve` is what the command line calls. One thread runs the models (`model_thread`). The event loop reads
requests and writes responses, and never runs a model. Only this package imports a web framework.
"""
