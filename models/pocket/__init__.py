"""The pocket model: a small trained Qwen3-VL checkpoint, and what it was trained and is measured on."""
