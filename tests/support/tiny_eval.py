"""A tiny random model with a tokenizer in a folder, and options of evaluations that use it."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hf_paged_evals.runner.options import DatasetChoice, Options
from support import zoo

TEXT = "The keeper of the lighthouse counts the ships that pass, and writes their names into a book that nobody reads. "


def save_model(folder, name: str = "llama", **overrides) -> str:
    """Save a tiny model whose tokens are bytes; returns the folder as text."""
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({token: number for number, token in enumerate([*special, *letters])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    zoo.build(name, "sdpa", vocab_size=len(tokenizer), **overrides).save_pretrained(folder)
    return str(folder)


def save_texts(folder, count: int = 12) -> str:
    """Save a text file with `count` different lines; returns its path as text."""
    path = folder / "texts.txt"
    path.write_text("\n".join(TEXT[number * 3 :] + TEXT[: 20 + 5 * number] for number in range(count)))
    return str(path)


def options_for(task, model: str, texts: str, out="unused", settings=None, **fields) -> Options:
    """Options of a run of one task on the user's own model and texts, with blocks of 4 tokens."""
    extra = {task.name: settings or {}}
    fields = {"block_size": 4, "dataset": DatasetChoice(texts), **fields}
    return Options(str(out), (task.name,), model=model, extra=extra, **fields)
