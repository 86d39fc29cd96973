"""Why a call is not packed, or why keys and values are copied out of their pages: each reason with its remedy.

A reason that users are told of beforehand, or that their own arguments ask for, is logged as information, once. Any
other costs time unexpectedly: it warns, once.
"""

import enum
from collections import Counter
from dataclasses import dataclass

from transformers.utils import logging

logger = logging.get_logger(__name__)

_DENSE = 'load the model with attn_implementation="sdpa" if pages save it nothing'
_NEW_CACHE = "make a new DynamicCache(config=model.config)"
_OWN_LOOP = "nothing: transformers' own loop runs over the pages"
_OWN_CACHE = "nothing: the layers keep transformers' own cache"


class Reason(enum.Enum):
    """A reason: its text, in which ``...`` stands for a detail; what to do about it; whether it is expected."""

    # Calls of `generate` that run transformers' own loop.
    TRAINING = "training", "call model.eval() before generate"
    AUTOCAST = "autocast", "load the model in the dtype you want and call generate outside autocast"
    GRADIENTS_ENABLED = "gradients are enabled", "call model.generate itself, or enter torch.no_grad()"
    ODD_IDS = "token ids that are not integers of 32 or 64 bits", "pass input_ids.long()"
    ENCODER_DECODER = "an encoder-decoder", _OWN_LOOP
    OWN_METHOD = "the model has a ... of its own", _OWN_LOOP
    EVERY_LOGIT = "the model computes every logit", "let its forward take logits_to_keep"
    ROW_ADAPTERS = "adapters chosen row by row", "call generate once for each adapter, with model.set_adapter"
    ROPE_OF_THE_FORWARD = "frequencies that depend on the whole forward", _OWN_LOOP
    MODEL_INPUTS = "model inputs besides tokens: ...", "leave them out where the model does not need them"
    CHANGED_CACHE_CLASS = (
        "another library has changed DynamicCache.update",
        "import that library in another process, or undo its patch",
        False,
    )
    OTHER_CACHE = "no cache, or not transformers' DynamicCache", "leave use_cache and cache_implementation unset"
    UNPAGED_LAYERS = "recurrent or other layers that are not paged", _OWN_CACHE
    FILLED_CACHE = "a cache that holds tokens already", "pass the whole prompt: the prefix cache finds its first tokens"
    EMPTY_PROMPT = "an empty prompt", "pass at least one token"
    PADDING_NOT_LEFT = "padding that is not on the left", 'set tokenizer.padding_side = "left"'
    MASK_VALUES = (
        "an attention mask with values other than 0 and 1",
        "pass (attention_mask != 0).long()",
    )
    OWN_POSITIONS = "positions of the caller's own", "leave position_ids out"
    RETURNED_STATES = "returned attentions or hidden states", "leave output_attentions and output_hidden_states out"
    OTHER_FORWARD = "synced_gpus, an assistant or a compiled forward", _OWN_LOOP
    STREAMED_ROWS = "a streamer for several rows", "use hf_paged.BatchTextIteratorStreamer"
    DEVICE_NOISE = "sampling on a device whose random numbers are not drawn row by row", "use do_sample=False"
    RETURNED_ROWS = (
        "a returned cache, or returned scores, of several or padded rows",
        "call generate for each row, or leave return_dict_in_generate out",
    )
    PROCESSOR = "a processor that may look at other rows: ...", "use transformers' own processors, or one call a row"
    ROWS_TOGETHER = "a processor that may look at other rows", "leave guidance_scale and watermarking_config out"
    CRITERION = "a criterion that may look at other rows: ...", "use transformers' own criteria, or one call a row"
    ENDLESS_ROWS = "rows that go on after they are finished", "set eos_token_id, or one criterion alone"
    OTHER_POOL = "a cache of another model, or of a pool that was released", _NEW_CACHE
    OTHER_LAYERS = "a cache made for another model's layers", _NEW_CACHE
    RECORDED_PAST = "a cache that records its past", "do not call cache.activate_past_recording()"
    # Models that no packed step serves.
    NO_POOL = "no pool of its own, or several", _OWN_LOOP
    SEVERAL_DEVICES = "layers on several devices", "put all layers on one device if they fit"
    FULL_POOL = (
        "the pool has no room to try a packed step",
        "drop caches that are not needed, or raise memory_budget with hf_paged.configure",
    )
    FAILING_STEP = "a packed step fails in this model (...)", _DENSE, False
    MIXED_ROWS = "the model mixes the rows of a packed forward", _DENSE, False
    EARLY_COMPUTATION = "the model computes with its keys and values before it attends", _OWN_LOOP
    OTHER_PATTERN = "the attention pattern is not that of the layer's cache", _OWN_LOOP
    OWN_ATTENTION = "some layers attend to their keys and values in their own way", _OWN_LOOP
    LOST_KEYWORDS = "the model does not hand its keywords down to its attention", _OWN_LOOP
    # Keys and values that are gathered.
    APPLIED_OPERATION = "the model applies ... to it", _DENSE, False
    TWO_SOURCES = "keys and values come from different places", _DENSE
    NO_MASK = "attention without a mask", _DENSE, False
    CUSTOM_MASK = "a custom attention mask", "pass a 2D attention_mask"
    OTHER_WINDOW = "the mask belongs to another layer's window", _DENSE
    OTHER_QUERIES = "the queries are not the new tokens", _DENSE, False
    NOT_CAUSAL = "the attention pattern is not causal", _DENSE
    NOT_BIDIRECTIONAL = "the attention pattern is not bidirectional", _DENSE, False
    PARTLY_STORED = "the queries do not see all that is stored", _DENSE
    POSITION_BIAS = "position bias", _DENSE
    INNER_PADDING = "padding between tokens", "pad on the left"
    INDEXER = "an indexer chooses the tokens to see", _DENSE
    OUTPUT_ATTENTIONS = "output_attentions", "leave output_attentions out"
    DROPOUT = "attention dropout", "call model.eval()"
    GRADIENTS = "gradients", "enter torch.no_grad()"
    EAGER_ONLY = "the model has only an eager attention of its own", _DENSE
    EAGER = "eager attention", _DENSE
    HIDDEN_TOKENS = "the attention mask hides stored tokens", "pass the attention_mask that the tokens were stored with"
    PADDED_WINDOW = "padding inside a row changes distances in the sliding window", "pad on the left"
    # Layers that become transformers' own dense ones.
    CACHE_READ = "the cache's keys or values are read", "read them only where they are needed"
    CACHE_ASSIGNED = "the cache's keys or values are assigned", "use the cache's crop, reorder_cache and batch methods"
    CACHE_EDITED = "the cache's keys or values are edited in place", "edit them before the first token is generated"
    ODD_SELECTION = "a selection that is not of rows, or of none", "select rows by their numbers"
    NO_MODEL = "the cache is used outside a paged model", "use DynamicCache() without a config", False
    CACHE_GRADIENTS = "gradients flow through the cache", "enter torch.no_grad(), or set use_cache=False"
    UNLIKE_STATES = "keys and values differ in more than their head size", "leave autocast out around the model"
    UNLIKE_SIBLINGS = "the layer holds other positions than its siblings", _DENSE
    CHANGED_DTYPE = "the dtype changes", "make a new cache after model.to(dtype)"
    CHANGED_PLACE = "the dtype or device of the states changes", "make a new cache after model.to(...)"
    CHANGED_SHAPE = "the shape of the states changes", "call hf_paged.release(model) after the model is changed", False
    # Items of a pipeline that run one after another.
    OWN_FORWARD = "the forward of ...", "use TextGenerationPipeline's own"
    OWN_GENERATE = "the generate of ...", "use the model that the pipeline was made for"
    WRONG_ARGUMENTS = "an error in its arguments (...)", "mend the arguments: the error is raised with the first item"
    SHARED_ARGUMENT = "the argument ...", "leave it out where items do not share it"
    OTHER_MODE = "the generation mode ...", "use greedy decoding or sampling"
    TIME_LIMIT = "max_time, which counts seconds that others use", "use max_new_tokens"
    SEED = "a seed: sampled items draw from torch's random numbers in turn", "do not seed torch"

    def __init__(self, text: str, remedy: str, is_expected: bool = True):
        self.text, self.remedy, self.is_expected = text, remedy, is_expected

    def __str__(self) -> str:
        return self.text

    def of(self, detail: str) -> "DetailedReason":
        """This reason, with the name of what is to blame."""
        return DetailedReason(self, self.text.replace("...", detail))


@dataclass(frozen=True)
class DetailedReason:
    """A reason whose text names what is to blame."""

    reason: Reason
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def remedy(self) -> str:
        return self.reason.remedy

    @property
    def is_expected(self) -> bool:
        return self.reason.is_expected


Why = Reason | DetailedReason
_told: set[tuple[str, str]] = set()


def count(counter: Counter[str], why: Why, what: str) -> None:
    """Count a reason, and log it the first time in this process that `what` happens because of it.

    Parameters
    ----------
    counter : Counter of str
        By the text of the reason.
    what : str
        What happened, as the beginning of a sentence.
    """
    counter[why.text] += 1
    if (what, why.text) not in _told:
        _told.add((what, why.text))
        log = logger.info if why.is_expected else logger.warning
        log(f"hf_paged: {what}, because of this: {why.text}. Remedy: {why.remedy}.")
