"""A server with OpenAI's HTTP interface, over an `AsyncEngine`: ``hf-paged serve``."""

import importlib.util

from hf_paged.errors import MissingPackageError

# By the names that they are imported by.
_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
    "llguidance": "llguidance",
}

for _module, _package in _PACKAGES.items():
    if importlib.util.find_spec(_module) is None:
        raise MissingPackageError(_package, "hf-paged[serve]")
