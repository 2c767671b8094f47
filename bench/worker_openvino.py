"""optimum-intel's OpenVINO model as a worker of peers.py, by the protocol of worker_reference.py.

    worker_openvino.py EXPORTED_MODEL THREADS

Run with a Python that has optimum-intel, openvino and transformers. Nothing is pruned there.
"""

# ruff: noqa: E402 (what must not be imported is named first)
import sys

sys.modules["openvino_telemetry"] = None  # else it reports that it was imported
from optimum.intel import OVModelForVisualCausalLM
from transformers_worker import serve

model = OVModelForVisualCausalLM.from_pretrained(
    sys.argv[1], ov_config={"INFERENCE_NUM_THREADS": sys.argv[2]}
)


def more_inputs(request, ids, pixels):
    return {"pixel_values": pixels, "mm_token_type_ids": (ids == model.config.image_token_id).int()}


serve(model, more_inputs)
