"""optimum-intel's OpenVINO model as a worker of peers.py, by the protocol of worker_reference.py.

    worker_openvino.py EXPORTED_MODEL THREADS

Run with a Python that has optimum-intel, openvino and transformers. Nothing is pruned there.
"""

# ruff: noqa: E402 (what must not be imported is named first)
import json
import sys
import time
from itertools import pairwise

sys.modules["openvino_telemetry"] = None  # else it reports that it was imported
import torch
from clock import Clock, peak
from optimum.intel import OVModelForVisualCausalLM
from PIL import Image
from reference_processor import reference_processor

model = OVModelForVisualCausalLM.from_pretrained(
    sys.argv[1], ov_config={"INFERENCE_NUM_THREADS": sys.argv[2]}
)
image_token = model.config.image_token_id
processor = reference_processor()
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    begin = time.perf_counter()
    batch = processor(images=[Image.open(request["image"]).convert("RGB")], return_tensors="pt")
    ready = time.perf_counter()
    ids, count, clock = torch.tensor([request["ids"]]), request["tokens"], Clock()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        mm_token_type_ids=(ids == image_token).int(),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        streamer=clock,
    )
    times = clock.times[1:]  # the first call is the prompt
    answer = {
        "preprocess": (ready - begin) * 1e3,
        "first": (times[0] - ready) * 1e3,
        "decode": [(b - a) * 1e3 for a, b in pairwise(times)],
        "tokens": out[0, -count:].tolist(),
        "rss": peak(),
    }
    print(json.dumps(answer), flush=True)
