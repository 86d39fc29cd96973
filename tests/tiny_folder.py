"""A tiny random llama with a tokenizer, saved as users' models are, and a dataset of words for it."""

import json

import zoo
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save(folder) -> str:
    """The model's folder, as an option names it."""
    folder.mkdir(parents=True, exist_ok=True)
    zoo.build("llama", "sdpa").save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, zoo.VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def save_texts(path, lengths) -> str:
    """A jsonl dataset of texts with so many words each."""
    texts = [
        " ".join(f"w{3 + (7 * row + at) % (zoo.VOCAB - 3)}" for at in range(length))
        for row, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)
