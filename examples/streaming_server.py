"""An HTTP server that streams text: its connections share one paged model, and their rows run packed.

    python examples/streaming_server.py --port 8000
    curl -N 127.0.0.1:8000 -d '{"prompt": "Why is the sky blue?", "max_new_tokens": 40}'
    python examples/streaming_server.py --self-test      # answer two clients at once, then exit

It is asyncio alone, with as little HTTP as curl needs. For a web framework, take `Server.stream` along.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator

import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from _demo_model import model_path

BAD_REQUEST = (ValueError, TypeError, EOFError, asyncio.LimitOverrunError, hf_paged.PagedError)
PROMPTS = ["Why is the sky blue?", "Write one sentence about a lighthouse."]


class Server:
    """Answer ``POST {"prompt": ..., "max_new_tokens": ...}`` with text that comes as it is generated."""

    def __init__(self, name: str):
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="paged")
        self.engine = hf_paged.AsyncEngine(self.model, max_running=16, max_queue=64)

    def encode(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    async def stream(self, prompt: str, max_new_tokens: int = 64) -> AsyncIterator[str]:
        """Yield the answer in pieces of whole characters. Closing the iterator ends the request."""
        decoder = DecodeStream(skip_special_tokens=True)
        async for token in self.engine.stream(self.encode(prompt), max_new_tokens=max_new_tokens, do_sample=False):
            if text := decoder.step(self.tokenizer.backend_tokenizer, token):
                yield text

    async def respond(self, reader: asyncio.StreamReader) -> AsyncIterator[str]:
        """Read a request and yield its answer."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
        request = json.loads(await reader.readexactly(min(length, 2**20)))
        async with contextlib.aclosing(self.stream(**request)) as texts:
            async for text in texts:
                yield text

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection. If the client hangs up, the blocks of its request are free within a step."""
        status = "200 OK"
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            async with contextlib.aclosing(self.respond(reader)) as texts:
                try:
                    text = await anext(texts, "")  # A request that is refused raises here, before a status is sent.
                except hf_paged.QueueFullError as error:
                    status, text = "503 Service Unavailable", f"{error}\n"
                except BAD_REQUEST as error:
                    status, text = "400 Bad Request", f"{error}\n"
                writer.write(f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n{text}".encode())
                async for text in texts:
                    writer.write(text.encode())
                    await writer.drain()


async def ask(port: int, prompt: str) -> tuple[str, list[float]]:
    """Send a request as a client; return the answer, and after how many seconds each piece of it came."""
    start, pieces, seconds = time.perf_counter(), [], []
    body = json.dumps({"prompt": prompt, "max_new_tokens": 32}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"\r\n\r\n")
        while piece := await reader.read(2**16):
            pieces.append(piece)
            seconds.append(time.perf_counter() - start)
    return b"".join(pieces).decode(), seconds


async def self_test(server: Server, port: int) -> None:
    """Print what two clients get that ask at the same time; compare it with the dense cache."""
    answers = await asyncio.gather(*(ask(port, prompt) for prompt in PROMPTS))
    for prompt, (text, seconds) in zip(PROMPTS, answers):
        print(f"{prompt}\n  > {' '.join(text.split())}")
        print(f"  {len(seconds)} pieces, the first after {seconds[0]:.2f} s, the last after {seconds[-1]:.2f} s")
    server.model.set_attn_implementation("sdpa")
    prompts = [torch.tensor([server.encode(prompt)]) for prompt in PROMPTS]
    dense = [server.model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :] for ids in prompts]
    texts = server.tokenizer.batch_decode(dense, skip_special_tokens=True)
    equal = sum(text == expected for (text, _), expected in zip(answers, texts))
    print(f"{equal} of {len(answers)} answers equal those of the dense cache")
    if equal < len(answers):
        sys.exit("wrong: an answer differs")
    if max(seconds[0] for _, seconds in answers) > min(seconds[-1] for _, seconds in answers):
        sys.exit("wrong: one client waited until the other had its answer")


async def run(arguments: argparse.Namespace) -> None:
    """Serve until the process is interrupted, or test the server."""
    server = Server(arguments.model)
    async with server.engine, await asyncio.start_server(server.serve, "127.0.0.1", arguments.port) as listening:
        port = listening.sockets[0].getsockname()[1]
        print(f"listening on 127.0.0.1:{port}", flush=True)
        await (self_test(server, port) if arguments.self_test else listening.serve_forever())


def main() -> None:
    """Serve, or test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes one that is free")
    parser.add_argument("--self-test", action="store_true", help="ask, print the answers and exit")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
