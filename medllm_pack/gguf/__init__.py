"""The GGUF side: names, metadata, vocabulary, layout, strict reader."""
