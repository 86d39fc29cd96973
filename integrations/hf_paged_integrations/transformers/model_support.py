"""Refuses models that cannot be "paged" when they are loaded, in a sentence.

Some modelling files keep a table of attention classes by implementation name instead of calling
transformers' attention interface. Left alone they raise ``KeyError('paged')`` while they are built.
"""

from transformers import PreTrainedModel

from hf_paged.compat.transformers import attention_classes
from hf_paged.errors import UnsupportedError


def resolve_implementation(model: PreTrainedModel, name: str) -> str:
    """The implementation that `model`, which is being built, gets when it is asked to be `name` ("paged").

    Returns
    -------
    str
        `name`; "sdpa" for an image encoder with attention classes of its own, which keeps no cache.

    Raises
    ------
    UnsupportedError
        If the model has attention classes of its own.
    """
    table_name, table = attention_classes(type(model))
    if table is None or name in table:
        return name
    if "VISION" in table_name:
        return "sdpa" if "Vision" in type(model.config).__name__ else name
    others = " or ".join(f'"{other}"' for other in ("sdpa", "eager") if other in table)
    raise UnsupportedError(
        f'{type(model).__name__} cannot be loaded with attn_implementation="{name}": models of type '
        f"{model.config.model_type} choose their attention from {table_name} and never call transformers' attention "
        f"interface. Load it with attn_implementation={others}"
    )
