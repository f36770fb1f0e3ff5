"""Fast-LLM's attention layer (ServiceNow/Fast-LLM) under test, one class for each of its implementations.

    PYTHONPATH=FOLDER_OF_FAST_LLM python -m attn_fuzz check-layer examples/fast_llm_layer.py:LayerBackup --device cpu

Everything that touches a tensor is Fast-LLM's own: how a micro-sequence is cropped and described, the attention layer
inside a stage, as its tests build one, and the keys and values that a micro-sequence hands to the next. Only the order
of the calls is written here, for cuts anywhere; it is that of Fast-LLM's ``get_model_inputs``.
"""

import functools
import inspect
import itertools
import json
import math
import os

import torch

try:
    from fast_llm.data.document.config import LanguageModelBatchPreprocessingConfig
    from fast_llm.data.document.language_model import LanguageModelBatch
    from fast_llm.engine.base_model.config import set_model_names
    from fast_llm.engine.config_utils.data_type import DataType
    from fast_llm.engine.config_utils.tensor_dim import TensorDim
    from fast_llm.engine.distributed.config import DistributedConfig
    from fast_llm.engine.distributed.distributed import Distributed, ProcessGroupPool
    from fast_llm.engine.multi_stage.config import StageConfig
    from fast_llm.engine.multi_stage.stage import Stage
    from fast_llm.functional.config import TritonConfig
    from fast_llm.layers.attention import attention as fast_llm_attention
    from fast_llm.layers.attention.config import AttentionConfig, AttentionKwargs
except (ImportError, SyntaxError) as error:
    raise ImportError(
        f"Fast-LLM is needed ({error}): a checkout of github.com/ServiceNow/Fast-LLM on PYTHONPATH, what it requires, "
        "and Python 3.12"
    ) from error

if os.environ.get("FAST_LLM_COMPILED") != "1":
    # Its rotary is under torch.compile, and where there is a GPU there are Triton kernels instead, with the number of
    # tokens or of elements as a constant. Both compile anew for every shape, and each case brings ten new ones or more,
    # so that most of a campaign would be spent compiling. Fast-LLM has plain torch for all of them, which runs instead.
    torch.compiler.set_stance("force_eager")
    TritonConfig.TRITON_ENABLED = False

SHARES_BUFFER = hasattr(fast_llm_attention, "_KVCacheSlot")
"""Whether this Fast-LLM keeps keys and values of a sequence in one buffer, or concatenates them at every step."""

COUNTS_DOCUMENTS = "is_first_for_rank" in inspect.signature(LanguageModelBatch._get_model_input).parameters
"""Whether an argument that concerns other layers only must be given."""


@functools.cache
def distributed_of(dtype, device):
    """One rank; without a pool of its own it would always be on the first GPU."""
    with ProcessGroupPool(device=device):
        return Distributed(DistributedConfig(compute_dtype=DataType.from_torch(dtype), use_cuda=device.type == "cuda"))


@functools.lru_cache(maxsize=64)
def config_of(written):
    """From JSON, and kept: this is a fifth of building a layer, and a case builds several that are configured alike."""
    return AttentionConfig.from_dict(json.loads(written))


class Batch(LanguageModelBatch):
    def _get_cropped_lengths(self, begin, end):
        # Where a cut falls between documents, the next one's end is taken for the last one's, and non-causal attention,
        # which can be cut nowhere else, ends in an assertion. Nothing else asks for it.
        lengths, first_document_begin, last_document_end = super()._get_cropped_lengths(begin, end)
        return lengths, first_document_begin, end if end in itertools.accumulate(self.lengths) else last_document_end


class Layer:
    """What the implementations share; ``implementation`` is Fast-LLM's name for one of them."""

    def __init__(self, weights, case):
        self.case, device = case, weights["query"].device
        distributed = distributed_of(weights["query"].dtype, device)
        self.attention = config_of(json.dumps(self.config())).get_layer(
            distributed.config, TensorDim("hidden", case.hidden), lr_scale=None, peft=None, return_bias=False
        )
        # Its option is a power of the head size.
        self.attention._softmax_scale = case.softmax_scale
        self.attention.setup(distributed)
        set_model_names(torch.nn.ModuleList([self.attention]))
        self.stage = Stage(
            config=StageConfig(), layers=[self.attention], distributed_config=distributed.config, index=0
        )
        self.stage.setup(distributed=distributed)
        self.stage.restore_parameters()
        self.stage.reset_gradients()
        self.stage.train()
        self.parameters = {name: getattr(self.attention, name).weight for name in weights}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
        self.batch = Batch(
            tokens=torch.zeros(case.tokens, dtype=torch.int64, device=device),
            lengths=list(case.packed_lengths),
            unpadded_length=case.tokens - case.padding,
        )
        self.preprocessing = LanguageModelBatchPreprocessingConfig(
            distributed=distributed.config, predicted_tokens=0, **self.attention.get_preprocessing_config()
        )
        self.contexts, self.presents, self.slot = [], None, None

    def config(self):
        case = self.case
        config = {
            "implementation": self.implementation,
            "heads": case.heads,
            "head_groups": case.kv_heads,
            "head_size": case.head_dim,
            "causal": case.causal,
            "shared_key_value": case.shared_key_value,
            "add_linear_biases": False,
        }
        for name in ("query_norm", "key_norm", "value_norm"):
            if getattr(case, name) != "none":
                config[name] = {"type": "rms_norm"}
        if case.window[0] >= 0:
            # Its window counts the row itself.
            config["window_size"] = case.window[0] + 1
        if case.rotary != "none":
            config["rotary"] = {"type": case.rotary, "theta": case.rotary_theta}
        if case.rotary == "proportional":
            turning = math.ceil(case.rotary_fraction * (case.head_dim // 2))
            config["rotary"]["partial_rotary_factor"] = 2 * turning / case.head_dim
        return config

    def forward(self, x, begin, end):
        extra = {"is_first_for_rank": begin == 0} if COUNTS_DOCUMENTS else {}
        model_input = self.batch._get_model_input(begin, end, self.preprocessing, **extra)
        model_input.pasts = self.presents
        # The last micro-sequence hands nothing on. A shared buffer can be had there all the same, to look at.
        model_input.presents = self.presents = [] if end < self.case.tokens or SHARES_BUFFER else None
        kwargs = model_input.to_kwargs()
        kwargs[AttentionKwargs.sequence_length] += self.case.capacity
        self.attention.preprocess(kwargs)
        out, context = self.stage.forward(x.detach().requires_grad_(), kwargs)
        self.contexts.append(context)
        if SHARES_BUFFER:
            self.slot = self.presents[0]
        return out

    def backward(self, dout):
        return self.stage.backward(dout, self.contexts.pop())

    def parameter_gradients(self):
        return {name: parameter.grad_buffer for name, parameter in self.parameters.items()}

    def key_value(self):
        return self.shown(self.slot.buffer if self.slot else None)

    def key_value_gradients(self):
        return self.shown(self.slot.grad_buffer if self.slot else None)

    def shown(self, buffer):
        # Keys are rotated by positions in the packed sequence, which gives the same scores but not the same keys.
        return None if buffer is None or self.case.rotary != "none" else buffer.chunk(2, dim=1)


# No softcap there; and its window has a left side only, which the masks of non-causal attention leave out.
COMMON = {"softcap": False, "window_needs_causal": True}


class LayerBackup(Layer):
    implementation = "backup"
    # Weights of masked keys are zeros that multiply the values.
    capabilities = COMMON | {"isolates_nonfinite": False}


class LayerSdpaDense(Layer):
    implementation = "sdpa_dense"
    # As above: an explicit mask.
    capabilities = COMMON | {"isolates_nonfinite": False}


class LayerSdpaNested(Layer):
    implementation = "sdpa_nested"
    capabilities = COMMON | {
        # On CPUs torch's nested attention refuses to be causal.
        "devices": ["cuda"],
        # Cannot be expressed there; Fast-LLM takes another implementation.
        "window": False,
        # The kernels beneath take rows of whole 16 bytes only.
        "head_dim_multiple": 8,
        # A document cut by a micro-sequence sends the whole call to the explicit mask.
        "isolates_nonfinite": False,
    }


class LayerFlash(Layer):
    implementation = "flash"
    # FlashAttention's own limits.
    capabilities = COMMON | {"devices": ["cuda"], "dtypes": ["bf16", "fp16"], "max_head_dim": 256}
