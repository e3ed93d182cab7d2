"""llama.cpp as an oracle: the logits of a GGUF model, with or without an adapter, by the package llama-cpp-python."""

import ctypes
from pathlib import Path

import numpy as np


def logits(model: Path, ids: list[int], *, adapter: Path | None = None, threads: int = 2) -> np.ndarray:
    """The logits behind every token of a text, float32 (tokens, vocabulary). Keys and values are kept in float32."""
    from llama_cpp import llama_cpp as api

    silence = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(silence, None)
    api.llama_backend_init()
    options = api.llama_model_default_params()
    options.n_gpu_layers = 0
    loaded = api.llama_model_load_from_file(str(model).encode(), options)
    assert loaded, f"llama.cpp does not load {model}"
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(32, len(ids))
    settings.n_threads = settings.n_threads_batch = threads
    # ggml's number of F32; by default they are float16.
    settings.type_k = settings.type_v = 0
    context = api.llama_init_from_model(loaded, settings)
    assert context
    if adapter:
        held = api.llama_adapter_lora_init(loaded, str(adapter).encode())
        assert held, f"llama.cpp does not load {adapter}"
        holders = (api.llama_adapter_lora_p_ctypes * 1)(held)
        assert api.llama_set_adapters_lora(context, holders, 1, (ctypes.c_float * 1)(1.0)) == 0
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    assert api.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), shape=(size,)) for i in range(len(ids))]
    result = np.stack(rows)
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(loaded)
    return result
