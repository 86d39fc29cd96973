"""A tokenizer of single characters for the tiny models, with a chat template: no hub, no files."""

import random
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
_LETTERS = string.ascii_letters + string.digits + " .,:;!?-()'\"\n&/+=*#%@_<>[]{}|^~`$"
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if not loop.last or not continue_final_message %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(vocab_size: int = 97, after: str = "", **options) -> PreTrainedTokenizerFast:
    """Every id below `vocab_size` is a character or a special token; `after` follows each in decoded text."""
    words = [*_SPECIAL, *_LETTERS][:vocab_size]
    words += [chr(0x100 + number) for number in range(vocab_size - len(words))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Sequence([decoders.Replace(Regex("$"), after), decoders.Fuse()])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": _TEMPLATE}
    others = {"extra_special_tokens": ["<user>", "<assistant>"], "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**names, **others, **options})


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Random texts of 1 to `longest` letters."""
    chosen = random.Random(seed)
    return ["".join(chosen.choices(_LETTERS[:60], k=chosen.randint(1, longest))) for _ in range(count)]
