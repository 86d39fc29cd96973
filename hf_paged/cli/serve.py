"""``hf-paged serve``: a model behind OpenAI's HTTP interface."""

import argparse
import dataclasses
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_paged
from hf_paged.cli import demo_model
from hf_paged.cli.plan.footprint import DEMO, read_config
from hf_paged.cli.plan.report import DTYPES

API_KEY = "HF_PAGED_API_KEY"


def add_serve(commands) -> None:
    """Add the command's parser.

    Parameters
    ----------
    commands : the object that ``add_subparsers`` returns
    """
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's interface",
        description="Serve a model over HTTP, as OpenAI's interface: /v1/chat/completions, /v1/completions, "
        "/v1/models, /health and /metrics. SIGTERM and Ctrl-C let the requests under way end.",
    )
    serve.add_argument("model", help='a name on the hub, a local folder, or "demo"')
    serve.add_argument("--host", default="127.0.0.1", help="(default: %(default)s: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: one that is free (default: %(default)s)")
    serve.add_argument("--model-name", metavar="NAME", help="by which requests ask for the model (default: MODEL)")
    serve.add_argument(
        "--api-key", metavar="KEY", help=f"that requests must bring (default: {API_KEY}; other users see an argument)"
    )
    serve.add_argument(
        "--tenant-header",
        metavar="NAME",
        help="by which a proxy that you trust names the tenant of each request: tenants share no prefixes",
    )
    _add_model_options(serve)
    _add_limits(serve)
    serve.set_defaults(run=_serve)


def _add_model_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--dtype", choices=DTYPES, help="of weights, keys and values (default: as in the model's config)"
    )
    serve.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: the GPU here, else the CPU)")
    serve.add_argument("--block-size", type=int, metavar="N", help="tokens that a block holds")
    serve.add_argument("--memory-budget", metavar="SIZE", help='of keys and values, such as "2GiB"')


def _add_limits(serve: argparse.ArgumentParser) -> None:
    for option, kind, text in (
        ("--max-running", int, "requests that run at the same time"),
        ("--max-queue", int, "requests that may wait; one more gets status 429"),
        ("--max-prompt-tokens", int, "tokens of one prompt (default: what the model's context takes)"),
        ("--max-new-tokens", int, "tokens of one answer"),
        ("--max-choices", int, "answers of one request: its prompts times n"),
        ("--max-body-bytes", int, "size of one request"),
        ("--request-seconds", float, "time of one request"),
        ("--drain-seconds", float, "time that requests under way have after SIGTERM"),
    ):
        serve.add_argument(option, type=kind, metavar="N", help=text)


def _serve(arguments: argparse.Namespace) -> int:
    # Imported when it is asked for: the other commands need none of its packages.
    from hf_paged_integrations.serving.openai.server import run_server
    from hf_paged_integrations.serving.openai.settings import ServerSettings

    names = {field.name for field in dataclasses.fields(ServerSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    given["model_name"] = arguments.model_name or arguments.model
    given.setdefault("api_key", os.environ.get(API_KEY) or None)
    settings = ServerSettings(**given)  # Before the weights: a wrong number is said at once.
    pool = {name: getattr(arguments, name) for name in ("block_size", "memory_budget")}
    pool = {name: value for name, value in pool.items() if value is not None}
    config = dataclasses.replace(hf_paged.PagedConfig.from_environment(), **pool)
    tokenizer, model = _load(arguments.model, arguments.dtype, arguments.device)
    hf_paged.configure(model, config)
    _warm_up(model)
    run_server(model, tokenizer, settings, arguments.host, arguments.port)
    return 0


def _load(name: str, dtype: str | None, device: str | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a model, paged, and its tokenizer."""
    read_config(name)  # A wrong name is told in a sentence.
    logging.disable_progress_bar()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == DEMO:
        model = demo_model.load_model("paged", DTYPES[dtype or "float32"])
        return demo_model.load_tokenizer(), _placed(model, place)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=DTYPES[dtype] if dtype else "auto", attn_implementation="paged"
    )
    return tokenizer, _placed(model.eval(), place)


def _warm_up(model: Any) -> None:
    """Generate a token: kernels are compiled and the pool is made now, and not at the expense of the first request."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)


def _placed(model: torch.nn.Module, place: str) -> Any:
    return model.to(place)
