"""Vision towers in torch: image and kept tokens in, features out. One file per architecture."""
