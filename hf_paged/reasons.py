"""The reasons why a call is not packed, or why keys and values are copied out of their pages, each with its remedy.

A reason that the documentation names, or that the caller's own arguments ask for, is expected: it is logged as
information, once. Any other costs time unexpectedly: it warns, once.
"""

import enum
from collections import Counter
from dataclasses import dataclass

from transformers.utils import logging

logger = logging.get_logger(__name__)

_DENSE = 'load the model with attn_implementation="sdpa" if pages save it nothing'
_NEW_CACHE = "make a new DynamicCache(config=model.config)"
_OWN_LOOP = "none is needed, transformers' own loop runs over the pages"
_OWN_CACHE = "none is needed, the layers keep transformers' own cache"
_FEWER_ROWS = "none is needed: with so many rows the model's Python code takes little of a step's time"
_TESTED = "install a transformers that hf_paged was tested with (hf-paged doctor names them) or a newer hf_paged"


class Reason(enum.Enum):
    """A reason: its text, what to do about it, and whether it is expected.

    The text goes on after "because"; ``...`` stands for a detail, see `of`.
    """

    # Calls of `generate` that run transformers' own loop.
    TRAINING = (
        "the model draws random numbers in training mode (...)",
        "call model.eval() before generate, or set the dropout of the model and of its adapters to 0",
    )
    CHECKPOINTING = (
        "gradient checkpointing keeps layers from their cache, so that transformers' own loop gives other tokens",
        "turn it off before generate, as TRL does, or call model.eval()",
        False,
    )
    AUTOCAST = "autocast is on", "load the model in the dtype you want, and call generate outside autocast"
    GRADIENTS_ENABLED = "gradients are enabled", "call model.generate, which disables them, or enter torch.no_grad()"
    ODD_IDS = "the token ids are not integers of 32 or 64 bits", "pass input_ids.long()"
    ENCODER_DECODER = "the model is an encoder-decoder", _OWN_LOOP
    OWN_METHOD = "the model has its own ...", _OWN_LOOP
    EVERY_LOGIT = "the model computes the logits of every position", "let its forward take logits_to_keep"
    ROW_ADAPTERS = "adapters are chosen row by row", "call generate once per adapter, with model.set_adapter"
    ROPE_OF_THE_FORWARD = "the rotary frequencies depend on the whole forward", _OWN_LOOP
    MODEL_INPUTS = (
        "the model is given inputs besides tokens: ...",
        "leave them out where the model does not need them",
    )
    ADDED_INPUTS = "transformers itself adds inputs that hf_paged does not know: ...", _TESTED, False
    CHANGED_CACHE_CLASS = (
        "another library has replaced DynamicCache.update",
        "import that library in another process, or undo its patch",
        False,
    )
    OTHER_CACHE = (
        "the call has no cache, or one that is not transformers' DynamicCache",
        "leave use_cache and cache_implementation unset",
    )
    UNPAGED_LAYERS = "the cache has layers that are not paged, such as recurrent ones", _OWN_CACHE
    FILLED_CACHE = (
        "the cache holds tokens already",
        "pass the whole prompt and no cache: the prefix cache finds its first tokens",
    )
    EMPTY_PROMPT = "the prompt is empty", "pass at least one token"
    PADDING_NOT_LEFT = "the padding is not on the left", 'set tokenizer.padding_side = "left"'
    MASK_VALUES = "the attention mask has values other than 0 and 1", "pass (attention_mask != 0).long()"
    OWN_POSITIONS = "position_ids are not those of the attention mask", "leave position_ids out"
    RETURNED_STATES = (
        "attentions or hidden states are returned",
        "leave output_attentions and output_hidden_states out",
    )
    OTHER_FORWARD = "synced_gpus or a compile_config is set, or the model is an assistant", _OWN_LOOP
    STREAMED_ROWS = "one streamer takes several rows", "use hf_paged.BatchTextIteratorStreamer"
    DEVICE_NOISE = (
        "torch was seeded, and the random numbers of the device cannot be drawn again",
        "do not seed torch, or use do_sample=False",
    )
    RETURNED_ROWS = (
        "the cache or the scores of several or padded rows are returned",
        "call generate once per row, or leave return_dict_in_generate and the cache out",
    )
    PROCESSOR = (
        "a processor may look at other rows: ...",
        "use transformers' own processors, or call generate once per row, or give its class row_wise or for_row",
    )
    OTHER_POOL = "the cache belongs to another model, or to a pool that was released", _NEW_CACHE
    OTHER_LAYERS = "the cache was made for another model's layers", _NEW_CACHE
    RECORDED_PAST = "the cache records its past", "do not call cache.activate_past_recording()"
    # Models that no packed step serves.
    NO_POOL = "the model has no pool of its own, or several", _OWN_LOOP
    FULL_POOL = (
        "the pool has no room to try a packed step",
        "drop caches that are not needed, or raise memory_budget with hf_paged.configure",
    )
    FAILING_STEP = "a packed step fails in this model (...)", _DENSE, False
    MODULE_STATE = "the model keeps what it computes in a module, not in the cache (...)", _OWN_LOOP
    MIXED_ROWS = "the model mixes the rows of a packed forward", _DENSE, False
    EARLY_COMPUTATION = "the model computes with its keys and values before it attends", _OWN_LOOP
    UNABSORBED = (
        "the model expands latents by a kv_b_proj that attention cannot absorb (...)",
        "merge adapters into its weight, load it unquantised and without hooks",
    )
    OTHER_PATTERN = "the attention pattern of a layer is not that of its cache", _OWN_LOOP
    OWN_ATTENTION = "some layers attend to their keys and values in their own way", _OWN_LOOP
    LOST_KEYWORDS = "the model does not pass its keyword arguments on to its attention", _OWN_LOOP
    # Keys and values that are gathered.
    APPLIED_OPERATION = "the model applies ... to them", _DENSE, False
    EXPANDED_LATENTS = (
        "the model expands latents before it attends",
        "use greedy decoding or sampling, whose packed steps leave latents in their pages",
    )
    TWO_SOURCES = "keys and values come from different places", _DENSE
    NO_MASK = "the attention has no mask", _DENSE, False
    CUSTOM_MASK = "the attention mask is a custom one", "pass a 2D attention_mask"
    OTHER_WINDOW = "the mask belongs to another layer's window", _DENSE
    OTHER_QUERIES = "the queries are not those of the new tokens", _DENSE, False
    NOT_CAUSAL = "the attention pattern is not causal", _DENSE
    NOT_BIDIRECTIONAL = "the attention pattern is not bidirectional", _DENSE, False
    PARTLY_STORED = "the queries do not see all that is stored", _DENSE
    POSITION_BIAS = "a position bias is added to the scores", _DENSE
    INNER_PADDING = "there is padding between tokens", "pad on the left"
    INDEXER = "an indexer chooses the tokens to see", _DENSE
    OUTPUT_ATTENTIONS = "attention weights are returned", "leave output_attentions out"
    DROPOUT = "attention dropout is on", "call model.eval()"
    GRADIENTS = "gradients flow through the queries", "enter torch.no_grad()"
    EAGER_ONLY = "the model has only an eager attention of its own", _DENSE
    EAGER = "eager attention is needed", _DENSE
    HIDDEN_TOKENS = "the attention mask hides stored tokens", "pass the attention_mask that the tokens were stored with"
    PADDED_WINDOW = "padding inside a row changes distances in the sliding window", "pad on the left"
    # Layers that become transformers' own dense ones.
    CACHE_READ = "the cache's keys or values are read", "read them only where they are needed"
    CACHE_ASSIGNED = "the cache's keys or values are assigned", "use the cache's crop, reorder_cache and batch methods"
    CACHE_EDITED = "the cache's keys or values are edited in place", "edit them before the first token is generated"
    ODD_SELECTION = "the selection is empty, or is not one of rows", "select at least one row, by row numbers"
    NO_MODEL = "the cache is used outside a paged model", "use DynamicCache() without a config", False
    CACHE_GRADIENTS = "gradients flow through the cache", "enter torch.no_grad(), or set use_cache=False"
    UNLIKE_STATES = "keys and values differ in more than their head size", "run the model outside autocast"
    UNLIKE_SIBLINGS = "the layer begins with other positions than the cache's other layers", _DENSE
    CHANGED_PLACE = "the dtype or device of the states changes", "make a new cache after model.to(...)"
    CHANGED_SHAPE = "the shape of the states changes", "call hf_paged.release(model) after the model is changed", False
    # Items of a pipeline that run one after another.
    OWN_FORWARD = "... has its own forward", "use transformers' TextGenerationPipeline itself"
    OWN_GENERATE = "... has its own generate", "use a model with transformers' generate"
    WRONG_ARGUMENTS = "their arguments raise ...", "correct the arguments: the error comes with the first item"
    OTHER_PREPARATION = (
        "transformers prepares their arguments in another way than hf_paged expects (...)",
        _TESTED,
        False,
    )
    SHARED_ARGUMENT = "they share the argument ...", "leave it out if it is not needed"
    OTHER_MODE = "the generation mode is ...", "use greedy decoding or sampling"
    TIME_LIMIT = "max_time counts seconds that other items would use", "use max_new_tokens"
    ROWS_TOGETHER = (
        "guidance or a watermark may look at all rows of a batch",
        "leave guidance_scale and watermarking_config out",
    )
    SEED = "torch was seeded, and sampled items draw from its random numbers in turn", "do not seed torch"
    # Packed steps that run eagerly though decode steps are captured.
    PROMPT_TOKENS = "the step runs tokens of prompts", "none is needed, only decode steps are captured"
    MANY_ROWS = "the step has more rows than the largest captured step holds", _FEWER_ROWS
    FIRST_USE = "no step of this size has run before", "none is needed, the next one of this size is captured"
    OTHERS_DRAW = (
        "other threads draw random numbers, which no CUDA graph may be captured beside",
        "none is needed, a later step of this size is captured",
    )
    UNSEEN_CHANGES = (
        "a change of the model could not be seen: code, a hook or a tensor from outside transformers takes part",
        "take it out of the forward; the log at level INFO says once what it is",
    )
    CHANGED_MODEL = "the model was changed after its calls began", "none is needed, later calls capture steps again"
    MOVED_INPUTS = (
        "accelerate's hooks on the model run in each forward",
        "load the model on one device, without offload",
    )
    MODES = "a mode sees every call of torch in this thread", "leave the mode before generate"
    HOST_READ = "the model reads what it has computed on the host (...)", 'set PagedConfig(capture="off")'
    RANDOM_STEP = "the model draws random numbers (...)", "call model.eval()"
    UNKNOWN_TENSOR = (
        "the model computes with a tensor that no operator of torch returned (...)",
        'set PagedConfig(capture="off")',
    )
    FAILED_CAPTURE = "a step could not be captured (...)", 'set PagedConfig(capture="off")', False
    OTHER_LOGITS = "a replayed step gave other logits than the model", 'set PagedConfig(capture="off")', False
    # Captured steps that are dropped.
    OTHER_MODEL = "the model is not what it was when they were captured", "none is needed, they are captured again"
    OTHER_SETTINGS = (
        "a setting of torch, or an attention backend, is not what it was when they were captured",
        "none is needed, they are captured again",
    )
    MOVED_PAGES = "the pages were moved", "none is needed, they are captured again"
    RARELY_USED = "steps of other sizes were captured since", "none is needed"
    DISABLED = "hf_paged was disabled", "call hf_paged.enable()"
    FORKED = "the process was forked", "none is needed, the child captures its own"

    def __init__(self, text: str, remedy: str, is_expected: bool = True):
        self.text, self.remedy, self.is_expected = text, remedy, is_expected

    def __str__(self) -> str:
        return self.text

    def of(self, detail: str) -> "DetailedReason":
        """This reason, with a detail in its text."""
        return DetailedReason(self, self.text.replace("...", detail))


@dataclass(frozen=True)
class DetailedReason:
    """A reason with a detail in its text."""

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


def count_and_log(counter: Counter[str], why: Why, event: str, times: int = 1) -> None:
    """Count a reason, and log it the first time in this process that the event happens because of it.

    Parameters
    ----------
    counter : Counter of str
        By the text of the reason. Changed in place.
    why : Reason or DetailedReason
    event : str
        What happened, as the beginning of a sentence.
    times : int
        How often it happened.
    """
    counter[why.text] += times
    if (event, why.text) not in _told:
        _told.add((event, why.text))
        log = logger.info if why.is_expected else logger.warning
        log(f"hf_paged: {event}, because {why.text}. Remedy: {why.remedy}.")
