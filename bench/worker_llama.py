"""llama.cpp as a worker of peers.py, by the protocol of worker_reference.py.

    worker_llama.py FOLDER THREADS

FOLDER: what llama_convert.py wrote. Run with a Python that has llama-cpp-python. The image is handed over as pixels;
the question is text of as many tokens as were asked. Nothing is pruned there.
"""

import ctypes
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import llama_cpp as llama
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image
from process import peak, versions

folder, threads = Path(sys.argv[1]), int(sys.argv[2])
CONTEXT = 4096
BATCH = 512


@llama.llama_log_callback
def silent(level, text, data):
    """Nothing is printed."""


llama.llama_log_set(silent, ctypes.c_void_p(0))
llama.llama_backend_init()
model = llama.llama_model_load_from_file(
    str(folder / "model.gguf").encode(), llama.llama_model_default_params()
)
parameters = llama.llama_context_default_params()
parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CONTEXT, BATCH, BATCH
parameters.n_threads = parameters.n_threads_batch = threads
context = llama.llama_init_from_model(model, parameters)
of_image = mtmd.mtmd_context_params_default()
of_image.use_gpu, of_image.n_threads, of_image.warmup = False, threads, False
of_image.image_max_tokens = CONTEXT
vision = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), model, of_image)
assert model is not None
assert context is not None
assert vision is not None
words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
print(json.dumps({"ready": True, "packages": versions("llama-cpp-python")}), flush=True)


def likeliest() -> int:
    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (words,))
    return int(logits.argmax())


for line in sys.stdin:
    request = json.loads(line)
    begin = time.perf_counter()
    pixels = np.ascontiguousarray(Image.open(request["image"]).convert("RGB"))
    height, width, _ = pixels.shape
    bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    question = b"abc" + mtmd.mtmd_default_marker() + b"?" * request["asked"]
    text = mtmd.mtmd_input_text(question, len(question), False, True)
    chunks = mtmd.mtmd_input_chunks_init()
    failed = mtmd.mtmd_tokenize(
        vision, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1
    )
    assert failed == 0, failed
    ready = time.perf_counter()
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    place = llama.llama_pos(0)
    failed = mtmd.mtmd_helper_eval_chunks(vision, context, chunks, 0, 0, BATCH, True, ctypes.byref(place))
    assert failed == 0, failed
    tokens, times = [likeliest()], [time.perf_counter()]
    while len(tokens) < request["tokens"]:
        last = (llama.llama_token * 1)(tokens[-1])  # the batch points at it
        assert llama.llama_decode(context, llama.llama_batch_get_one(last, 1)) == 0
        tokens.append(likeliest())
        times.append(time.perf_counter())
    answer = {
        "preprocess": (ready - begin) * 1e3,
        "first": (times[0] - ready) * 1e3,
        "decode": [(b - a) * 1e3 for a, b in pairwise(times)],
        "tokens": tokens,
        "prompt": mtmd.mtmd_helper_get_n_tokens(chunks),
        "rss": peak(),
    }
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    print(json.dumps(answer), flush=True)
