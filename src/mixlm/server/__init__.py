"""An ensemble behind the API that tools for language models already speak, and a page to look at it.

`run.serve` is what the command line calls. One thread owns the models (`worker`); the event loop reads requests and
writes responses, and never runs a model. Everything that needs a web framework stays in this package.
"""
