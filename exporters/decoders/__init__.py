"""Language decoders in torch: tokens and features in, logits and states out. One file per architecture."""
