"""The authors' PixelPrune as a worker of end_to_end.py: run with a Python that has transformers 4.57.6.

    worker_reference.py PATH_OF_PIXELPRUNE CHECKPOINT float32|bfloat16 THREADS

Reads lines of JSON {"image": "a.png", "prune": true, "ids": [...], "tokens": 17} from stdin; ``ids`` are the tokens of
the prompt, placeholders of its image included. Answers each with {"preprocess": ms, "first": ms after that, "decode":
[ms per token], "tokens": [...], "rss": peak bytes}; before the first one, {"ready": true, "packages": {name: version}}.
"""

import os
import sys

sys.path.insert(0, sys.argv[1])
import torch
from pixelprune import apply_pixelprune
from transformers import AutoModelForImageTextToText
from transformers_worker import serve

torch.set_num_threads(int(sys.argv[4]))
apply_pixelprune(model="qwen3_vl")
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3])).eval()


def more_inputs(request, ids, pixels):
    os.environ["PIXELPRUNE_ENABLED"] = "true" if request["prune"] else "false"
    return {"pixel_values": pixels.to(model.dtype)}


serve(model, more_inputs)
