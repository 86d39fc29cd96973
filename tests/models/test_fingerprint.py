"""A model that computes something else than at the call before finds none of the states stored then."""

import contextlib
import functools
import sys
import threading
import weakref

import numpy
import peft
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.activations import ReLUSquaredActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

import hf_paged
import kernels
from hf_paged.models.fingerprint import fingerprint, identify
from support import zoo
from support.packing import LENGTHS
from support.prefixes import found, own_pair, prompts

INPUTS = prompts([30])
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))


def tokens(model) -> list[int]:
    return model.generate(**INPUTS, **LENGTHS).tolist()


# Each takes a model and changes it, once for every `yield`, in a way that can be seen.


def an_epsilon(model):
    norm = model.model.layers[0].input_layernorm
    for norm.variance_epsilon in (1e-6, 30.0):
        yield


def an_attentions_scaling(model):
    for model.model.layers[0].self_attn.scaling in (0.25, 2.0, 0.25):
        yield


def the_rotations_scaling(model):
    for model.model.rotary_emb.attention_scaling in (1.0, 3.0):
        yield


def a_buffer_that_is_not_saved(model):
    yield
    model.model.rotary_emb.inv_freq.mul_(1.7)
    yield
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    yield


def an_activation_module(model):
    for model.model.layers[0].mlp.act_fn in (torch.nn.SiLU(), torch.nn.ReLU(), torch.nn.Tanh()):
        yield


def an_activation_function(model):
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    for mlp.act_fn in (functional.silu, functional.relu, torch.tanh):
        yield


def an_activations_argument(model):
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    for slope in (0.1, 2.0):
        mlp.act_fn = functools.partial(functional.leaky_relu, negative_slope=slope)
        yield


def another_forward_of_the_library(model):
    activation = model.model.layers[0].mlp.act_fn
    for forward in (activation.forward, torch.nn.ReLU().forward, torch.nn.Tanh().forward):
        activation.forward = forward
        yield


def another_class(model):
    norm = model.model.layers[0].input_layernorm
    norm.eps = norm.variance_epsilon
    for kind in (type(norm), GemmaRMSNorm):
        norm.__class__ = kind
        yield


def a_forward_of_the_class(model):
    kind = type(model.model.layers[0].mlp.act_fn)
    plain = kind.forward
    try:
        for kind.forward in (plain, ReLUSquaredActivation.forward):
            yield
    finally:
        kind.forward = plain


def a_weight_norm(model):
    yield
    layer = parametrizations.weight_norm(model.model.layers[0].self_attn.v_proj)
    with torch.no_grad():
        for _ in range(2):
            layer.parametrizations.weight.original0.mul_(-3.0)
            yield


def a_transposed_weight(model):
    weight = model.model.layers[0].mlp.gate_proj.weight
    square = torch.nn.Linear(32, 32, bias=False)
    square.weight = torch.nn.Parameter(weight.detach()[:32].clone(), requires_grad=False)
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(square, torch.nn.ConstantPad1d((0, 32), 0.5))
    yield
    square.weight.data = square.weight.data.t()
    yield


SEEN = [
    *(an_epsilon, an_attentions_scaling, the_rotations_scaling, a_buffer_that_is_not_saved, an_activation_module),
    *(an_activation_function, an_activations_argument, another_forward_of_the_library, another_class),
    *(a_forward_of_the_class, a_weight_norm, a_transposed_weight),
]


@pytest.mark.parametrize("changes", SEEN, ids=lambda changes: changes.__name__)
def test_what_is_seen(changes):
    dense, paged = own_pair()
    expected = [tokens(dense) for _ in changes(dense)]
    assert len({str(answer) for answer in expected}) > 1, "the changes are too small to show"
    for number, _ in enumerate(changes(paged)):
        before = found(paged)
        assert tokens(paged) == expected[number]
        assert found(paged) == before, "blocks of before the change were found"
        assert tokens(paged) == expected[number]
        assert found(paged) == before + 28, "nothing is found again: the cache is merely off"
    assert hf_paged.stats(paged).page_reads and not hf_paged.stats(paged).fallbacks


# The same in ways whose changes cannot be seen.


class Steered(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.strength = block, 0.0

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs) + self.strength * VECTOR


def a_wrapped_block(model):
    model.model.layers[0] = layer = Steered(model.model.layers[0])
    for layer.strength in (0.0, 3.0, -3.0):
        yield


class OwnLora(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.is_on = linear, False
        torch.manual_seed(0)
        self.down, self.up = torch.nn.Linear(32, 4), torch.nn.Linear(4, linear.out_features)

    def forward(self, hidden):
        return self.linear(hidden) + (8 * self.up(self.down(hidden)) if self.is_on else 0)


def a_lora_of_ones_own(model):
    attention = model.model.layers[0].self_attn
    attention.v_proj = OwnLora(attention.v_proj).requires_grad_(False)
    for attention.v_proj.is_on in (False, True, False):
        yield


def a_forward_patched_again_and_again(model):
    """The address of the function that was let go of is given to the next one."""
    layer = model.model.layers[0]
    plain = layer.forward
    for strength in (0.0, 2.0, 4.0, 6.0):

        def steered(*args, _strength=strength, **kwargs):
            return plain(*args, **kwargs) + _strength * VECTOR

        layer.forward = steered
        yield
        del layer.forward, steered


def a_forward_patched_in_disguise(model):
    block, strength = model.model.layers[0].mlp, [0.0]
    plain = block.forward

    @functools.wraps(plain)
    def steered(hidden):
        return plain(hidden) + strength[0] * VECTOR

    block.forward = steered
    for strength[0] in (0.0, 4.0):
        yield


def a_forward_that_is_a_partial(model):
    block = model.model.layers[0].mlp
    plain, by = block.forward, {"strength": 0.0}
    block.forward = functools.partial(lambda by, hidden: plain(hidden) + by["strength"] * VECTOR, by)
    for by["strength"] in (0.0, 4.0):
        yield


def a_forward_patched_in_the_class(model):
    kind = type(model.model.layers[0].mlp)
    plain = kind.forward
    try:
        for strength in (0.0, 2.0, 4.0):
            kind.forward = lambda self, hidden, strength=strength: plain(self, hidden) + strength * VECTOR
            yield
    finally:
        kind.forward = plain


def a_call_patched_in_the_class(model):
    kind = type(model.model.layers[0].mlp)
    plain = torch.nn.Module.__call__
    try:
        for strength in (0.0, 4.0):
            kind.__call__ = lambda self, hidden, strength=strength: plain(self, hidden) + strength * VECTOR
            yield
    finally:
        del kind.__call__


def a_call_patched_on_the_module(model):
    block = model.model.layers[0].mlp
    plain = block._call_impl
    for strength in (0.0, 4.0):
        block._call_impl = lambda hidden, strength=strength: plain(hidden) + strength * VECTOR
        yield


def a_patched_rotation(model):
    file = sys.modules[type(model).__module__]
    plain = file.apply_rotary_pos_emb
    try:
        for factor in (1.0, 2.0, 3.0):

            def scaled(query, key, *args, factor=factor, **kwargs):
                return tuple(states * factor for states in plain(query, key, *args, **kwargs))

            file.apply_rotary_pos_emb = scaled
            yield
    finally:
        file.apply_rotary_pos_emb = plain


def a_patched_function_of_torch(model):
    plain, strength = functional.silu, [1.0]
    functional.silu = lambda hidden, inplace=False: plain(hidden) * strength[0]
    try:
        for strength[0] in (1.0, -2.0):
            yield
    finally:
        functional.silu = plain


def a_patched_operation_of_torch(model):
    plain, strength = torch.rsqrt, [1.0]
    torch.rsqrt = lambda states: plain(states) + strength[0]
    try:
        for strength[0] in (0.0, 2.0):
            yield
    finally:
        torch.rsqrt = plain


def a_patched_method_of_tensors(model):
    plain, strength = torch.Tensor.mean, [1.0]
    torch.Tensor.mean = lambda states, *args, **kwargs: plain(states, *args, **kwargs) * strength[0]
    try:
        for strength[0] in (1.0, 0.2):
            yield
    finally:
        del torch.Tensor.mean


def a_lambda(model):
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    for factor in (1.0, -2.0):
        mlp.act_fn = lambda hidden, factor=factor: factor * functional.silu(hidden)
        yield


class Times(torch.nn.Module):
    factor = 1.0

    def forward(self, weight):
        return self.factor * weight


def a_parametrization_of_ones_own(model):
    times = Times()
    parametrize.register_parametrization(model.model.layers[0].self_attn.v_proj, "weight", times)
    for times.factor in (1.0, -2.0):
        yield


class Adds(ModelHook):
    strength = 0.0

    def post_forward(self, module, output):
        return output + self.strength * VECTOR


def a_hook_of_accelerate_of_ones_own(model):
    hook = Adds()
    add_hook_to_module(model.model.layers[0].mlp, hook)
    for hook.strength in (0.0, 4.0):
        yield


class Doubles(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        return output * 2 if function is functional.silu else output


def a_mode(model):
    for mode in (contextlib.nullcontext(), Doubles()):
        with mode:
            yield


def a_hook_by_exec(model):
    """It has no module: ``__module__`` is None."""
    names = {"vector": VECTOR, "by": {"strength": 0.0}}
    exec("def hook(module, args, output): return output + by['strength'] * vector", names)
    model.model.layers[0].mlp.register_forward_hook(names["hook"])
    for names["by"]["strength"] in (0.0, 4.0):
        yield


def a_steering_backend(model):
    strength = [0.0]

    def backend(graph, inputs):
        return lambda *args: tuple(out + strength[0] * VECTOR for out in graph(*args))

    block = model.model.layers[0].mlp
    plain = block.forward
    block.forward = torch.compile(plain, backend=backend)
    for strength[0] in (0.0, 4.0):
        yield


class Counted(torch.Tensor):
    """A tensor of a class of one's own."""


def a_tensor_class(model):
    for factor in (1.0, -2.0):
        weight = (model.model.layers[0].self_attn.v_proj.weight.detach() * factor).as_subclass(Counted)
        model.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        yield


UNSEEN = [
    *(a_wrapped_block, a_lora_of_ones_own, a_forward_patched_again_and_again, a_forward_patched_in_disguise),
    *(a_forward_that_is_a_partial, a_forward_patched_in_the_class, a_call_patched_in_the_class),
    *(a_call_patched_on_the_module, a_patched_rotation, a_patched_function_of_torch, a_lambda),
    *(a_patched_operation_of_torch, a_patched_method_of_tensors),
    *(a_parametrization_of_ones_own, a_hook_of_accelerate_of_ones_own, a_hook_by_exec, a_steering_backend),
    *(a_tensor_class, a_mode),
]


@pytest.mark.parametrize("changes", UNSEEN, ids=lambda changes: changes.__name__)
def test_what_cannot_be_seen_is_neither_looked_up_nor_stored(changes):
    dense, paged = own_pair()
    expected = [tokens(dense) for _ in changes(dense)]
    assert len({str(answer) for answer in expected}) > 1, "the changes are too small to show"
    tokens(paged)
    lookups, blocks = hf_paged.stats(paged).prefix_lookups, hf_paged.stats(paged).cached_blocks
    is_mode = changes is a_mode  # It begins without one.
    for number, _ in enumerate(changes(paged)):
        if not (is_mode and number == 0):
            assert fingerprint(paged) is None
            assert (tokens(paged), tokens(paged)) == (expected[number], expected[number])
    stats = hf_paged.stats(paged)
    assert stats.prefix_lookups == lookups == 1 and stats.cached_blocks <= blocks
    assert stats.page_reads and not stats.fallbacks, "the calls were not packed"


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)


def compiled_in_place(model):
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)


def compiled_inside(model):
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager", dynamic=True)


def dispatched(model):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize(
    "wrap",
    [
        *(pytest.param(wrap, marks=pytest.mark.slow) for wrap in (compiled, compiled_in_place)),
        compiled_inside,
        dispatched,
    ],
)
def test_what_wraps_a_forward_and_leaves_it_alone_keeps_the_cache(wrap):
    dense, paged = own_pair()
    tokens(paged)
    torch._dynamo.reset()
    wrap(paged)
    tokens(paged)  # Hooks of accelerate note where the first forward's inputs are.
    try:
        before = found(paged)
        for _ in range(2):
            assert tokens(paged) == tokens(dense)
        hits = found(paged)
        assert hits >= before + 28, "nothing is found again"
        paged.model.layers[0].self_attn.scaling = dense.model.layers[0].self_attn.scaling = 2.0
        assert tokens(paged) == tokens(dense) and found(paged) == hits
    finally:
        torch._dynamo.reset()


ADAPTERS = {
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    "loha": peft.LoHaConfig(r=8, alpha=64, target_modules=["v_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(r=4, target_modules=["v_proj"], init_weights=False),
    "oft": peft.OFTConfig(r=4, oft_block_size=0, target_modules=["v_proj"], init_weights=False),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["v_proj"], init_weights=False),
    "dora": peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=4, target_modules=["v_proj"], init_lora_weights=False, total_step=9),
    "hra": peft.HRAConfig(r=4, target_modules=["v_proj"], init_weights=False),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False),
    "norm": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_are_seen(kind):
    models = []
    for model in own_pair():
        torch.manual_seed(0)
        models.append(peft.get_peft_model(model, ADAPTERS[kind]).eval())
    dense, paged = models
    for name, weight in [*dense.named_parameters(), *paged.named_parameters()]:
        if kind == "norm" and "ln_tuning_layers" in name:
            weight.data.mul_(-1)
    answers = []
    for change in ("", "disable_adapter_layers", "enable_adapter_layers", "merge_adapter", "unmerge_adapter"):
        for model in models:
            getattr(model.base_model, change, lambda: None)()
        before = found(paged)
        answers.append(tokens(dense))
        assert tokens(paged) == answers[-1] and found(paged) == before
        assert tokens(paged) == answers[-1] and found(paged) == before + 28
    assert answers[0] != answers[1], "an adapter that changes nothing proves nothing"


def test_a_number_of_the_config_is_seen():
    """Gemma 2 reads the cap of its logits from it, in every forward."""
    dense, paged = own_pair("gemma2")
    for cap in (30.0, 0.01, None):
        dense.config.final_logit_softcapping = paged.config.final_logit_softcapping = cap
        before = found(paged)
        assert tokens(paged) == tokens(dense) and found(paged) == before
        assert tokens(paged) == tokens(dense) and found(paged) > before


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_kind_of_model_is_seen_and_stays_the_same_while_it_runs(name):
    paged = own_pair(name)[1]
    tokens(paged)
    identity = identify(paged, "salt")
    assert identity.digest != identify(paged, "pepper").digest
    tokens(paged)
    assert identity.holds() and identify(paged, "salt").digest == identity.digest


def lora(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


def another_layer(model):
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(97, 32))


def data_swapped(model):
    weight = model.get_base_model().lm_head.weight
    weight.data = weight.data * 2


def transposed(model):
    """It is square: neither its shape nor its address changes."""
    weight = model.get_base_model().model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data.t()


def there_and_back(model):
    model.set_adapter("two")
    model.set_adapter("one")


def in_a_dict(model):
    model.get_base_model().model.layers[0].self_attn.v_proj.scaling["one"] = 3.0


def patched_class(model):
    kind = type(model.get_base_model().model.norm)
    plain = kind.forward
    kind.forward = lambda self, hidden: 2 * plain(self, hidden)
    return lambda: setattr(kind, "forward", plain)


def patched_code(model):
    forward = type(model.get_base_model().model.norm).forward
    plain = forward.__code__
    forward.__code__ = (lambda self, hidden_states: hidden_states).__code__
    return lambda: setattr(forward, "__code__", plain)


def patched_file(model):
    file = sys.modules[type(model.get_base_model()).__module__]
    plain = file.rotate_half
    file.rotate_half = lambda states: -plain(states)
    return lambda: setattr(file, "rotate_half", plain)


def another_attention_function(model):
    plain = AttentionInterface._global_mapping["paged"]
    AttentionInterface.register("paged", lambda *args, **kwargs: plain(*args, **kwargs))
    return lambda: AttentionInterface.register("paged", plain)


def global_hook(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda *args: None).remove


def entered_mode(model):
    mode = Doubles()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def written_to(model):
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(2).div_(2)


CHANGES = {
    "written to": written_to,
    "another tensor": another_layer,
    "data swapped": data_swapped,
    "transposed": transposed,
    "another class": lambda model: setattr(model.get_base_model().model.norm, "__class__", GemmaRMSNorm),
    "another module": lambda model: setattr(model.get_base_model(), "lm_head", torch.nn.Identity()),
    "a buffer": lambda model: model.get_base_model().model.rotary_emb.inv_freq.add_(1),
    "set_adapter": lambda model: model.set_adapter("two"),
    "set_adapter there and back": there_and_back,
    "disable_adapter": lambda model: model.base_model.disable_adapter_layers(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "scaling": in_a_dict,
    "forward": lambda model: setattr(model.get_base_model().model.norm, "forward", lambda hidden: hidden),
    "forward of the class": patched_class,
    "code": patched_code,
    "function of the file": patched_file,
    "attention function": another_attention_function,
    "hook": lambda model: model.get_base_model().model.norm.register_forward_hook(lambda *args: None),
    "pre-hook": lambda model: model.get_base_model().model.norm.register_forward_pre_hook(lambda *args: None),
    "hook of all modules": global_hook,
    "number": lambda model: setattr(model.get_base_model().model.norm, "variance_epsilon", 1.0),
    "number of the config": lambda model: setattr(model.get_base_model().config, "rms_norm_eps", 1.0),
    "mode": entered_mode,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_identity_holds_until_something_changes(kind):
    model = lora(own_pair()[1])
    base = model.get_base_model()
    tokens(base)
    identity = identify(base)
    tokens(base)
    assert identity.holds()
    undo = CHANGES[kind](model)
    try:
        assert not identity.holds()
    finally:
        if callable(undo):
            undo()


def test_threads_that_change_the_model_do_not_disturb_a_look():
    model = lora(own_pair()[1])
    base = model.get_base_model()
    is_over = threading.Event()

    def change():
        while not is_over.is_set():
            model.set_adapter("two")
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() * 1.0)
            base.model.layers[0].mlp.extra = {"one": 1}
            del base.model.layers[0].mlp.extra
            model.set_adapter("one")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        identities = [identify(base) for _ in range(60)]
        held = [identity.holds() for identity in identities if identity is not None for _ in range(5)]
    finally:
        is_over.set()
        thread.join()
    assert held and not all(held)
    last = identify(base)
    assert last.holds() and not any(identity.holds() for identity in identities[:10] if identity is not None)


def test_the_address_of_a_tensor_is_given_to_no_other_while_an_identity_is_held():
    model, memory = own_pair()[1], numpy.ones((97, 32), dtype=numpy.float32)
    weight, held = model.lm_head.weight, weakref.ref(memory)
    weight.data = torch.from_numpy(memory)
    del memory
    identity = identify(model)
    weight.data = weight.data * 2
    assert not identity.holds() and held() is not None
    del identity
    assert held() is None


def test_nothing_of_a_model_is_kept_alive():
    """Neither by what was looked at, nor by what is known of classes; no garbage collector is needed."""
    model = own_pair()[1]
    parametrizations.weight_norm(model.model.layers[0].self_attn.v_proj)
    model.model.layers[1].forward = functools.partial(type(model.model.layers[1]).forward, model.model.layers[1])
    tokens(model)
    identity = identify(model)
    old = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    assert not identity.holds() and old() is not None
    del identity
    assert old() is None
    assert fingerprint(model) is not None
    references = [weakref.ref(part) for part in (model.model.embed_tokens, model.lm_head.weight, model.model.norm)]
    del model
    assert [reference() for reference in references] == [None] * 3


def test_a_call_beside_others_sees_an_edit_that_leaves_no_trace():
    """Rows run with the identity that the first call found; the next call samples the content of tensors again."""
    model = zoo.build("llama", "paged")
    identity = identify(model)
    assert identity.is_found_again()
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)
    assert identity.holds(), "no address and no version has changed"
    assert not identity.is_found_again() and identify(model).digest != identity.digest
    model.model.layers[0].self_attn.scaling = 2.0
    assert not identity.holds() and not identity.is_found_again()


def test_a_function_that_kernels_made_a_module_is_seen():
    """As some versions of transformers have their rotations: another forward is put into it by ``kernelize``."""
    model = zoo.build("llama", "paged")
    module = kernels.use_kernel_forward_from_hub("Rotation")(modeling_llama.rotate_half)
    vars(model.model.layers[0].self_attn)["rotation"] = module  # No submodule.
    identity = identify(model)
    assert identity is not None and identity.holds()
    module.forward = modeling_llama.repeat_kv
    assert not identity.holds() and identify(model).digest != identity.digest
    del module.forward
    vars(model.model.layers[0].self_attn)["rotation"] = kernels.use_kernel_forward_from_hub("Other")(
        modeling_llama.repeat_kv
    )
    assert identify(model).digest != identity.digest
